"""How close a student is to its teacher: pure functions of velocities and latents (B, C, H, W)."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from wandistiller.device import wait_for

NOISE_PARTS = ("mean_error", "noise_error", "teacher_noise", "norm_ratio", "cosine", "gain")
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


def noise_parts(student: Tensor, teacher: Tensor, num_noises: int, unit: float) -> dict[str, float | None]:
    """Split what a student keeps of its teacher into what the prompt decides and what the noise decides.

    The mean of a prompt's K samples is the prompt's part, and what each sample differs from it is the noise part. A student that
    draws the mean of all that it could draw has a small endpoint error and no noise part, which no other measure shows.

    The mean of K samples still contains 1/K of the noise part. So products of deviations from it count K / (K - 1) times, and
    the mean's error is what remains of the whole error: the two errors add in quadrature to `endpoint_error`, and a mean error
    that comes out below zero counts as zero.

    Args:
        student, teacher: latents (samples, C, H, W) that both drew from the same noises; the samples of a prompt follow one another.
        unit: of the errors, the teacher's `spread`.

    Returns:
        All None where there is one noise of each prompt, else:
        mean_error: the error of the prompt's part.
        noise_error: the error of the noise part.
        teacher_noise: the teacher's whole noise part, which is the noise error of a student without one.
        norm_ratio: size of the student's noise part, as a share of the teacher's.
        cosine: between the two noise parts, over all samples together.
        gain: the student's noise part projected onto the teacher's, as a share of the latter: norm_ratio times cosine.
    """
    if num_noises < 2 or unit == 0:
        return dict.fromkeys(NOISE_PARTS)
    student, teacher = (part.double().flatten(1).unflatten(0, (-1, num_noises)) for part in (student, teacher))
    of_student, of_teacher = (part - part.mean(dim=1, keepdim=True) for part in (student, teacher))
    unbiased = num_noises / (num_noises - 1)
    own, theirs, cross = (
        unbiased * float((a * b).sum())
        for a, b in ((of_student, of_student), (of_teacher, of_teacher), (of_student, of_teacher))
    )
    noise_error = max(0.0, own + theirs - 2 * cross)
    mean_error = max(0.0, float((student - teacher).square().sum()) - noise_error)
    scale = math.sqrt(len(student) * num_noises) * unit
    has_direction = min(own, theirs) > ROUNDING * max(own, theirs)
    return {
        "mean_error": math.sqrt(mean_error) / scale,
        "noise_error": math.sqrt(noise_error) / scale,
        "teacher_noise": math.sqrt(theirs) / scale,
        "norm_ratio": math.sqrt(own / theirs) if theirs else None,
        "cosine": cross / math.sqrt(own * theirs) if has_direction else None,
        "gain": cross / theirs if theirs else None,
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
