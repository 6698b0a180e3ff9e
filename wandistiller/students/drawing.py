"""Drawing with a student or its teacher: how each is sampled, which sizes are allowed, what to be warned of, the pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from wandistiller.errors import UserError
from wandistiller.files.clone import DEMO_TEACHER, DEMO_WORLD
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.students.record import StudentRecord, trained_sizes

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from wandistiller.sampling.sampler import SamplingOptions
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import TeacherSettings
    from wandistiller.wan.text_encoder_files import TextEncoderFiles
    from wandistiller.wan.vae_2d import WanVae2D

# Beyond these a picture is a slip of the keyboard that fills the memory; a student may be trained at more.
MAX_PIXELS = 2048**2
# A student of the demo's world knows coloured shapes alone.
DEMO_PROMPT, ANY_PROMPT = "a large yellow circle on the left, on a white background", "a lighthouse in a storm"


def example_prompt(config: StudentConfig) -> str:
    """Return a prompt to show a student with; never one of its training prompts, which are its owner's."""
    record = StudentRecord.of(config)
    is_demo = record.world == DEMO_WORLD or record.teacher_path == f"./{DEMO_TEACHER}"
    return DEMO_PROMPT if is_demo else ANY_PROMPT


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
        levels=tuple(record.teacher_levels or ()),
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


def embed_with_negative(
    prompts: Sequence[str],
    settings: "TeacherSettings",
    encoder: "TextEncoderFiles | None",
    config: StudentConfig,
    prompt_cache: str,
    device: str,
) -> "tuple[PromptEmbeds, Tensor | None]":
    """Return the text tokens of every prompt, and of the negative prompt where guidance needs it; see `embed_texts`."""
    from wandistiller.wan.text_encoder import embed_texts
    from wandistiller.wan.wan_files import left_out

    if encoder and (line := left_out([encoder.umt5])):
        print(line)
    negative_prompts = [settings.negative_prompt] if settings.uses_guidance else []
    embeds = embed_texts([*prompts, *negative_prompts], encoder, config, prompt_cache, device)
    if embeds.num_full:
        print(f"Warning: {embeds.num_full} prompts take all {config.text_max_length} tokens; longer ones were cut")
    return embeds.part(0, len(prompts)), embeds.read(len(prompts)) if negative_prompts else None


def check_picture_size(
    size: tuple[int, int], config: StudentConfig, patch_size: int, names: tuple[str, str] = ("--height", "--width")
) -> None:
    """Refuse a height or width that does not fill whole patches of `patch_size` latent pixels, or is beyond any use.

    Args:
        names: what errors call the height and the width.
    """
    unit = config.vae_scale_factor * patch_size
    for name, pixels in zip(names, size, strict=True):
        if pixels % unit or pixels < unit:
            lower, upper = pixels // unit * unit, (pixels // unit + 1) * unit
            choices = f"{lower} or {upper}" if lower else f"{upper}"
            raise UserError(
                f"{name} {pixels} is not a multiple of {unit} (VAE factor {config.vae_scale_factor} x patch size {patch_size}); "
                f"use {choices}"
            )
    sizes = trained_sizes(config)
    most = max(MAX_PIXELS, 4 * max(own.pixels for own in sizes))
    if math.prod(size) > most:
        raise UserError(
            f"{names[0]} {size[0]} {names[1]} {size[1]}: is {math.prod(size):,} pixels; allowed: at most {most:,}, as of "
            f"{math.isqrt(most)} x {math.isqrt(most)} (this student was trained at {sizes_text(sizes)})"
        )


def sizes_text(sizes: Sequence[ImageSize]) -> str:
    """Return sizes in words."""
    *others, last = [f"{size.width} x {size.height}" for size in sizes]
    return f"{', '.join(others)} and {last}" if others else last


def untrained_warnings(config: StudentConfig, num_inference_steps: int, size: tuple[int, int]) -> list[str]:
    """Return a sentence for each of noise levels, steps and size that the student has not learnt and is asked for."""
    record, warnings = StudentRecord.of(config), []
    if levels := record.warning_of_untrained_levels():
        warnings.append(f"this student was {levels}")
    if record.student_steps not in (None, num_inference_steps):
        warnings.append(f"this student learnt to draw in {record.student_steps} steps, not in {num_inference_steps}")
    sizes, (height, width) = trained_sizes(config), size
    asked = ImageSize(width, height)
    # One that learnt several sizes draws those beside them too; one that learnt a single size knows no other.
    if not (any(map(asked.is_like, sizes)) if len(sizes) > 1 else asked in sizes):
        warnings.append(
            f"this student was trained at {sizes_text(sizes)} pixels alone, and is asked for {width} wide and {height} "
            "high; the picture may be broken"
        )
    return warnings


@dataclass(frozen=True)
class Artist:
    """Whoever draws: a student or teacher as a velocity field, how it is sampled, and the VAE that makes pictures of its latents.

    Attributes:
        settings: guidance, and the statistics of the latents.
    """

    field: "Teacher"
    options: "SamplingOptions"
    settings: "TeacherSettings"
    vae: "WanVae2D"

    def draw(
        self, embeds: "PromptEmbeds", indices: Sequence[int], seeds: Sequence[int], latent_shape: tuple[int, int, int]
    ) -> "np.ndarray":
        """Return pictures (B, H, W, 3) uint8 of the prompts at `indices`, each from the noise of its seed, drawn at once."""
        from wandistiller.sampling.flow import seeded_noise
        from wandistiller.sampling.sampler import sample_in_batches

        noise = seeded_noise(seeds, latent_shape)
        latents = sample_in_batches(self.field, noise, embeds, indices, self.options, len(noise))
        return self.vae.pictures(latents, self.settings.latents_mean, self.settings.latents_std)

    def metadata(self, model: str, student: str, size: tuple[int, int]) -> dict[str, object]:
        """Return what the metadata of every picture holds, beside its prompt and seed.

        Args:
            model: "student" or "teacher".
            student: folder of the student.
            size: height and width in pixels.
        """
        from wandistiller import __version__

        height, width = size
        values = {
            "model": model,
            "student": student,
            "num_inference_steps": self.options.num_inference_steps,
            "guidance_scale": self.settings.guidance_scale,
            "guidance_scale_2": self.settings.guidance_scale_2,
            "shift": self.options.shift,
            "height": height,
            "width": width,
            "Software": f"WanDistiller {__version__}",
        }
        return {name: value for name, value in values.items() if value is not None}
