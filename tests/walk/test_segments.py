"""Few-step students are taught average velocities over segments of the teacher's paths and of those of a frozen student.

The oracles are velocity fields whose flow is known in closed form.
"""

from itertools import pairwise

import pytest
import torch

from support.walks import EMBEDS, SHIFT, Field, TowardsClean, ask, make_walk
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, sample, wan_scheduler
from wandistiller.walk.batches import Batches, Schedule
from wandistiller.walk.grids import segment_grids
from wandistiller.walk.segments import SegmentTeacher
from wandistiller.walk.store import Store


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
    levels = wan_scheduler(SHIFT, num_segments, "euler").sigmas
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
    levels, field = wan_scheduler(SHIFT, 8, "euler").sigmas, Field(rate=0.5)
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
    for start, end in pairwise(wan_scheduler(SHIFT, steps, "euler").sigmas):
        latents = latents + (end - start) * 0.8 * latents
    torch.testing.assert_close(drawn, latents, atol=1e-5, rtol=1e-4)
    assert len(field.asked) == steps


def passed_by(walk, num_calls: int) -> dict[str, torch.Tensor]:
    """All segments that the paths of a walk have passed."""
    found = []
    for call in range(num_calls):
        walk.ask(call, range(8))
        assert all(len(set(segment["rows"].tolist())) == len(segment["rows"]) for segment in walk.passed)
        found += walk.passed
    return {name: torch.cat([segment[name] for segment in found]) for name in found[0]}


def test_segments_end_between_the_states_of_a_path():
    # All paths lead straight to one clean sample: velocity = (x - clean) / sigma everywhere.
    clean, ends = torch.tensor([0.3, -2.0]).view(2, 1, 1), (*segment_grids(20, 4, SHIFT)[:, 0].tolist(), 0.0)
    found = passed_by(make_walk(TowardsClean(clean), segment_ends=ends), 150)
    expected = (found["latents"] - clean) / found["sigma"][:, None, None, None]
    torch.testing.assert_close(found["velocity"], expected, atol=1e-4, rtol=1e-4)
    counts = [int((found["sigma"] - level).abs().lt(1e-6).sum()) for level in ends[:-1]]
    # 8 slots have asked 150 times. A path takes 5 to 10 steps, and the first two of each slot begin with a jump.
    assert sum(counts) == len(found["sigma"]) and min(counts) > 100 and max(counts) < 8 * 150 / 5
    assert set(found["prompts"].tolist()) == set(range(10))


def test_segments_of_a_few_step_teacher_are_as_many_of_its_steps():
    levels = wan_scheduler(SHIFT, 8, "euler").sigmas.float()
    walk = make_walk(
        Field(rate=0.7), levels=tuple(levels.tolist()), num_steps=8, segment_ends=tuple(levels[::2].tolist())
    )
    found = passed_by(walk, 100)
    starts = (found["sigma"][:, None] - levels[:-1]).abs().argmin(dim=1)
    steps = levels.diff()
    factor = (1 + 0.7 * steps[starts]) * (1 + 0.7 * steps[starts + 1])
    length = levels[starts + 2] - levels[starts]
    expected = found["latents"] * ((factor - 1) / length)[:, None, None, None]
    torch.testing.assert_close(found["velocity"], expected, atol=1e-5, rtol=1e-4)
    assert set(starts.tolist()) == {0, 2, 4, 6}


def test_every_second_slot_learns_from_a_segment_where_it_has_one():
    walk = make_walk(Field(constant=1.0))
    segments, schedule = Store(4, range(8), 8, (3, 5)), Schedule(num_steps=6, replay=1)
    rows = torch.tensor([0, 1, 2])
    segments.add(
        {
            "latents": torch.zeros(3, 2, 1, 1),
            "sigma": torch.ones(3),
            "prompts": rows,
            "velocity": torch.full((3, 2, 1, 1), 9.0),
        }
        | {"rows": rows}
    )
    batches = Batches([(walk, Store(1, range(8), 8, (3, 0)))], [schedule], EMBEDS, 4, segments=[segments])
    for step in range(6):
        learnt = torch.cat([batch.velocity[:, 0, 0, 0] for batch in batches.of_step(step)])
        assert learnt.tolist() == [9.0 if row < 3 and (row + step) % 2 == 0 else 1.0 for row in range(8)]
