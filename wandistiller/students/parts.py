"""A trained student's folder, and what its record says to whoever draws with it: teacher, text encoder, VAE, settings.

Only the standard library is imported until a file is known to be right.
"""

import contextlib
import os
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.errors import UserError
from wandistiller.files.clone import CLONE, DEMO_TEACHER, DEMO_WORLD
from wandistiller.files.hub import hub_id, is_hub_id
from wandistiller.model.config import CONFIG_NAME, StudentConfig
from wandistiller.model.image_sizes import ImageSize, square
from wandistiller.prompts.prompts import NUM_HELD_OUT, is_endless, load_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from diffusers import AutoencoderKLWan
    from torch import Tensor

    from wandistiller.sampling.sampler import SamplingOptions
    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import TeacherSettings
    from wandistiller.wan.text_encoder_files import TextEncoderFiles
    from wandistiller.wan.wan_files import WanFiles

DEMO_PROMPT = "a large yellow circle on the left, on a white background"
ANY_PROMPT = "a lighthouse in a storm"  # for students that no prompt is known of
# Drawing cannot do without these; the rest of the record may be missing.
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "teacher_path": str,
    "shift": (int, float),
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "negative_prompt": str,
    "vae_scale_factor": int,
}


@dataclass(frozen=True, kw_only=True)
class StudentRecord:
    """What a student's `distillation` record says of drawing with it; None stands for what it does not say.

    Attributes:
        teacher_path, teacher_path_low, text_encoder_path: as `recorded_path` gives them.
        teacher_loras: the LoRAs that were merged into it: expert, file, sha256, scale and path of each.
        base_model: the hub repository of the teacher, where the run took it from there.
        num_inference_steps: how many steps the teacher draws in.
        student_steps: how many steps the student draws in, where it learnt whole steps.
        teacher_sampler: "euler" where the teacher has noise levels of its own alone, which the student then has too.
        sigma_range: the noise levels it was trained at.
        latents_mean, latents_std: per channel; model space is (z - mean) / std.
        image_sizes: what it was trained at, each as 640x384; None for the square of the config's image_size alone.
        data_path, extra_prompts: files of the prompts that it was trained on, as `recorded_path` gives them.
        caption_column: the column of theirs that held the prompts, where it was named.
    """

    teacher_path: str | None = None
    teacher_path_low: str | None = None
    teacher_loras: list[dict] | None = None
    base_model: str | None = None
    text_encoder_path: str | None = None
    shift: float | None = None
    num_inference_steps: int | None = None
    student_steps: int | None = None
    teacher_sampler: str | None = None
    sigma_range: tuple[float, float] | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    image_sizes: list[str] | None = None
    data_path: str | None = None
    caption_column: str | None = None
    extra_prompts: str | None = None

    @classmethod
    def of(cls, config: StudentConfig) -> "StudentRecord":
        """Read the record of a student; one that was not trained has none."""
        record = config.distillation or {}
        return cls(**{field.name: record.get(field.name) for field in fields(cls)})

    @property
    def sampler(self) -> str:
        """The student's sampler, a name in `sampling.sampler.SamplingOptions`.

        A student of whole steps follows straight lines, as Euler's method does; any other is sampled as its teacher is. That of
        a teacher with noise levels of its own draws at these.
        """
        if self.teacher_sampler == "euler":
            return "flow_euler"
        return "euler" if self.student_steps else "unipc"

    @property
    def sampler_of_teacher(self) -> str:
        """The teacher's sampler, a name in `sampling.sampler.SamplingOptions`."""
        return replace(self, student_steps=None).sampler

    @property
    def steps(self) -> int | None:
        """How many steps the student draws in unless another number is asked for."""
        return self.student_steps or self.num_inference_steps

    def warning_of_untrained_levels(self) -> str | None:
        """Return a warning where the student was trained at a part of the noise levels, else None."""
        low, high = self.sigma_range or (0.0, 1.0)
        if low <= 0.0 and high >= 1.0:
            return None
        return f"trained at sigma {low:g} to {high:g} only; a picture needs all of 0 to 1"


def trained_sizes(config: StudentConfig) -> list[ImageSize]:
    """Return the sizes that a student was trained at. It draws at the first unless another is asked for: the square, if it is among them."""
    sizes = [ImageSize.parse(size) for size in StudentRecord.of(config).image_sizes or []]
    own = square(config.image_size)
    return sorted(sizes, key=lambda size: size != own) or [own]


def load_shape(folder: str | Path) -> StudentConfig:
    """Load the config of the student in a folder, whether or not it was trained."""
    if not Path(folder).is_dir():
        raise UserError(f"--student {folder}: there is no such folder; give the --output_dir of train_distillation.py")
    return StudentConfig.load(folder)


def load_student_config(folder: str | Path) -> StudentConfig:
    """Load the config of a trained student; one without the record of its distillation is refused."""
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


def trained_prompts(config: StudentConfig, prompts: "Sequence[str]") -> set[str]:
    """Return the words of those of these prompts that a student was trained on, as far as its files are still where it records.

    Prompts are told apart as `load_prompts` does: by their words, however these are spaced. Templates without end hold prompts out
    by a rule, and what else they gave is not known.
    """
    record = StudentRecord.of(config)
    column = record.caption_column if isinstance(record.caption_column, str) else None
    asked, trained = {" ".join(prompt.split()) for prompt in prompts}, set()
    for path in (record.data_path, record.extra_prompts):
        with contextlib.suppress(UserError, OSError):  # a file that has become something else holds none of them
            known = load_prompts(CLONE / path, column).prompts if isinstance(path, str) else []
            if not is_endless(known):
                trained |= asked.intersection(" ".join(prompt.split()) for prompt in known)
    return trained


def tested_prompt(config: StudentConfig) -> str:
    """Return a prompt to show the student with: the shortest that its run measured it on, where its files are still there.

    A student of the demo's world knows coloured shapes alone, so that its prompt is of them wherever the files are.
    """
    record = config.distillation or {}
    if record.get("world") == DEMO_WORLD or record.get("teacher_path") == f"./{DEMO_TEACHER}":
        return DEMO_PROMPT
    file = CLONE / record["data_path"] if isinstance(record.get("data_path"), str) else None
    column = record.get("caption_column")
    if file and file.exists():
        with contextlib.suppress(UserError, OSError):
            found = load_prompts(file, column if isinstance(column, str) else None).prompts
            return min(found[:NUM_HELD_OUT], key=len)
    return ANY_PROMPT


def weights_digest(folder: str | Path) -> str | None:
    """Return the sha256 of a student's weights file, to which measurements belong; None where there is no such file."""
    from wandistiller.files.atomic import file_digest
    from wandistiller.model.transformer import WEIGHTS_NAME

    file = Path(folder) / WEIGHTS_NAME
    return file_digest(file) if file.is_file() else None


def recorded_settings(config: StudentConfig) -> "TeacherSettings":
    """Return how the teacher was sampled, as the record holds it."""
    from wandistiller.wan.settings import TeacherSettings

    record = config.distillation or {}
    named = [field.name for field in fields(TeacherSettings) if field.default is MISSING or record.get(field.name)]
    return TeacherSettings(**{name: record.get(name) for name in named})


def student_sampling(
    config: StudentConfig, num_inference_steps: int | None, compute_dtype: "torch.dtype", device: str
) -> "SamplingOptions":
    """Return how a student draws: as its teacher does, or by whole steps where it learnt them; None steps are as recorded."""
    from wandistiller.sampling.sampler import SamplingOptions

    record = StudentRecord.of(config)
    return SamplingOptions(
        shift=record.shift,
        num_inference_steps=num_inference_steps or record.steps,
        sampler=record.sampler,
        compute_dtype=compute_dtype,
        device=device,
    )


def teacher_sampling(
    config: StudentConfig, num_inference_steps: int | None, compute_dtype: "torch.dtype", device: str
) -> "SamplingOptions":
    """Return how the student's teacher draws; None steps are as recorded."""
    record = StudentRecord.of(config)
    steps = num_inference_steps or record.num_inference_steps
    return replace(student_sampling(config, steps, compute_dtype, device), sampler=record.sampler_of_teacher)


def recorded_path(path: str | None) -> str | None:
    """Return a path as a student's record holds it, so that it is found from any folder.

    Hub ids and "mock" stay as they are and local paths become absolute; those inside this code's own folder become ./...,
    which no hub id can look like.
    """
    if path is None or path == "mock" or hub_id(path):
        return path
    absolute = Path(os.path.abspath(path))
    return f"./{absolute.relative_to(CLONE)}" if absolute.is_relative_to(CLONE) else str(absolute)


def _found(recorded: str, what: str, flag: str, is_of_hub: bool) -> str:
    """Return where a recorded path is now.

    Raises:
        UserError: nothing is there.
    """
    if recorded == "mock" or is_of_hub:
        return recorded
    local = CLONE / recorded
    if not local.exists():
        raise UserError(f"{local}: the {what} this student records is not there; give {flag}")
    return str(local)


def teacher_paths(
    config: StudentConfig, teacher_path: str | None, teacher_path_low: str | None = None
) -> tuple[str, str | None]:
    """Return where the teacher and its low-noise expert are: as the arguments say, else as recorded.

    A recorded teacher is a hub repository only where the run that made the student took it from there (`base_model`): a
    missing folder must not become somebody else's repository of the same name.
    """
    if teacher_path is not None:
        return teacher_path, teacher_path_low
    record = StudentRecord.of(config)
    is_of_hub = record.teacher_path == record.base_model
    teacher = _found(record.teacher_path, "teacher", "--teacher_path", is_of_hub)
    low = record.teacher_path_low
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


@dataclass(frozen=True)
class TeacherLoras:
    """Files and scales of the LoRAs that flags name for a student's teacher; with none the recorded ones are merged."""

    high: "list[tuple[str, float]] | None" = None
    low: "list[tuple[str, float]] | None" = None


def open_recorded_teacher(
    config: StudentConfig, teacher_path: str, teacher_path_low: str | None, loras: TeacherLoras | None = None
) -> "WanFiles":
    """Open the files of the student's teacher; `teacher_paths` tells where they are. No weight of it is read yet.

    Args:
        loras: those that flags name instead of the recorded ones.

    Raises:
        UserError: they cannot be opened, or are not those of this student's teacher.
    """
    from wandistiller.wan.layouts import open_teacher
    from wandistiller.wan.lora import merge_loras

    wan_files = open_teacher(teacher_path, config, teacher_path_low)
    check_is_teacher(wan_files.config, config, teacher_path)
    if loras and (loras.high or loras.low):
        return merge_loras(wan_files, loras.high, loras.low)
    recorded = StudentRecord.of(config).teacher_loras or []
    for lora in recorded:
        wan_files = merge_loras(wan_files, **{lora["expert"]: [(_lora_path(lora), lora["scale"])]})
    for lora, merged in zip(recorded, wan_files.loras, strict=True):
        if merged.sha256 != lora["sha256"]:
            raise UserError(
                f"{merged.path}: is another file than the LoRA that this student's teacher had (sha256 {merged.sha256[:12]}..., "
                f"recorded {lora['sha256'][:12]}...); give {_lora_flag(lora)} the right one"
            )
    return wan_files


def _lora_flag(lora: dict) -> str:
    return "--teacher_lora" if lora["expert"] == "high" else "--teacher_lora_low"


def _lora_path(lora: dict) -> str:
    """Return where a recorded LoRA is now; what was published has no path any more."""
    flag = f"{_lora_flag(lora)} FILE:{lora['scale']:g}"
    if lora.get("path") is None:
        raise UserError(
            f"this student's teacher had the LoRA {lora['file']}, and nothing records where that is; give {flag}"
        )
    return _found(lora["path"], "LoRA of the teacher that", flag, is_of_hub=False)


@dataclass(frozen=True)
class DrawingParts:
    """The parts of a Wan that draw a picture together with its transformer.

    Attributes:
        encoder: the text encoder and its tokenizer on disk; None stands for the mock's embeddings.
        vae: the AutoencoderKLWan, in memory.
    """

    encoder: "TextEncoderFiles | None"
    vae: "AutoencoderKLWan"


def load_drawing_parts(
    config: StudentConfig, teacher_path: str, *, text_encoder_path: str | None, vae_path: str | None, device: str
) -> DrawingParts:
    """Find the text encoder and the VAE of a student, as paths from flags say or else beside its teacher, and load the VAE.

    Raises:
        UserError: one of them is missing or damaged, or belongs to another Wan.
    """
    from wandistiller.wan.vae import find_vae, load_vae

    vae_location = find_vae(vae_path, teacher_path)
    encoder = find_recorded_encoder(config, text_encoder_path, teacher_path)
    return DrawingParts(encoder, load_vae(vae_location, config.num_channels, config.vae_scale_factor, device))


def find_recorded_encoder(
    config: StudentConfig, text_encoder_path: str | None, teacher_path: str
) -> "TextEncoderFiles | None":
    """Find the text encoder and its tokenizer on disk; None stands for the mock teacher's embeddings.

    Raises:
        UserError: they are not there, or give embeddings of another width than the student takes.
    """
    from wandistiller.wan.text_encoder_files import find_text_encoder

    path, recorded = text_encoder_path, StudentRecord.of(config).text_encoder_path
    if path is None and recorded is not None:
        path = _found(recorded, "text encoder", "--text_encoder_path", is_hub_id(recorded))
    if path is None and teacher_path == "mock":
        return None
    encoder = find_text_encoder(path or teacher_path)
    encoder.check_text_dim(config.text_encoder_output_dim)
    return encoder


def embed_with_negative(
    prompts: "Sequence[str]",
    settings: "TeacherSettings",
    encoder: "TextEncoderFiles | None",
    config: StudentConfig,
    prompt_cache: str,
    device: str,
) -> "tuple[PromptEmbeds, Tensor | None]":
    """Return the text tokens of every prompt, and of the negative prompt where guidance needs it; see `embed_texts`."""
    from wandistiller.wan.text_encoder import embed_texts

    negative_prompts = [settings.negative_prompt] if settings.uses_guidance else []
    embeds = embed_texts([*prompts, *negative_prompts], encoder, config, prompt_cache, device)
    if embeds.truncated:
        print(f"Warning: {embeds.truncated} prompts are longer than {config.text_max_length} tokens and were cut")
    return embeds.first(len(prompts)), embeds.read(len(prompts)) if negative_prompts else None


def check_size(name: str, pixels: int, config: StudentConfig, patch_size: int) -> None:
    """Refuse a height or width that does not fill whole patches behind the VAE; the error begins with `name`."""
    unit = config.vae_scale_factor * patch_size
    if pixels % unit or pixels < unit:
        lower, upper = pixels // unit * unit, (pixels // unit + 1) * unit
        choices = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"{name} {pixels} is not a multiple of {unit} (VAE factor {config.vae_scale_factor} x patch size "
            f"{patch_size}); use {choices}"
        )
