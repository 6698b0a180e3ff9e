"""What a run reads beside weights, and what it says of itself before it begins: text encoder, embeddings, VAE, leftovers."""

import argparse
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.prompts import PromptFile, Texts
from wandistiller.model.config import StudentConfig
from wandistiller.processes import Processes
from wandistiller.targets.lanes import Lanes
from wandistiller.wan.files import WanFiles, check_weights
from wandistiller.wan.prompt_embeds import Embeds, PromptEmbeds, mock_prompt_embeds
from wandistiller.wan.settings import TeacherSettings, warnings_about
from wandistiller.wan.text_encoder import EncodingOptions, encode_prompts
from wandistiller.wan.text_encoder_files import TextEncoderFiles, find_text_encoder
from wandistiller.wan.vae import LatentStatistics, VaeLocation, check_statistics, find_vae, read_vae_config


def leave_features_out(args: argparse.Namespace, teacher: StudentConfig, config: StudentConfig) -> None:
    """Hidden states can be compared only token by token, which a student of other patches (a lite one) has not."""
    if args.feature_loss_weight and config.patch_size != teacher.patch_size:
        print(
            f"Hidden states are not compared: the student's tokens are patches of {config.patch_size}, the teacher's of "
            f"{teacher.patch_size}"
        )
        args.feature_loss_weight = 0.0


def leave_offload_out(args: argparse.Namespace, wan_files: WanFiles) -> None:
    if args.teacher_offload and len(wan_files.experts) == 1:
        print(
            "--teacher_offload is of no use here, this teacher has one expert; without it the usual states are trained on"
        )
        args.teacher_offload = False


def print_run(prompts: PromptFile, wan_files: WanFiles, settings: TeacherSettings, config: StudentConfig) -> None:
    """What is trained from what."""
    duplicates = f" ({prompts.duplicates} repeated lines left out)" if prompts.duplicates else ""
    print(f"Prompts: {len(prompts.prompts)}{duplicates}")
    print(f"Teacher: {wan_files.location} ({' + '.join(wan_files.experts)}), {settings.summary()}")
    print(
        f"Student: {config.block}, hidden_size {config.hidden_size}, depth {config.depth}, num_heads {config.num_heads}; "
        f"{config.image_size} px = {'x'.join(map(str, settings.latent_shape(config)))} latents"
    )
    for warning in warnings_about(wan_files, settings, config):
        print(f"Warning: {warning}")


def print_batch(args: argparse.Namespace, lanes: Lanes, processes: Processes) -> None:
    """How many samples a step takes, where that is not --batch_size alone."""
    if lanes.total == args.batch_size:
        return
    parts = [f"--batch_size {args.batch_size}", f"--grad_accum_steps {args.grad_accum_steps}"]
    print(f"Samples a step: {' x '.join([*parts, f'{processes.count} processes'])} = {lanes.total}")


def find_encoder(args: argparse.Namespace, wan_files: WanFiles, config: StudentConfig) -> TextEncoderFiles | None:
    """Folders of the text encoder and its tokenizer; None where the mock teacher's stand-in embeddings will do."""
    if wan_files.is_mock and args.text_encoder_path is None:
        return None
    encoder = find_text_encoder(args.text_encoder_path) if args.text_encoder_path else wan_files.text_encoder()
    if (text_dim := encoder.text_dim()) != config.text_encoder_output_dim:
        raise UserError(
            f"{encoder.encoder}: gives embeddings of width {text_dim}, teacher and student take "
            f"{config.text_encoder_output_dim}; point --text_encoder_path at the teacher's own encoder"
        )
    return encoder


def embed_prompts(
    args: argparse.Namespace,
    texts: Texts,
    encoder: TextEncoderFiles | None,
    settings: TeacherSettings,
    config: StudentConfig,
    processes: Processes,
) -> Embeds:
    """Text tokens of every prompt, and of the negative prompt where guidance needs it."""
    lists = [texts.prompts, texts.extra, texts.held_out, [settings.negative_prompt] if settings.uses_guidance else []]
    everything = [text for part in lists for text in part]
    if encoder is None:
        embeds = mock_prompt_embeds(everything, config.text_encoder_output_dim, config.text_max_length)
    else:

        def encode(prompts: list[str]) -> PromptEmbeds:
            options = EncodingOptions(config.text_max_length, processes.device)
            return encode_prompts(prompts, encoder, args.prompt_cache, options, print_encoding)

        encode(everything[processes.rank :: processes.count])  # each process its share, into the cache of all
        processes.barrier()
        embeds = encode(everything)
    if embeds.truncated:
        print(f"Warning: {embeds.truncated} prompts are longer than {config.text_max_length} tokens and were cut")
    num_trained = len(texts.prompts) + len(texts.extra)
    negative = embeds.read(len(everything) - 1) if settings.uses_guidance else None
    return Embeds(embeds.first(num_trained), embeds.part(num_trained, len(texts.held_out)), negative)


def print_encoding(done: int, total: int) -> None:
    if done == total or done % 500 == 0:
        print(f"Encoding prompts: {done}/{total}", flush=True)


def find_sample_vae(args: argparse.Namespace, wan_files: WanFiles, settings: TeacherSettings) -> VaeLocation | None:
    """Where the VAE of the sample pictures is, or None where none can be drawn; a --vae_path without one is a mistake.

    Raises:
        UserError: it is not the teacher's, or its files are not whole.
    """
    if not args.num_samples or (wan_files.is_mock and args.vae_path is None):
        return None
    if args.sigma_range != (0.0, 1.0):
        print("No sample pictures: a student of a part of the noise levels does not draw by itself")
        return None
    try:
        location = find_vae(args.vae_path, args.teacher_path)
        check_is_vae_of(settings, wan_files.config, location.config_path())
        if location.is_local:  # else the hub's client sees to its files
            check_weights(location.folder())
    except UserError as error:
        if args.vae_path is not None:
            raise
        print(f"No sample pictures: {error}")
        return None
    return location


def check_is_vae_of(settings: TeacherSettings, teacher: StudentConfig, config_path: Path) -> None:
    """Refuse a VAE of other latents than a run learns, by its config.json."""
    vae = read_vae_config(config_path, teacher.num_channels)
    folder = config_path.parent
    if vae.vae_scale_factor not in (None, settings.vae_scale_factor):
        raise UserError(
            f"{folder}: is a VAE of factor {vae.vae_scale_factor}; the teacher's latents have factor "
            f"{settings.vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    learnt = LatentStatistics(settings.latents_mean, settings.latents_std)
    if vae.latents_mean and vae.latents_std:
        check_statistics(learnt, LatentStatistics(vae.latents_mean, vae.latents_std), folder)
