"""How one prompt after another is drawn, for every command that draws: which sizes are allowed, what to be warned of, the pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wandistiller.errors import UserError
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.sampling.recorded import StudentRecord, check_size, trained_sizes

if TYPE_CHECKING:
    import numpy as np
    from diffusers import AutoencoderKLWan

    from wandistiller.sampling.sampler import SamplingOptions, VelocityField
    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import TeacherSettings

# Beyond these a picture is a slip of the keyboard that fills the memory; a student may be trained at more.
MAX_PIXELS = 2048**2


def check_picture_size(
    size: tuple[int, int], config: StudentConfig, patch_size: int, names: tuple[str, str] = ("--height", "--width")
) -> None:
    """Refuse a height or width that does not fill whole patches of `patch_size` latent pixels, or is beyond any use.

    Args:
        names: what errors call the height and the width.
    """
    for name, pixels in zip(names, size, strict=True):
        check_size(name, pixels, config, patch_size)
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


@dataclass(frozen=True, kw_only=True)
class Artist:
    """Whoever draws: a velocity field, how it is sampled, and the VAE that makes pictures of its latents.

    Attributes:
        settings: guidance, and the statistics of the latents.
    """

    field: "VelocityField"
    options: "SamplingOptions"
    settings: "TeacherSettings"
    vae: "AutoencoderKLWan"

    def draw(
        self, embeds: "PromptEmbeds", indices: Sequence[int], seeds: Sequence[int], latent_shape: tuple[int, int, int]
    ) -> "np.ndarray":
        """Return pictures (B, H, W, 3) uint8 of the prompts at `indices`, each from the noise of its seed, drawn at once."""
        from wandistiller.sampling.flow import seeded_noise
        from wandistiller.sampling.sampler import sample_in_batches
        from wandistiller.wan.vae import decode

        noise = seeded_noise(seeds, latent_shape)
        latents = sample_in_batches(self.field, noise, embeds, indices, self.options, len(noise))
        return decode(self.vae, latents, self.settings.latents_mean, self.settings.latents_std)

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
