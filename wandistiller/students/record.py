"""What the `distillation` record of a student may hold, checked where a config is read as flags are where they are typed.

Standard library only. A record may lack any entry, and may hold more than is listed here; null stands for what is not known.
"""

import reprlib
from collections.abc import Mapping

from wandistiller.files.checked_json import (
    LORAS,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    RATIO,
    SAMPLER,
    SIGMA_RANGE,
    STEPS,
    TEXT,
    WHOLE,
    Kind,
    numbers,
)
from wandistiller.model.image_sizes import MAX_SIZES, is_size

# What a Wan and a student both say of themselves
SAMPLING_KINDS = {
    "shift": POSITIVE,
    "guidance_scale": NOT_NEGATIVE,
    "guidance_scale_2": NOT_NEGATIVE,
    "num_inference_steps": STEPS,
    "student_steps": STEPS,
    "teacher_sampler": SAMPLER,
    "sigma_range": SIGMA_RANGE,
    "negative_prompt": TEXT,
    "vae_scale_factor": WHOLE,
}


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_SIZES and all(map(is_size, value))


SIZES = Kind(f'a list of 1 to {MAX_SIZES} sizes such as "640x384", no side above 32768', _are_sizes)


# What drawing and exporting take from a student alone; what only a card shows may be anything
_KINDS = {
    **SAMPLING_KINDS,
    **dict.fromkeys(("teacher_path", "teacher_path_low", "text_encoder_path", "base_model"), PATH),
    "preset": TEXT,
    "world": TEXT,
    "boundary_ratio": RATIO,
    "teacher_loras": LORAS,
    "guidance_range": SIGMA_RANGE,
    "image_sizes": SIZES,
}


def wrong_entry(record: Mapping[str, object], num_channels: int) -> str | None:
    """Return what is wrong with the first entry of a record that cannot be, and what is allowed there; None where all can."""
    kinds = _KINDS | latents_kinds(num_channels)
    for name, kind in kinds.items():
        value = record.get(name)
        if value is not None and not kind.fits(value):
            return f"{name} is {reprlib.repr(value)}; allowed: {kind.allowed}"
    return None


def latents_kinds(num_channels: int) -> dict[str, Kind]:
    """Return the kinds of the statistics of the latents, a number for each channel."""
    return {"latents_mean": numbers(num_channels), "latents_std": numbers(num_channels, POSITIVE)}
