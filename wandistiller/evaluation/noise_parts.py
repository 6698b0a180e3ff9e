"""Split what a student keeps of its teacher into what the prompt decides and what the noise decides.

For one prompt, K noises give K pictures: their mean is the prompt's part, and what each differs from it is the noise part.
A student that draws the mean of all that it could draw has a small error and no noise part, and one that draws any noise part
of the right size has the right diversity; an average over pictures shows neither. So both
parts get an error of their own, and the noise part is compared in size (norm ratio), in direction (cosine), and in how
much of the teacher's own part is found in it (gain = norm ratio x cosine).

With finite K the mean of K pictures still contains 1/K of the noise part. All sums here are unbiased: products of
deviations from the mean count K / (K - 1) times, and the mean's error is what then remains of the whole error. So the two
errors add in quadrature to `measures.endpoint_error`, and the mean's error may come out below zero, which counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

PARTS = ("mean_error", "noise_error", "teacher_noise", "norm_ratio", "cosine", "gain")
# A noise part is nothing but the rounding of float64, and has no direction, where its square is a smaller share of the other.
ROUNDING = 1e-24
MEANING = (
    "Over several noises of a prompt, the mean of its pictures is what the prompt decides and the rest is what the noise "
    "decides. A student that draws the mean of all it could draw has a gain of 0, one that follows its teacher has cosine and "
    "size 1. A noise error above the size of the teacher's noise part is worse than drawing the mean."
)


@dataclass(frozen=True)
class NoiseSums:
    """Sums over samples from which the parts are computed; those of disjoint prompts add up.

    Attributes:
        num_samples: prompts times noises.
        error: sum of |student - teacher|^2.
        student, teacher: sum of each one's noise part squared, without bias.
        cross: sum of the inner products of the two noise parts, without bias.
    """

    num_samples: int
    error: float
    student: float
    teacher: float
    cross: float

    def __add__(self, other: NoiseSums) -> NoiseSums:
        return NoiseSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


NOTHING = NoiseSums(0, 0.0, 0.0, 0.0, 0.0)


def noise_sums(student: Tensor, teacher: Tensor) -> NoiseSums:
    """Return the sums over latents (prompts, noises, ...) that both drew from the same noises, two or more of each prompt."""
    num_prompts, num_noises = student.shape[:2]
    if num_noises < 2:
        raise ValueError(f"{num_noises} noise of each prompt has no noise part; two or more are needed")
    student, teacher = student.double().flatten(2), teacher.double().flatten(2)
    unbiased = num_noises / (num_noises - 1)
    noise_student = student - student.mean(dim=1, keepdim=True)
    noise_teacher = teacher - teacher.mean(dim=1, keepdim=True)
    return NoiseSums(
        num_samples=num_prompts * num_noises,
        error=float((student - teacher).square().sum()),
        student=unbiased * float(noise_student.square().sum()),
        teacher=unbiased * float(noise_teacher.square().sum()),
        cross=unbiased * float((noise_student * noise_teacher).sum()),
    )


def noise_parts(sums: NoiseSums, spread: float) -> dict[str, float | None]:
    """Return the parts by name; None where no noise was compared, or the teacher's answer does not depend on the noise.

    Args:
        sums: what `noise_sums` counted.
        spread: the unit of the errors, the teacher's `measures.spread`.

    Returns:
        mean_error: the error of the prompt's part, relative to the spread.
        noise_error: the error of the noise part, relative to the spread.
        teacher_noise: the teacher's whole noise part, relative to the spread, which is the noise error of a student without one.
        norm_ratio: size of the student's noise part, as a share of the teacher's.
        cosine: between the two noise parts, over all samples together.
        gain: the student's noise part projected onto the teacher's, as a share of the latter.
    """
    if sums.num_samples == 0 or spread == 0:
        return dict.fromkeys(PARTS)
    noise_error = max(0.0, sums.student + sums.teacher - 2 * sums.cross)
    scale = math.sqrt(sums.num_samples) * spread
    ratio = math.sqrt(sums.student / sums.teacher) if sums.teacher > 0 else None
    has_direction = min(sums.student, sums.teacher) > ROUNDING * max(sums.student, sums.teacher)
    return {
        "mean_error": math.sqrt(max(0.0, sums.error - noise_error)) / scale,
        "noise_error": math.sqrt(noise_error) / scale,
        "teacher_noise": math.sqrt(sums.teacher) / scale,
        "norm_ratio": ratio,
        "cosine": sums.cross / math.sqrt(sums.student * sums.teacher) if has_direction else None,
        "gain": sums.cross / sums.teacher if sums.teacher > 0 else None,
    }


class NoiseByLevel:
    """The sums at every noise level of a sampler, over what both predict as x_0 from the same states.

    Samples come in batches of any size, in the order of their prompts; of each level only the noises of a prompt that is
    not complete yet are kept.

    Args:
        num_noises: samples of each prompt, one after the other.
    """

    def __init__(self, num_noises: int):
        self.num_noises = num_noises
        self.sums: dict[float, NoiseSums] = {}
        self._waiting: dict[float, tuple[Tensor, Tensor]] = {}

    def add(self, sigma: float, x_0_student: Tensor, x_0_teacher: Tensor) -> None:
        """Add the next samples (B, C, H, W) of a level."""
        student, teacher = x_0_student.cpu(), x_0_teacher.cpu()
        if sigma in self._waiting:
            waiting_student, waiting_teacher = self._waiting[sigma]
            student, teacher = torch.cat([waiting_student, student]), torch.cat([waiting_teacher, teacher])
        complete = len(student) // self.num_noises * self.num_noises
        if complete and self.num_noises > 1:
            grouped = (part[:complete].unflatten(0, (-1, self.num_noises)) for part in (student, teacher))
            self.sums[sigma] = self.sums.get(sigma, NOTHING) + noise_sums(*grouped)
        self._waiting[sigma] = student[complete:].clone(), teacher[complete:].clone()

    def by_sigma(self, spread: float, num_buckets: int) -> list[dict]:
        """Return the parts in equal buckets of sigma [0, 1]; sigma 1 counts to the last."""
        rows = []
        for bucket in range(num_buckets):
            inside = (s for sigma, s in self.sums.items() if min(int(sigma * num_buckets), num_buckets - 1) == bucket)
            sums = add_up(inside)
            limits = [round(bucket / num_buckets, 6), round((bucket + 1) / num_buckets, 6)]
            rows.append({"sigma": limits, **noise_parts(sums, spread), "count": sums.num_samples})
        return rows


def add_up(sums: Iterable[NoiseSums]) -> NoiseSums:
    """Return the sums of several groups of prompts, or of several noise levels, together."""
    return sum(sums, NOTHING)
