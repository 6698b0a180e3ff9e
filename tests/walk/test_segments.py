"""Few-step students are taught the average velocity of a frozen student over a segment of its path.

The oracles are velocity fields whose flow is known in closed form.

pytest tests/walk/test_segments.py
"""

from itertools import pairwise

import pytest
import torch

from support.walks import EMBEDS, SHIFT, Field, ask, make_walk
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, flow_euler_scheduler, sample
from wandistiller.walk.grids import segment_grids
from wandistiller.walk.segments import SegmentTeacher


def average_velocities(field, grids: torch.Tensor, is_euler: bool = False) -> dict[str, torch.Tensor]:
    """States at the starts of all segments, the ends of these, and the answers there."""
    num_segments, teacher = len(grids), SegmentTeacher(field, grids, is_euler)
    latents, sigma = seeded_noise(range(num_segments), (2, 1, 1)), grids[:, 0]
    velocity, features = teacher.velocity_and_features(latents, sigma, *EMBEDS.batch([0] * num_segments))
    assert features == ()
    return {"latents": latents, "sigma": sigma, "ends": grids[:, -1], "velocity": velocity}


@pytest.mark.parametrize("num_segments", [1, 2, 4, 20])
def test_segments_are_the_steps_of_the_students_sampler_and_share_out_those_of_the_teacher(num_segments):
    field = Field(constant=0.7)
    found = average_velocities(field, segment_grids(20, num_segments, SHIFT))
    torch.testing.assert_close(found["velocity"], torch.full_like(found["velocity"], 0.7), atol=1e-5, rtol=0)
    levels = flow_euler_scheduler(SHIFT, num_segments).sigmas
    torch.testing.assert_close(found["sigma"], levels[:-1])
    torch.testing.assert_close(found["ends"], levels[1:], atol=1e-6, rtol=0)
    assert len(field.asked) == 20 // num_segments


@pytest.mark.parametrize("num_segments", [1, 4])
def test_answers_follow_the_exact_flow_to_second_order(num_segments):
    # dx/dsigma = x: the flow from sigma to the segment's end multiplies by exp(end - sigma).
    found = average_velocities(Field(rate=1.0), segment_grids(20, num_segments, SHIFT))
    length = (found["ends"] - found["sigma"])[:, None, None, None]
    exact = found["latents"] * torch.expm1(length) / length
    error, eulers = (found["velocity"] - exact).norm() / exact.norm(), (found["latents"] - exact).norm() / exact.norm()
    assert error < 0.15 * eulers and error < 0.03  # `eulers`: of a single step over the segment


def test_a_few_step_teachers_student_is_asked_at_its_levels_alone_and_takes_its_samplers_steps():
    levels, field = flow_euler_scheduler(SHIFT, 8).sigmas, Field(rate=0.5)
    found = average_velocities(field, segment_grids(8, 4, SHIFT, levels.tolist()), is_euler=True)
    torch.testing.assert_close(found["sigma"], levels[:-1:2])
    assert {level for _, sigma in field.asked for level in sigma.tolist()} == {*levels[:-1].tolist()}
    factor = (1 + 0.5 * (levels[1::2] - levels[:-1:2])) * (1 + 0.5 * (levels[2::2] - levels[1::2]))
    expected = found["latents"] * ((factor - 1) / (levels[2::2] - levels[:-1:2]))[:, None, None, None]
    torch.testing.assert_close(found["velocity"], expected, atol=1e-5, rtol=1e-4)


def test_a_walk_over_segments_meets_all_of_them_in_turn():
    grids = segment_grids(20, 4, SHIFT)
    levels = (*grids[:, 0].tolist(), 0.0)
    walk = make_walk(SegmentTeacher(Field(constant=1.0), grids), levels=levels, num_steps=4)
    answers = ask(walk, 100)
    counts = [sum(answer["sigma"].tolist().count(level) for answer in answers) for level in levels[:-1]]
    assert sum(counts) == 800 and min(counts) > 150


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_euler_sampler_takes_one_step_a_segment(steps):
    field, noise = Field(rate=0.8), seeded_noise([1, 2], (2, 1, 1))
    drawn = sample(
        field, noise, *EMBEDS.batch([0, 1]), SamplingOptions(shift=SHIFT, num_inference_steps=steps, sampler="euler")
    )
    latents = noise
    for start, end in pairwise(flow_euler_scheduler(SHIFT, steps).sigmas):
        latents = latents + (end - start) * 0.8 * latents
    torch.testing.assert_close(drawn, latents, atol=1e-5, rtol=1e-4)
    assert len(field.asked) == steps
