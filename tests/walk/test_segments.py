"""Few-step students are taught the average velocity over a segment of the teacher's path.

The oracles are velocity fields whose flow is known in closed form.

pytest tests/walk/test_segments.py
"""

from itertools import pairwise

import pytest
import torch

from support.walks import EMBEDS, SHIFT, Field, ask, make_walk
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, flow_euler_scheduler, sample, wan_scheduler
from wandistiller.walk.grids import segment_sigmas


def targets(walk, num_calls: int, progress: float = 0.0) -> dict[str, torch.Tensor]:
    found = [answer for answer in ask(walk, num_calls, progress=progress) if answer]
    return {name: torch.cat([answer[name] for answer in found]) for name in found[0]}


def segment_ends(walk, sigma: torch.Tensor) -> torch.Tensor:
    """The next of the sampler's levels below each sigma."""
    return torch.stack([walk.ends[walk.ends < level - 1e-6].max() for level in sigma])


@pytest.mark.parametrize("num_segments", [1, 2, 4, 20])
def test_on_a_constant_field_every_target_is_that_constant(num_segments):
    found = targets(make_walk(Field(constant=0.7), num_segments=num_segments), 200)
    torch.testing.assert_close(found["velocity"], torch.full_like(found["velocity"], 0.7), atol=1e-4, rtol=0)
    starts = segment_sigmas(SHIFT, num_segments)[:-1].float()
    assert {round(level, 5) for level in found["sigma"].tolist()} == {round(level, 5) for level in starts.tolist()}


def test_targets_follow_the_exact_flow_to_second_order():
    # dx/dsigma = x: the flow from sigma to the segment's end multiplies by exp(end - sigma).
    walk = make_walk(Field(rate=1.0), num_segments=4)
    found = targets(walk, 600)
    length = (segment_ends(walk, found["sigma"]) - found["sigma"])[:, None, None, None]
    exact = found["latents"] * torch.expm1(length) / length
    error, eulers = (found["velocity"] - exact).norm() / exact.norm(), (found["latents"] - exact).norm() / exact.norm()
    # A single Euler step over the segment is what the target would be without the teacher's steps.
    assert error < 0.15 * eulers and error < 0.03


@pytest.mark.parametrize(
    "changes", [{}, {"levels": tuple(flow_euler_scheduler(SHIFT, 8).sigmas.tolist()), "num_steps": 8}]
)
def test_a_target_costs_the_teachers_steps_through_its_segment_and_every_slot_soon_has_one(changes):
    walk = make_walk(num_segments=4, **changes)
    first = {int(row) for answer in ask(walk, walk.calls_before_first) if answer for row in answer["rows"]}
    assert first == set(range(8))
    rest = [len(answer.get("rows", ())) for answer in ask(walk, 400, walk.calls_before_first)]
    assert sum(rest) / 8 / 400 == pytest.approx(1 / walk.options.steps_per_segment, rel=0.03)


def test_paths_go_on_from_where_the_students_own_step_lands():
    teacher, student = Field(constant=1.0), Field(constant=-2.0)
    walk = make_walk(teacher, student, num_segments=4, student_rollout=(1.0, 1.0))
    found = targets(walk, 300)
    # x - sigma is constant along the teacher's steps; over a whole segment the student moves by -2 (end - start).
    starts = {}
    for row, prompt, sigma, x in zip(*(found[name].tolist() for name in ("rows", "prompts", "sigma")), found["latents"][:, 0, 0, 0].tolist(), strict=True):  # fmt: skip
        starts.setdefault((row, prompt), []).append((sigma, x))
    steps = [(x2 - x1) / (s2 - s1) for path in starts.values() for (s1, x1), (s2, x2) in pairwise(path) if s2 < s1]
    assert len(steps) > 100 and sum(abs(step + 2) < 1e-3 for step in steps) / len(steps) > 0.95  # prompts come again
    assert all(min(abs(walk.ends - level)) < 1e-5 for _, sigma in student.asked for level in sigma)


def test_the_ends_of_a_few_step_teachers_segments_are_levels_of_its_own():
    levels = tuple(flow_euler_scheduler(SHIFT, 8).sigmas.tolist())
    teacher = Field(rate=0.5)
    found = targets(make_walk(teacher, num_segments=4, levels=levels, num_steps=8), 100)
    assert {*found["sigma"].tolist()} == {torch.tensor(level).item() for level in levels[:-1:2]}
    assert {level for _, sigma in teacher.asked for level in sigma.tolist()} <= {
        torch.tensor(level).item() for level in levels
    }
    # Two of Euler's steps, as its sampler takes them:
    by_level = dict(pairwise(levels))
    middle = [
        by_level[min(by_level, key=lambda known, level=level: abs(known - level))] for level in found["sigma"].tolist()
    ]
    ends = [by_level[level] for level in middle]
    start, middle, end = found["sigma"], torch.tensor(middle), torch.tensor(ends)
    factor = (1 + 0.5 * (middle - start)) * (1 + 0.5 * (end - middle))
    expected = found["latents"] * ((factor - 1) / (end - start))[:, None, None, None]
    torch.testing.assert_close(found["velocity"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_euler_sampler_takes_one_step_a_segment(steps):
    field, noise = Field(rate=0.8), seeded_noise([1, 2], (2, 1, 1))
    drawn = sample(
        field, noise, *EMBEDS.batch([0, 1]), SamplingOptions(shift=SHIFT, num_inference_steps=steps, sampler="euler")
    )
    latents = noise
    for start, end in pairwise(wan_scheduler(SHIFT, steps).sigmas):
        latents = latents + (end - start) * 0.8 * latents
    torch.testing.assert_close(drawn, latents, atol=1e-5, rtol=1e-4)
    assert len(field.asked) == steps
