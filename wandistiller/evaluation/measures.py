"""How close a student is to its teacher: pure functions of velocities, latents (B, C, H, W) and pictures (B, H, W, 3) uint8."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from wandistiller.device import wait_for
from wandistiller.evaluation.noise_parts import NoiseByLevel
from wandistiller.model.sizes import guided_flops, num_image_tokens, transformer_flops
from wandistiller.sampling.sampler import VelocityField
from wandistiller.sampling.teacher import Teacher

Name = TypeVar("Name", bound=Hashable)

NUM_BUCKETS = 10
# PSNR is infinite for two equal pictures; unequal uint8 pictures rarely come near this value.
IDENTICAL_PSNR_DB = 100.0
# In cycles per pixel: frequencies above it are the upper half of what pixels can hold.
HIGH_FREQUENCY = 0.25

# ---- which samples ----


def sample_plan(num_prompts: int, num_seeds: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the prompt index and the noise seed of every sample; the seeds of a prompt follow one another.

    Prompts 2k and 2k + 1 share their noises, so that what differs between them is the prompt alone; other pairs have
    noises of their own, so that no single noise decides a result.
    """
    pairs = list(itertools.product(range(num_prompts), range(num_seeds)))
    return [prompt for prompt, _ in pairs], [seed + prompt // 2 * num_seeds + number for prompt, number in pairs]


# ---- velocity ----


def relative_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Return |actual - expected| / |expected| of each sample (B,), in float64."""
    expected = expected.double().flatten(1)
    return (actual.double().flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)


@dataclass(frozen=True)
class Recorded:
    """A velocity field that calls `note(velocity, latents, sigma, prompt_embeds, prompt_lengths)` for each state it answers."""

    field: VelocityField
    note: Callable[..., None]

    def velocity(self, *state: Tensor) -> Tensor:
        velocity = self.field.velocity(*state)
        self.note(velocity, *state)
        return velocity


class VelocityComparison:
    """A student's relative velocity errors at states that the teacher answers, and the noise part of what both predict as x_0.

    Args:
        num_seeds: samples of each prompt; they come one after another, as `sample_plan` puts them.
    """

    def __init__(self, student: VelocityField, num_seeds: int = 1):
        self.student, self.noise = student, NoiseByLevel(num_seeds)
        self._sigmas: list[Tensor] = []
        self._errors: list[Tensor] = []

    def note(self, velocity_teacher: Tensor, latents: Tensor, sigma: Tensor, *text: Tensor) -> None:
        """Ask the student at a state that the teacher has answered; a `Recorded` teacher calls this."""
        velocity_student = self.student.velocity(latents, sigma, *text)
        self._sigmas.append(sigma.cpu())
        self._errors.append(relative_errors(velocity_student, velocity_teacher).cpu())
        scale = sigma.to(latents.device).view(-1, 1, 1, 1)
        x_0_student, x_0_teacher = (latents - scale * v for v in (velocity_student, velocity_teacher))
        self.noise.add(float(sigma[0]), x_0_student, x_0_teacher)

    def results(self) -> dict:
        """Return the mean error over all states, and by noise level."""
        sigmas, errors = torch.cat(self._sigmas), torch.cat(self._errors)
        return {"mean": float(errors.mean()), "by_sigma": bucket_means(sigmas, errors)}


def bucket_means(sigmas: Tensor, values: Tensor, num_buckets: int = NUM_BUCKETS) -> list[dict]:
    """Return the mean of `values` (M,) in equal buckets of sigma in [0, 1].

    The last bucket includes sigma 1, and the mean of an empty bucket is None.
    """
    buckets = (sigmas * num_buckets).long().clamp(0, num_buckets - 1)
    rows = []
    for bucket in range(num_buckets):
        inside = values[buckets == bucket]
        mean = float(inside.mean()) if len(inside) else None
        limits = [round(bucket / num_buckets, 6), round((bucket + 1) / num_buckets, 6)]
        rows.append({"sigma": limits, "mean": mean, "count": len(inside)})
    return rows


# ---- endpoints ----


def spread(reference: Tensor) -> float:
    """Return sqrt(mean of |r - mean|^2 over samples), the unit of endpoint errors; mean is the per-channel mean of all r."""
    reference = reference.double()
    return float((reference - reference.mean(dim=(0, 2, 3), keepdim=True)).norm()) / len(reference) ** 0.5


def endpoint_error(latents: Tensor, reference: Tensor) -> float:
    """Return sqrt(sum |x - r|^2 / sum |r - mean|^2), where mean is the per-channel mean of all r.

    It is 0 for equal latents, and 1 for latents as far off as flat colour is.
    """
    latents, reference = latents.double(), reference.double()
    return float((latents - reference).norm()) / len(latents) ** 0.5 / spread(reference)


def psnr(pictures: np.ndarray, reference: np.ndarray) -> list[float]:
    """Return the peak signal-to-noise ratio in dB of each picture; equal ones count as IDENTICAL_PSNR_DB."""
    errors = [float(np.square(a.astype(np.float64) - b).mean()) for a, b in zip(pictures, reference, strict=True)]
    return [10 * math.log10(255**2 / error) if error else IDENTICAL_PSNR_DB for error in errors]


def ssim(pictures: np.ndarray, reference: np.ndarray) -> list[float]:
    """Return the structural similarity of each picture over RGB (Wang et al. 2004), in 7 x 7 windows as skimage's default."""
    return [_ssim(a, b) for a, b in zip(pictures, reference, strict=True)]


def _ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    x, y = (torch.from_numpy(p).double().permute(2, 0, 1) for p in (picture, reference))  # (3, H, W)

    def mean(values: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(values, 7, stride=1)

    unbiased = 49 / 48
    var_x, var_y = (unbiased * (mean(p * p) - mean(p) ** 2) for p in (x, y))
    covariance = unbiased * (mean(x * y) - mean(x) * mean(y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean(x) * mean(y) + c1) / (mean(x) ** 2 + mean(y) ** 2 + c1)
    return float((luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean())


# ---- what averages hide ----


def high_frequency_energy(pictures: np.ndarray, cutoff: float = HIGH_FREQUENCY) -> float:
    """Return the mean square of the luma (0..255) that lies above `cutoff` cycles per pixel; blur lowers it."""
    luma = pictures.astype(np.float64) @ np.array([0.299, 0.587, 0.114])  # (B, H, W), ITU-R BT.601
    height, width = luma.shape[1:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    power = np.abs(np.fft.fft2(luma)) ** 2 / (height * width) ** 2  # Parseval: sums to the mean square
    return float((power * (frequency > cutoff)).sum(axis=(1, 2)).mean())


def _mean_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    return statistics.fmean(float((a.double() - b.double()).norm()) for a, b in pairs) if pairs else None


def diversity(latents: Tensor) -> float | None:
    """Return the mean distance of two samples of one prompt, None with one seed; latents (prompts, seeds, C, H, W)."""
    return _mean_distance([pair for samples in latents for pair in itertools.combinations(samples, 2)])


def prompt_sensitivity(latents: Tensor) -> float | None:
    """Return the mean distance of two samples of one noise, None with one prompt; latents (prompts, seeds, C, H, W).

    `sample_plan` gives prompts 2k and 2k + 1 the same noises.
    """
    even, odd = latents[0::2], latents[1::2]
    return _mean_distance([pair for samples in zip(even, odd, strict=False) for pair in zip(*samples, strict=True)])


def ratio(value: float | None, reference: float | None) -> float | None:
    """Return value / reference; None where one of them was not measured, or the reference is 0."""
    return value / reference if value is not None and reference else None


# ---- the teacher at fewer steps, as a scale ----


def fewer_steps(num_inference_steps: int, student_steps: int | None = None) -> list[int]:
    """Return the step counts below the full one that are measured: a half, a quarter, 4, 2 and the student's own."""
    counts = {num_inference_steps // 2, num_inference_steps // 4, 4, 2, student_steps or 0}
    return sorted(count for count in counts if 1 <= count < num_inference_steps)


def steps_of_equal_error(error: float, errors_at_steps: Mapping[int, float]) -> tuple[int | None, int | None]:
    """Return (low, high): the teacher errs at least as much as `error` at `low` steps, and less from the next count `high` on.

    `low` is None where the teacher errs less at every count, `high` where it errs as much even at the largest.
    """
    low = max((steps for steps, theirs in errors_at_steps.items() if theirs >= error), default=None)
    high = min((steps for steps in errors_at_steps if low is None or steps > low), default=None)
    return low, high


# ---- cost ----


def picture_flops(field: Teacher, latent_size: int | tuple[int, int], num_tokens: int) -> tuple[int, int]:
    """Return the FLOPs of one forward pass and of one sampling step at sigma 1, for one picture.

    Guidance takes two passes, which share what is equal in both.

    Args:
        latent_size: side of the picture's latents, or their height and width.
        num_tokens: text tokens of the prompt.
    """
    config = field.experts["high"].config
    num_image = num_image_tokens(config, latent_size)
    forward = transformer_flops(config, num_image, num_tokens + 1)  # and the token that stands for the padding
    if field.settings.guidance_scale == 1.0:
        return forward, forward
    return forward, guided_flops(config, num_image, num_tokens + 1, len(field.negative_prompt_embeds) + 1)


@torch.inference_mode()
def median_seconds(calls: Mapping[Name, Callable[[], object]], device: str, repeats: int = 11) -> dict[Name, float]:
    """Return the median time of each call on `device`, after one call that warms up.

    The calls take turns, so that a busy spell of the machine slows all of them and not the ratio between two; this is why
    torch.utils.benchmark.Timer, which finishes one call before it begins the next, is not used.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            wait_for(device)
            start = time.perf_counter()
            call()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
