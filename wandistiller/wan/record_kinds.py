"""The values that a Wan and a student may record of how they are sampled, and of their latents. Standard library only."""

from wandistiller.files.json_files import NOT_NEGATIVE, NUMBER, POSITIVE, RATIO, STEPS, TEXT, WHOLE, Kind


def _is_range(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(RATIO.fits, value)) and value[0] < value[1]


SIGMA_RANGE = Kind("two numbers from 0 to 1, the lower first", _is_range)


def _are_levels(value: object) -> bool:
    if not isinstance(value, list | tuple) or not all(map(POSITIVE.fits, value)):
        return False
    return list(value[:1]) == [1000] and list(value) == sorted(set(value), reverse=True)


SAMPLER = Kind('"unipc", "euler" or "renoise"', lambda value: value in ("unipc", "euler", "renoise"))
LEVELS = Kind("falling numbers above 0, the first 1000", _are_levels)
SAMPLING_KINDS = {
    "shift": POSITIVE,
    "guidance_scale": NOT_NEGATIVE,
    "guidance_scale_2": NOT_NEGATIVE,
    "num_inference_steps": STEPS,
    "student_steps": STEPS,
    "teacher_sampler": SAMPLER,
    "teacher_levels": LEVELS,
    "sigma_range": SIGMA_RANGE,
    "negative_prompt": TEXT,
    "vae_scale_factor": WHOLE,
}


def latents_kinds(num_channels: int) -> dict[str, Kind]:
    """Return the kinds of the statistics of the latents: one number for each channel."""

    def numbers(each: Kind) -> Kind:
        return Kind(
            f"a list of {num_channels}, each {each.allowed}",
            lambda value: isinstance(value, list) and len(value) == num_channels and all(map(each.fits, value)),
        )

    return {"latents_mean": numbers(NUMBER), "latents_std": numbers(POSITIVE)}
