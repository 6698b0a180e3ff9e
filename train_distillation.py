"""Distil a Wan text-to-video checkpoint into a small 2D image student, from a text file of prompts.

    python train_distillation.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt \
        --output_dir ./outputs/wan_t2i --num_epochs 100 --batch_size 4 --lr 1e-5

The demo, on a CPU in minutes and with no download, needs no flags:

    python train_distillation.py
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import run_command
from wandistiller.output_folder import (
    METRICS_NAME,
    SAMPLES_NAME,
    check_output_folder,
    prepare_output_folder,
    set_aside_previous_student,
)
from wandistiller.prompts import PromptFile, Texts, read_texts
from wandistiller.student_config import CONFIG_NAME, StudentConfig
from wandistiller.training_flags import parse_args

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    import torch

    from projection_mapper import ProjectionReport
    from wandistiller.prompt_embeds import Embeds, PromptEmbeds
    from wandistiller.student import WanLiteStudent
    from wandistiller.teacher import Teacher, TeacherSettings
    from wandistiller.teacher_cache import TeacherCache
    from wandistiller.wan_checkpoint import WanCheckpoint


# The flags that say how a student was made, recorded with it
RECIPE_FLAGS = [
    "teacher_path", "teacher_path_low", "text_encoder_path", "data_path", "extra_prompts", "init", "init_expert",
    "states", "sigma_range", "renoise_fraction", "student_rollout", "prompt_swap", "calls_per_expert", "replay",
    "feature_loss_weight", "sigma_weighting", "student_steps",
]  # fmt: skip


def open_fitting_teacher(args: argparse.Namespace, config: StudentConfig) -> "tuple[WanCheckpoint, TeacherSettings]":
    """The teacher by its headers, refused unless the student is a part of it; no weight is read yet."""
    from projection_mapper import open_teacher
    from wandistiller.selection import check_fits
    from wandistiller.teacher import resolve_settings

    checkpoint = open_teacher(args.teacher_path, config, args.teacher_path_low)
    check_fits(checkpoint.expert(args.init_expert).config, config, args.layers, args.student_config)
    settings = resolve_settings(
        checkpoint,
        shift=args.shift,
        guidance_scale=args.guidance_scale,
        guidance_scale_2=args.guidance_scale_2,
        boundary_ratio=args.boundary_ratio,
        negative_prompt=args.negative_prompt,
    )
    config.check_image_size(settings.vae_scale_factor)
    return checkpoint, settings


def leave_features_out(args: argparse.Namespace, teacher: StudentConfig, config: StudentConfig) -> None:
    """Hidden states can be compared only token by token, which a student of other patches (a lite one) has not."""
    if args.feature_loss_weight and config.patch_size != teacher.patch_size:
        print(
            f"Hidden states are not compared: the student's tokens are patches of {config.patch_size}, the teacher's of "
            f"{teacher.patch_size}"
        )
        args.feature_loss_weight = 0.0


def print_run(
    prompts: "PromptFile", checkpoint: "WanCheckpoint", settings: "TeacherSettings", config: StudentConfig
) -> None:
    from wandistiller.teacher import warnings_about

    duplicates = f" ({prompts.duplicates} repeated lines left out)" if prompts.duplicates else ""
    print(f"Prompts: {len(prompts.prompts)}{duplicates}")
    print(f"Teacher: {checkpoint.location} ({' + '.join(checkpoint.experts)}), {settings.summary()}")
    latent = config.image_size // settings.vae_scale_factor
    print(
        f"Student: {config.block}, hidden_size {config.hidden_size}, depth {config.depth}, num_heads {config.num_heads}; "
        f"{config.image_size} px = {config.num_channels}x{latent}x{latent} latents"
    )
    for warning in warnings_about(checkpoint, settings, config):
        print(f"Warning: {warning}")


def find_encoder(
    args: argparse.Namespace, checkpoint: "WanCheckpoint", config: StudentConfig
) -> "tuple[Path, Path] | None":
    """Folders of the text encoder and its tokenizer; None where the mock teacher's stand-in embeddings will do."""
    from wandistiller.errors import UserError
    from wandistiller.prompt_embeds import text_encoder_dim
    from wandistiller.wan_checkpoint import find_text_encoder

    if checkpoint.is_mock and args.text_encoder_path is None:
        return None
    encoder, tokenizer = (
        find_text_encoder(args.text_encoder_path) if args.text_encoder_path else checkpoint.text_encoder()
    )
    if (text_dim := text_encoder_dim(encoder)) != config.text_encoder_output_dim:
        raise UserError(
            f"{encoder}: gives embeddings of width {text_dim}, teacher and student take "
            f"{config.text_encoder_output_dim}; point --text_encoder_path at the teacher's own encoder"
        )
    return encoder, tokenizer


def embed_prompts(
    args: argparse.Namespace,
    texts: Texts,
    encoder: "tuple[Path, Path] | None",
    settings: "TeacherSettings",
    config: StudentConfig,
    device: str,
) -> "Embeds":
    """Text tokens of every prompt, and of the negative prompt where guidance needs it."""
    from wandistiller.prompt_embeds import Embeds, encode_prompts, mock_prompt_embeds

    lists = [texts.prompts, texts.extra, texts.held_out, [settings.negative_prompt] if settings.uses_guidance else []]
    everything = [text for part in lists for text in part]
    if encoder is None:
        embeds = mock_prompt_embeds(everything, config.text_encoder_output_dim, config.text_max_length)
    else:
        embeds = encode_prompts(
            everything, *encoder, args.prompt_cache, config.text_max_length, device, progress=print_encoding
        )
    if embeds.truncated:
        print(f"Warning: {embeds.truncated} prompts are longer than {config.text_max_length} tokens and were cut")
    num_trained = len(texts.prompts) + len(texts.extra)
    negative = embeds.read(len(everything) - 1) if settings.uses_guidance else None
    return Embeds(embeds.first(num_trained), embeds.part(num_trained, len(texts.held_out)), negative)


def find_sample_vae(args: argparse.Namespace, checkpoint: "WanCheckpoint") -> "tuple[str, str | None] | None":
    """Where the VAE of the sample pictures is, or None where none can be drawn; a --vae_path without one is a mistake."""
    from wandistiller.errors import UserError
    from wandistiller.pictures import find_vae

    if not args.num_samples or (checkpoint.is_mock and args.vae_path is None):
        return None
    if args.sigma_range != (0.0, 1.0):
        print("No sample pictures: a student of a part of the noise levels does not draw by itself")
        return None
    try:
        return find_vae(args.vae_path, args.teacher_path)
    except UserError as error:
        if args.vae_path is not None:
            raise
        print(f"No sample pictures: {error}")
        return None


def draw_samples(
    args: argparse.Namespace,
    student: "WanLiteStudent",
    teacher: "Teacher | None",
    settings: "TeacherSettings",
    prompts: list[str],
    prompt_embeds: "PromptEmbeds",
    vae_location: "tuple[str, str | None]",
    dtype: "torch.dtype",
    device: str,
    file: "Path",
) -> None:
    """The side-by-side picture; what it needs beyond training (a VAE) must not turn a finished run into a failed one."""
    from dataclasses import replace

    from wandistiller.errors import UserError
    from wandistiller.samples import save_samples
    from wandistiller.student_folder import student_sampling

    chosen = prompts[: args.num_samples]
    student_options = student_sampling(student.config, None, dtype, device)
    teacher_options = replace(student_options, sampler="unipc", num_inference_steps=settings.num_inference_steps)
    who = "the student" if teacher is None else "teacher and student"
    print(f"Drawing {len(chosen)} prompts with {who}, {student_options.num_inference_steps} steps", flush=True)
    try:
        save_samples(
            file, student, teacher, settings, chosen, prompt_embeds, vae_location, teacher_options, student_options
        )
    except UserError as error:
        print(f"No sample pictures: {error}")
    else:
        print(f"{'The student' if teacher is None else 'Teacher above, student below'}: {file}")


def print_encoding(done: int, total: int) -> None:
    if done == total or done % 500 == 0:
        print(f"Encoding prompts: {done}/{total}", flush=True)


def build_student(
    args: argparse.Namespace, checkpoint: "WanCheckpoint", config: StudentConfig, device: str
) -> "tuple[WanLiteStudent, ProjectionReport]":
    """What is trained: a part of the teacher, or a student that inherits nothing."""
    from projection_mapper import fresh_student, project_teacher

    if args.init == "random":
        return fresh_student(checkpoint, config, args.init_expert, device=device, seed=args.seed)
    return project_teacher(checkpoint, config, args.init_expert, layers=args.layers, device=device, seed=args.seed)


def calls_line(num_calls: int, num_steps: int, cache: "TeacherCache | None") -> str:
    if cache is not None:
        return f"its answers came from {cache.num_answers} in {cache.folder}"
    return f"the teacher answered {num_calls} batches, {num_calls / num_steps:.2f} a step"


def dry_run(
    args: argparse.Namespace,
    checkpoint: "WanCheckpoint",
    settings: "TeacherSettings",
    config: StudentConfig,
    texts: Texts,
    encoder: "tuple[Path, Path] | None",
    device: str,
) -> int:
    """What the run would take; headers are all that is read, and nothing is written."""
    from wandistiller.budget_setup import check_places, report_budget
    from wandistiller.errors import UserError

    check_places(args, config)
    verdict, machine = report_budget(args, checkpoint, settings, config, texts, encoder, device)
    if verdict.is_certain_not_to_fit and machine.is_known:
        raise UserError(f"--dry_run: {verdict.sentence}")
    print(verdict.sentence)
    return 0


def out_of_memory(args: argparse.Namespace) -> Exception:
    """What was in the memory of the device that ran out, and which flags to change."""
    from wandistiller.budget_report import OutOfMemory, out_of_memory_message
    from wandistiller.budget_setup import changeable_flags, workload_from_args
    from wandistiller.device import pick_device, pick_dtype

    config = StudentConfig.load(args.student_config)
    texts, _ = read_texts(args.data_path, args.extra_prompts, args.eval_prompts, args.eval_every > 0)
    checkpoint, settings = open_fitting_teacher(args, config)
    device = pick_device(args.device)
    dtype = "bf16" if pick_dtype(args.dtype, device).itemsize == 2 else "fp32"
    workload = workload_from_args(args, checkpoint, settings, config, texts, dtype)
    return OutOfMemory(out_of_memory_message(workload, changeable_flags(args)))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return distil(args)
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        raise out_of_memory(args) from error


def distil(args: argparse.Namespace) -> int:
    # What a person typed is checked before torch loads, and every file before anything is written or a weight is read:
    config = StudentConfig.load(args.student_config)
    texts, prompt_file = read_texts(args.data_path, args.extra_prompts, args.eval_prompts, args.eval_every > 0)
    check_output_folder(args.output_dir)

    from projection_mapper import project_experts
    from wandistiller.answers import ReplayedAnswers
    from wandistiller.checkpointing import Checkpoints
    from wandistiller.device import pick_device, pick_dtype
    from wandistiller.record import distillation_record, save_student
    from wandistiller.reporting import Progress
    from wandistiller.run_setup import (
        build_answers,
        build_evaluation,
        build_objective,
        build_segment_answers,
        checkpoint_bytes,
        fill_cache,
        open_cache,
        run_description,
        segment_sigmas,
        training_options,
    )
    from wandistiller.teacher import Teacher
    from wandistiller.teacher_cache import CachedAnswers
    from wandistiller.training import train

    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    checkpoint, settings = open_fitting_teacher(args, config)
    leave_features_out(args, checkpoint.config, config)
    encoder = find_encoder(args, checkpoint, config)
    vae_location = find_sample_vae(args, checkpoint)
    if args.dry_run:
        print_run(prompt_file, checkpoint, settings, config)
        return dry_run(args, checkpoint, settings, config, texts, encoder, device)
    cache = open_cache(args, checkpoint, settings, texts, config)
    print_run(prompt_file, checkpoint, settings, config)
    folder = prepare_output_folder(args.output_dir)
    checkpoints = Checkpoints(folder, run_description(args, checkpoint, settings, texts, config), args.keep_checkpoints)
    resume_from = None if args.overwrite else checkpoints.newest()
    if resume_from is not None:
        print(f"Going on from step {resume_from.step} of {folder} (--overwrite starts anew)")
    elif args.save_every:
        checkpoints.check_disk(checkpoint_bytes(config))

    # Text first: its encoder leaves memory before the teacher comes:
    embeds = embed_prompts(args, texts, encoder, settings, config, device)

    # Student and teacher are projections of one checkpoint, a part of it and all of it:
    options = training_options(args, len(texts.prompts), settings, device)
    sources = (embeds, len(texts.prompts), config)
    teacher = None
    if cache is None or not cache.is_complete or not args.offline_teacher:
        teacher = Teacher(project_experts(checkpoint, config.text_max_length, dtype, device), settings, embeds.negative)
    if cache is not None and not cache.is_complete:
        fill_cache(cache, build_answers(args, teacher, *sources, [], dtype, device), options.num_steps, args.replay)
    if args.offline_teacher:
        teacher = None  # its memory is the student's from here on
    student, report = build_student(args, checkpoint, config, device)
    print(report.summary())

    # Train:
    objective, feature_layers = build_objective(
        args, report.layers, report.channels, checkpoint.config, config, settings.shift, dtype, device
    )
    if cache is not None:
        answers = CachedAnswers(cache, args.batch_size, device, args.seed)
    elif args.student_steps:
        answers = build_segment_answers(args, teacher, student, *sources, dtype, device)
    else:
        answers = build_answers(args, teacher, *sources, feature_layers, dtype, device)
    if args.replay > 1 and cache is None:
        answers = ReplayedAnswers(answers, args.replay, args.batch_size, args.seed, device)
    evaluate = build_evaluation(args, teacher, embeds, config, dtype, device)
    if resume_from is None and (aside := set_aside_previous_student(folder)):
        print(f"The student that was in {folder} is now in {aside}")
    first_step = resume_from.step if resume_from else 0
    with Progress(options.num_steps, folder / METRICS_NAME, first_step=first_step) as progress:
        result = train(
            student,
            answers,
            embeds.trained,
            objective,
            options,
            progress.step,
            evaluate,
            checkpoints if args.save_every else None,
            resume_from,
        )

    # Save:
    recipe = {name: getattr(args, name) for name in RECIPE_FLAGS}
    if args.student_steps:
        recipe["segment_sigmas"] = segment_sigmas(settings.shift, args.student_steps).tolist()
    record = distillation_record(
        settings,
        options,
        result,
        layers=report.layers,
        num_prompts=len(texts.prompts),
        num_teacher_batches=answers.num_calls,
        **recipe,
    )
    save_student(student, record, folder)
    report.save(folder)
    state = "Interrupted after" if result.interrupted else "Done:"
    print(
        f"{state} {result.num_steps} steps, loss {result.losses[0]:.4g} at the first and {result.losses[-1]:.4g} at the last; "
        f"{calls_line(answers.num_calls, result.num_steps, cache)}. "
        f"Saved {CONFIG_NAME} and diffusion_model.safetensors in {folder}"
    )
    if result.interrupted:
        return 130
    if vae_location is not None:
        picture = folder / SAMPLES_NAME / f"step_{result.num_steps:06d}.png"
        draw_samples(
            args, student, teacher, settings, texts.prompts, embeds.trained, vae_location, dtype, device, picture
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
