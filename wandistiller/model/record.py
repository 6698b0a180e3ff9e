"""What the `distillation` record of a student may hold, checked where a config is read as flags are where they are typed.

Standard library only. A record may lack any entry, and may hold more than is listed here; null stands for what is not known.
"""

import reprlib
from collections.abc import Mapping

from wandistiller.files.checked_json import (
    COUNT,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    RATIO,
    SIGMA_RANGE,
    STEPS,
    TEXT,
    WHOLE,
    Kind,
    numbers,
)

# What a Wan and a student both say of themselves
SAMPLING_KINDS = {
    "shift": POSITIVE,
    "guidance_scale": NOT_NEGATIVE,
    "guidance_scale_2": NOT_NEGATIVE,
    "num_inference_steps": STEPS,
    "student_steps": STEPS,
    "sigma_range": SIGMA_RANGE,
    "negative_prompt": TEXT,
    "vae_scale_factor": WHOLE,
}


def _is_command(value: object) -> bool:
    return (
        isinstance(value, dict)
        and COUNT.fits(value.get("from_step"))
        and POSITIVE.fits(value.get("lr"))
        and TEXT.fits(value.get("command"))
    )


_LAYERS = Kind("a list of whole numbers", lambda value: isinstance(value, list) and all(map(COUNT.fits, value)))
_COMMANDS = Kind(
    'a list of {"from_step": ..., "lr": ..., "command": ...}',
    lambda value: isinstance(value, list) and all(map(_is_command, value)),
)
_KINDS = {
    **SAMPLING_KINDS,
    **dict.fromkeys(("teacher_path", "teacher_path_low", "text_encoder_path", "base_model"), PATH),
    **dict.fromkeys(("preset", "init", "states", "world"), TEXT),
    **dict.fromkeys(("num_prompts", "num_train_steps", "num_teacher_batches", "batch_size"), COUNT),
    "boundary_ratio": RATIO,
    "layers": _LAYERS,
    "commands": _COMMANDS,
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
