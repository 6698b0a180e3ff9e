"""What can be asked of a student: sizes that are allowed, and what to be warned of. Standard library only."""

import math

from wandistiller.errors import UserError
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.students.record import StudentRecord, trained_sizes

# Beyond these a picture is a slip of the keyboard that fills the memory; a student may be trained at more.
MAX_PIXELS = 2048**2


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
            f"{math.isqrt(most)} x {math.isqrt(most)} (this student was trained at {', '.join(map(str, sizes))})"
        )


def untrained_warnings(config: StudentConfig, num_inference_steps: int, size: tuple[int, int]) -> list[str]:
    """Return a sentence for each of noise levels, steps and size that the student has not learnt and is asked for."""
    record, warnings = StudentRecord.of(config), []
    if levels := record.warning_of_untrained_levels():
        warnings.append(f"this student was {levels}")
    if record.fixed_steps not in (None, num_inference_steps):
        warnings.append(f"this student learnt to draw in {record.fixed_steps} steps, not in {num_inference_steps}")
    sizes, (height, width) = trained_sizes(config), size
    asked = ImageSize(width, height)
    # One that learnt several sizes draws those beside them too; one that learnt a single size knows no other.
    if not (any(map(asked.is_like, sizes)) if len(sizes) > 1 else asked in sizes):
        warnings.append(
            f"this student was trained at {', '.join(map(str, sizes))} pixels alone, and is asked for {width} wide and {height} "
            "high; the picture may be broken"
        )
    return warnings
