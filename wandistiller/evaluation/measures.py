"""How close a student is to its teacher: pure functions of velocities and latents (B, C, H, W)."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from wandistiller.device import wait_for

NOISE_PARTS = ("norm_ratio", "cosine", "gain")
# A noise part is nothing but the rounding of float64, and has no direction, where its square is a smaller share of the other.
ROUNDING = 1e-24

# ---- samples ----


def noise_seeds(num_prompts: int, num_seeds: int, seed: int) -> list[int]:
    """Return the noise seed of every sample; the seeds of a prompt follow one another.

    Prompts 2k and 2k + 1 share their noises; other pairs have noises of their own, so that no single noise decides a result.
    """
    return [seed + prompt // 2 * num_seeds + sample for prompt in range(num_prompts) for sample in range(num_seeds)]


# ---- velocity ----


def relative_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return |actual - expected| / |expected| of each sample (B,)."""
    expected = expected.float().flatten(1)
    return (actual.float().flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)


# ---- endpoints ----


def spread(reference: Tensor) -> float:
    """Return sqrt(mean of |r - mean|^2 over samples), the unit of endpoint errors; mean is the per-channel mean of all r."""
    reference = reference.double()
    return float((reference - reference.mean(dim=(0, 2, 3), keepdim=True)).norm()) / len(reference) ** 0.5


def endpoint_error(latents: Tensor, reference: Tensor, unit: float | None = None) -> float:
    """Return sqrt(mean of |x - r|^2 over samples), relative to `unit`, by default the spread of the reference.

    It is 0 for equal latents, and 1 for latents as far off as flat colour is.
    """
    distance = float((latents.double() - reference.double()).norm()) / len(latents) ** 0.5
    return distance / (spread(reference) if unit is None else unit)


def noise_parts(student: Tensor, teacher: Tensor, num_noises: int) -> dict[str, float | None]:
    """Compare what the noise decides of a student's pictures with what it decides of the teacher's.

    The mean of a prompt's K samples is what the prompt decides, and what each sample differs from it is the noise part. A student
    that draws the mean of all that it could draw has a small endpoint error and no noise part, which no other measure shows.

    Args:
        student, teacher: latents (samples, C, H, W) that both drew from the same noises; the samples of a prompt follow one another.

    Returns:
        All None where there is one noise of each prompt, else:
        norm_ratio: size of the student's noise part, as a share of the teacher's.
        cosine: between the two noise parts, over all samples together.
        gain: the student's noise part projected onto the teacher's, as a share of the latter: norm_ratio times cosine.
    """
    if num_noises < 2:
        return dict.fromkeys(NOISE_PARTS)
    parts = (latents.double().flatten(1).unflatten(0, (-1, num_noises)) for latents in (student, teacher))
    ours, theirs = (part - part.mean(dim=1, keepdim=True) for part in parts)
    own, full, cross = (float((a * b).sum()) for a, b in ((ours, ours), (theirs, theirs), (ours, theirs)))
    has_direction = min(own, full) > ROUNDING * max(own, full)
    return {
        "norm_ratio": math.sqrt(own / full) if full else None,
        "cosine": cross / math.sqrt(own * full) if has_direction else None,
        "gain": cross / full if full else None,
    }


# ---- steps ----


def equal_steps(error: float, curve: dict[int, float]) -> tuple[float | None, bool]:
    """Return the number of steps at which a curve, by rising steps, comes to an error, and whether it never comes to it.

    Between measured steps log(error) is linear in log(steps), as an error that falls with a power of them is. A curve that rises
    once is taken as its smallest error so far.
    """
    if not curve or error > next(iter(curve.values())):
        return None, False
    steps, errors = list(curve), np.minimum.accumulate(list(curve.values()))
    if error < errors[-1]:
        return float(steps[-1]), True
    logs = -np.log(np.maximum(errors, 1e-12))
    return math.exp(np.interp(-math.log(max(error, 1e-12)), logs, np.log(steps))), False


# ---- time ----


@torch.inference_mode()
def median_seconds(calls: Mapping[str, Callable[[], object]], device: str, repeats: int = 11) -> dict[str, float]:
    """Return the median time of each call on `device`, after one call that warms up.

    The calls take turns, so that a busy spell of the machine slows all of them and not the ratio between two; this is why
    torch.utils.benchmark.Timer, which finishes one call before it begins the next, is not used.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            wait_for(device)
            start = time.perf_counter()
            call()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
