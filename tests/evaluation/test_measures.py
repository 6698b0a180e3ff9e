"""The measures of evaluation/measures.py against closed forms and torch's own counts."""

import math

import numpy as np
import pytest
import torch

from support.measures import count_flops
from support.wan_folders import write_pipeline_folder
from wandistiller.evaluation import measures
from wandistiller.evaluation.cost import step_flops
from wandistiller.evaluation.experiment import Drawn, measure_prompts
from wandistiller.evaluation.judges import mean_verdict
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.settings import resolve_settings


def random_latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_neighbouring_prompts_share_their_noises():
    seeds = measures.noise_seeds(num_prompts=5, num_seeds=3, seed=100)
    assert seeds[:3] == seeds[3:6] == [100, 101, 102]
    assert seeds[6:9] == seeds[9:12] == [103, 104, 105]
    assert len(seeds) == 15 and len(set(seeds)) == 9


def test_relative_error_of_a_scaled_velocity():
    velocity = random_latents(3, 4, 5, 5)
    scales = torch.tensor([1.0, 1.25, -1.0])
    errors = measures.relative_errors(velocity * scales[:, None, None, None], velocity)
    torch.testing.assert_close(errors, torch.tensor([0.0, 0.25, 2.0]), atol=1e-6, rtol=1e-6)


def test_endpoint_error_is_0_for_equal_1_for_flat_colour_and_linear_between():
    reference = random_latents(4, 3, 6, 6) + torch.tensor([5.0, -2.0, 0.5])[:, None, None]
    flat = reference.mean(dim=(0, 2, 3), keepdim=True).expand_as(reference)
    assert measures.endpoint_error(reference, reference) == 0
    assert measures.endpoint_error(flat, reference) == pytest.approx(1)
    assert measures.endpoint_error(reference + 0.3 * (flat - reference), reference) == pytest.approx(0.3)


def test_a_verdict_is_counted_fact_by_fact():
    verdicts = [{"dark": value < 150, "correct": 0.0, "clip": value / 100} for value in (0, 100, 200)]
    assert mean_verdict(verdicts) == {"dark": pytest.approx(2 / 3), "correct": 0.0, "clip": 1.0}


def test_the_distances_of_the_prompts_make_up_the_distance_of_all():
    latents = [random_latents(6, 4, 3, 3, seed=seed) for seed in range(2)]
    right = [{"correct": float(prompt == "b")} for prompt in "aabbcc"]
    student, teacher = (Drawn(one, np.zeros((6, 8, 8, 3), np.uint8), right) for one in latents)
    rows = measure_prompts(student, teacher, 2)
    assert np.mean([row.distance**2 for row in rows]) == pytest.approx(measures.endpoint_error(*latents) ** 2)
    assert [row.right for row in rows] == [(0, 0), (1, 1), (0, 0)]
    assert [row.distance for row in measure_prompts(teacher, teacher, 2)] == [0, 0, 0]


@pytest.mark.parametrize("block", ["wan", "lite"])
def test_flops_of_a_picture_are_those_that_torch_counts(tmp_path, block):
    own = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_channels": 16, "image_size": 64}
    model = WanLiteStudent(StudentConfig(block=block, text_encoder_output_dim=20, **own)).eval()
    latents, prompt = torch.zeros(1, 16, 8, 8), (torch.zeros(1, 3, 20), torch.tensor([3]))
    write_pipeline_folder(tmp_path)
    settings = resolve_settings(open_wan_files(tmp_path), guidance_scale=3.0)
    field = Teacher({"high": model}, settings, torch.zeros(7, 20))
    counted = count_flops(lambda: field.velocity(latents, torch.ones(1), *prompt))
    assert step_flops(field, (8, 8), 3) == pytest.approx(counted, rel=0.01)


PROMPTS, NOISES, SHAPE = 400, 3, (4, 6, 6)


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the prompt decides (prompts, 1, C, H, W) and what the noise decides (prompts, noises, C, H, W) of a teacher."""
    return 2 * random_latents(PROMPTS, 1, *SHAPE, seed=seed), random_latents(PROMPTS, NOISES, *SHAPE, seed=seed + 1)


def parts_of(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, float]:
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    return measures.noise_parts(student, teacher, len(student) // PROMPTS)


def test_a_share_of_the_teachers_part_and_noise_of_its_own_give_the_known_numbers():
    """Student noise part = a x teacher's + b x independent: gain a, norm ratio sqrt(a^2 + b^2), cosine a / ratio."""
    mean, noise = drawn(seed=0)
    a, b, offset = 0.6, 0.3, 0.5
    own = random_latents(PROMPTS, NOISES, *SHAPE, seed=9)
    student = mean + offset * random_latents(PROMPTS, 1, *SHAPE, seed=8) + a * noise + b * own
    parts = parts_of(student, mean + noise)
    assert parts["gain"] == pytest.approx(a, abs=0.01)
    assert parts["norm_ratio"] == pytest.approx(math.hypot(a, b), abs=0.01)
    assert parts["cosine"] == pytest.approx(a / math.hypot(a, b), abs=0.01)


def test_a_picture_of_the_mean_alone_has_no_noise_part_and_an_equal_one_has_the_teachers():
    mean, noise = (part.double() for part in drawn(seed=11))
    parts = parts_of(mean.expand_as(noise), mean + noise)
    assert (
        parts["cosine"] is None
        and parts["norm_ratio"] == pytest.approx(0, abs=1e-9)
        and parts["gain"] == pytest.approx(0, abs=1e-9)
    )
    equal = parts_of(mean + noise, mean + noise)
    assert equal["norm_ratio"] == equal["cosine"] == equal["gain"] == pytest.approx(1)
    assert set(measures.noise_parts(noise[:, 0], noise[:, 0], 1).values()) == {None}, "of one noise nothing is known"
