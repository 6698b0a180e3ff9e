"""A trained student's folder, and what its record says to whoever samples it: teacher, text encoder, settings.

Only the standard library is imported until a file is known to be right.
"""

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.errors import UserError
from wandistiller.files.clone import CLONE
from wandistiller.files.hub import hub_id, is_hub_id
from wandistiller.model.config import CONFIG_NAME, StudentConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from wandistiller.sampling.sampler import SamplingOptions
    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import TeacherSettings
    from wandistiller.wan.text_encoder_files import TextEncoderFiles

# What sampling cannot do without; the rest of the record is history.
_NEEDED = {
    "teacher_path": str,
    "shift": (int, float),
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "negative_prompt": str,
    "vae_scale_factor": int,
}


def recorded_path(path: str | None) -> str | None:
    """A path as a student's record holds it, to be found from any folder: hub ids and mock as they are, local ones absolute,
    or ./... in this code's own folder, which no hub id can look like."""
    if path is None or path == "mock" or hub_id(path):
        return path
    absolute = Path(os.path.abspath(path))
    return f"./{absolute.relative_to(CLONE)}" if absolute.is_relative_to(CLONE) else str(absolute)


def _found(recorded: str, what: str, flag: str, is_of_hub: bool) -> str:
    """Where a recorded path is now; refused where nothing is there."""
    if recorded == "mock" or is_of_hub:
        return recorded
    local = CLONE / recorded
    if not local.exists():
        raise UserError(f"{local}: the {what} this student records is not there; give {flag}")
    return str(local)


def load_shape(folder: str | Path) -> StudentConfig:
    """The config of a student in a folder, whether or not it was trained."""
    if not Path(folder).is_dir():
        raise UserError(f"--student {folder}: there is no such folder; give the --output_dir of train_distillation.py")
    return StudentConfig.load(folder)


def load_student_config(folder: str | Path) -> StudentConfig:
    """The config of a trained student, refused where it lacks the record of its distillation."""
    config = load_shape(folder)
    where = Path(folder) / CONFIG_NAME
    if config.distillation is None:
        raise UserError(
            f'{where}: has no "distillation" record, so teacher, shift and guidance are unknown; give a student that '
            "train_distillation.py saved"
        )
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(config.distillation.get(name), kind)]
    if wrong:
        raise UserError(
            f'{where}: its "distillation" record lacks {", ".join(wrong)}, or holds something else there; copy the file again'
        )
    return config


def weights_digest(folder: str | Path) -> str | None:
    """The sha256 of a student's weights file: what was measured belongs to these weights alone. None where there is none."""
    from wandistiller.files.atomic import file_digest
    from wandistiller.model.transformer import WEIGHTS_NAME

    file = Path(folder) / WEIGHTS_NAME
    return file_digest(file) if file.is_file() else None


def recorded_settings(config: StudentConfig) -> "TeacherSettings":
    """How the teacher was sampled, as the record holds it."""
    from wandistiller.wan.settings import TeacherSettings

    record = config.distillation or {}
    return TeacherSettings(**{field.name: record.get(field.name) for field in fields(TeacherSettings)})


def student_sampling(
    config: StudentConfig, num_inference_steps: int | None, compute_dtype: "torch.dtype", device: str
) -> "SamplingOptions":
    """How this student draws: as its teacher, or in the steps it learnt where it is a student of few (then by Euler)."""
    from wandistiller.sampling.sampler import SamplingOptions

    record = config.distillation or {}
    few = record.get("student_steps")
    return SamplingOptions(
        shift=record["shift"],
        num_inference_steps=num_inference_steps or few or record["num_inference_steps"],
        sampler="euler" if few else "unipc",
        compute_dtype=compute_dtype,
        device=device,
    )


def teacher_paths(
    config: StudentConfig, teacher_path: str | None, teacher_path_low: str | None = None
) -> tuple[str, str | None]:
    """The teacher and its low-noise file: as the flags say, else as recorded.

    A recorded teacher is a hub repository only where the run that made the student took it from there (`base_model`): a
    missing folder must not become another's repository of the same name.
    """
    if teacher_path is not None:
        return teacher_path, teacher_path_low
    record = config.distillation or {}
    recorded, low = record["teacher_path"], record.get("teacher_path_low")
    teacher = _found(recorded, "teacher", "--teacher_path", recorded == record.get("base_model"))
    if teacher_path_low is None and low is not None:
        teacher_path_low = _found(low, "low-noise expert", "--teacher_path_low", is_hub_id(low))
    return teacher, teacher_path_low


def check_is_teacher(teacher: StudentConfig, config: StudentConfig, teacher_path: str) -> None:
    """Refuse a teacher that does not share the student's latents and text."""
    for name in ("num_channels", "text_encoder_output_dim"):
        theirs, ours = getattr(teacher, name), getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"{teacher_path}: has {name} {theirs}, the student {ours}; it is not this student's teacher"
            )


def find_recorded_encoder(
    config: StudentConfig, text_encoder_path: str | None, teacher_path: str
) -> "TextEncoderFiles | None":
    """Folders of the text encoder and its tokenizer; None where the mock teacher's stand-in embeddings were learnt."""
    from wandistiller.wan.text_encoder_files import find_text_encoder

    path, recorded = text_encoder_path, (config.distillation or {}).get("text_encoder_path")
    if path is None and recorded is not None:
        path = _found(recorded, "text encoder", "--text_encoder_path", is_hub_id(recorded))
    if path is None and teacher_path == "mock":
        return None
    encoder = find_text_encoder(path or teacher_path)
    if (text_dim := encoder.text_dim()) != config.text_encoder_output_dim:
        raise UserError(
            f"{encoder.encoder}: gives embeddings of width {text_dim}, the student takes {config.text_encoder_output_dim}; point "
            "--text_encoder_path at the teacher's own encoder"
        )
    return encoder


def embed_texts(
    texts: "Sequence[str]",
    encoder: "TextEncoderFiles | None",
    config: StudentConfig,
    prompt_cache: str,
    device: str,
    progress: "Callable[[int, int], None] | None" = None,
) -> "PromptEmbeds":
    """Text tokens of prompts, as the student was trained on them."""
    from wandistiller.wan.prompt_embeds import mock_prompt_embeds
    from wandistiller.wan.text_encoder import EncodingOptions, encode_prompts

    if encoder is None:
        return mock_prompt_embeds(texts, config.text_encoder_output_dim, config.text_max_length)
    return encode_prompts(texts, encoder, prompt_cache, EncodingOptions(config.text_max_length, device), progress)


def embed_with_negative(
    prompts: "Sequence[str]", negative_prompt: str | None, *where
) -> "tuple[PromptEmbeds, Tensor | None]":
    """Text tokens of every prompt, and of the negative prompt where there is one; `where` as for `embed_texts`."""
    texts = [*prompts, negative_prompt] if negative_prompt is not None else list(prompts)
    embeds = embed_texts(texts, *where)
    return embeds.first(len(prompts)), embeds.read(len(prompts)) if negative_prompt is not None else None


def check_size(name: str, pixels: int, config: StudentConfig, patch_size: int) -> None:
    """Refuse a height or width (`name` as the person gave it) that does not fill whole patches behind the VAE."""
    unit = config.vae_scale_factor * patch_size
    if pixels % unit or pixels < unit:
        lower, upper = pixels // unit * unit, (pixels // unit + 1) * unit
        choices = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"{name} {pixels} is not a multiple of {unit} (VAE factor {config.vae_scale_factor} x patch size "
            f"{patch_size}); use {choices}"
        )
