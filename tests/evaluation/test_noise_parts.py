"""The prompt's part and the noise part of pictures, against closed forms.

pytest tests/evaluation/test_noise_parts.py
"""

import math

import pytest
import torch
from torch import Tensor

from wandistiller.evaluation import measures
from wandistiller.evaluation.noise_parts import NOTHING, PARTS, NoiseByLevel, add_up, noise_parts, noise_sums
from wandistiller.sampling.flow import seeded_noise

PROMPTS, NOISES, SHAPE = 400, 3, (4, 6, 6)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """What the prompt decides (prompts, 1, C, H, W) and what the noise decides (prompts, noises, C, H, W) of a teacher."""
    return 2 * randn(PROMPTS, 1, *SHAPE, seed=seed), randn(PROMPTS, NOISES, *SHAPE, seed=seed + 1)


def parts_of(student: Tensor, teacher: Tensor) -> dict[str, float]:
    return noise_parts(noise_sums(student, teacher), measures.spread(teacher.flatten(0, 1)))


def test_a_share_of_the_teachers_part_and_noise_of_its_own_give_the_known_numbers():
    """Student noise part = a x teacher's + b x independent: gain a, norm ratio sqrt(a^2 + b^2), cosine a / ratio."""
    mean, noise = drawn(seed=0)
    a, b, offset = 0.6, 0.3, 0.5
    own = randn(PROMPTS, NOISES, *SHAPE, seed=9)
    student = mean + offset * randn(PROMPTS, 1, *SHAPE, seed=8) + a * noise + b * own
    parts = parts_of(student, mean + noise)
    total = math.sqrt(5)  # the teacher's variances, 4 of the prompts and 1 of the noises
    assert parts["gain"] == pytest.approx(a, abs=0.01)
    assert parts["norm_ratio"] == pytest.approx(math.hypot(a, b), abs=0.01)
    assert parts["cosine"] == pytest.approx(a / math.hypot(a, b), abs=0.01)
    assert parts["noise_error"] == pytest.approx(math.hypot(1 - a, b) / total, rel=0.02)
    assert parts["teacher_noise"] == pytest.approx(1 / total, rel=0.02)
    assert parts["mean_error"] == pytest.approx(offset / total, rel=0.03)


def test_both_errors_add_up_to_the_endpoint_error_in_quadrature():
    mean, noise = drawn(seed=2)
    teacher = mean + noise
    student = 1.1 * mean + 0.7 * noise + 0.2 * randn(PROMPTS, NOISES, *SHAPE, seed=4)
    parts = parts_of(student, teacher)
    whole = measures.endpoint_error(student.flatten(0, 1), teacher.flatten(0, 1))
    assert math.hypot(parts["mean_error"], parts["noise_error"]) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("scale", [0.2, 0.5, 2.0])
def test_shrinking_changes_the_norm_ratio_and_not_the_cosine(scale: float):
    mean, noise = drawn(seed=5)
    own = randn(PROMPTS, NOISES, *SHAPE, seed=6)
    follows, shrunk = (parts_of(mean + s * (noise + own), mean + noise) for s in (1.0, scale))
    assert shrunk["cosine"] == pytest.approx(follows["cosine"], abs=1e-9)
    assert shrunk["norm_ratio"] == pytest.approx(scale * follows["norm_ratio"], rel=1e-9)
    assert shrunk["gain"] == pytest.approx(shrunk["norm_ratio"] * shrunk["cosine"], rel=1e-9)


def test_the_mean_of_few_noises_is_not_blamed_for_their_noise():
    """With two noises half of the noise part's variance is in their mean; the error of the prompt's part is nothing yet."""
    mean, noise = drawn(seed=7)
    teacher, student = mean + noise, mean + randn(PROMPTS, NOISES, *SHAPE, seed=18)
    few = parts_of(student[:, :2], teacher[:, :2])
    biased = float((student[:, :2] - teacher[:, :2]).mean(1).norm()) / math.sqrt(PROMPTS)
    assert biased / measures.spread(teacher[:, :2].flatten(0, 1)) > 0.4
    assert few["mean_error"] < 0.06
    assert few["noise_error"] == pytest.approx(math.sqrt(2 / 5), rel=0.02)
    assert few["norm_ratio"] == pytest.approx(1, abs=0.02) and abs(few["cosine"]) < 0.02


def test_a_picture_of_the_mean_alone_errs_by_the_teachers_whole_noise_part():
    mean, noise = drawn(seed=11)
    parts = parts_of(mean.expand_as(noise), mean + noise)
    assert parts["noise_error"] == parts["teacher_noise"] > 0
    assert parts["norm_ratio"] == pytest.approx(0, abs=1e-9) and parts["gain"] == pytest.approx(0, abs=1e-9)
    assert parts["cosine"] is None


def test_equal_pictures_are_perfect_and_nothing_to_compare_is_none():
    mean, noise = drawn(seed=12)
    parts = parts_of(mean + noise, mean + noise)
    assert parts["mean_error"] == parts["noise_error"] == 0
    assert parts["norm_ratio"] == parts["cosine"] == parts["gain"] == pytest.approx(1)
    assert noise_parts(NOTHING, 1.0) == dict.fromkeys(PARTS)
    with pytest.raises(ValueError, match="two or more"):
        noise_sums(noise[:, :1], noise[:, :1])


def test_sums_of_disjoint_prompts_add_up():
    mean, noise = drawn(seed=13)
    teacher, student = mean + noise, mean + 0.5 * noise
    halves = [noise_sums(student[part], teacher[part]) for part in (slice(0, 100), slice(100, None))]
    whole = noise_parts(noise_sums(student, teacher), 1.0)
    assert noise_parts(add_up(halves), 1.0) == pytest.approx(whole)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_levels_do_not_depend_on_the_batches_samples_come_in(batch: int):
    mean, noise = drawn(seed=14)
    teacher, student = (mean + noise)[:6].flatten(0, 1), (mean + 0.5 * noise)[:6].flatten(0, 1)
    levels = NoiseByLevel(NOISES)
    for start in range(0, len(teacher), batch):  # as a sampler goes: all levels of a batch, then the next batch
        for sigma, scale in ((1.0, 1.0), (0.45, 2.0), (0.42, 1.0)):
            levels.add(sigma, scale * student[start : start + batch], teacher[start : start + batch])
    rows = levels.by_sigma(spread=1.0, num_buckets=10)
    assert [row["count"] for row in rows] == [0, 0, 0, 0, 36, 0, 0, 0, 0, 18]
    assert rows[9]["gain"] == pytest.approx(0.5) and rows[9]["cosine"] == pytest.approx(1)
    assert rows[4]["gain"] == pytest.approx(0.75) and rows[4]["sigma"] == [0.4, 0.5]
    assert rows[0]["gain"] is None


def test_one_noise_of_each_prompt_has_no_levels():
    levels = NoiseByLevel(1)
    levels.add(0.5, randn(4, *SHAPE, seed=0), randn(4, *SHAPE, seed=1))
    assert {row["count"] for row in levels.by_sigma(1.0, 10)} == {0}


class Field:
    """A velocity field that predicts the given x_0 from any state."""

    def __init__(self, x_0: Tensor):
        self.x_0 = x_0

    def velocity(self, latents, sigma, prompt_embeds, prompt_lengths):
        return (latents - self.x_0) / sigma.view(-1, 1, 1, 1)


def test_recorded_velocities_are_split_as_predictions_of_x_0():
    mean, noise = (part[:5].float() for part in drawn(seed=15))
    teacher, student = (mean + noise).flatten(0, 1), (mean + 0.25 * noise).flatten(0, 1)
    comparison = measures.VelocityComparison(Field(student), num_seeds=NOISES)
    recorded = measures.Recorded(Field(teacher), comparison.note)
    recorded.velocity(seeded_noise(range(15), SHAPE), torch.full((15,), 0.75), None, None)
    row = comparison.noise.by_sigma(spread=1.0, num_buckets=10)[7]
    assert row["count"] == 15
    assert row["gain"] == pytest.approx(0.25, rel=1e-4) and row["cosine"] == pytest.approx(1, rel=1e-4)
