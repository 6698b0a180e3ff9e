"""Students of few steps are taught the average velocity over a segment, and drawn by the sampler that this is made for.

The oracles are velocity fields whose flow is known in closed form.

pytest tests/targets/test_segments.py
"""

from itertools import pairwise

import pytest
import torch

from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, sample, wan_scheduler
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.replay import ReplayedAnswers
from wandistiller.targets.segments import SegmentAnswers, SegmentOptions
from wandistiller.targets.state_batch import DrawOptions
from wandistiller.wan.prompt_embeds import mock_prompt_embeds

SHAPE = (2, 4, 4)
SHIFT = 3.0
EMBEDS = mock_prompt_embeds([f"prompt {number}" for number in range(10)], 6)


class Field:
    """A velocity field in closed form that notes what it was asked: v = rate x, or a constant."""

    def __init__(self, rate: float = 0.0, constant: float = 0.0):
        self.rate, self.constant = rate, constant
        self.asked = []

    def velocity(self, latents, sigma, prompt_embeds, prompt_lengths):
        self.asked.append((latents.clone(), sigma.clone()))
        return self.rate * latents + self.constant

    def __call__(self, latents, timestep, prompt_embeds, prompt_lengths):
        return self.velocity(latents, timestep / 1000, prompt_embeds, prompt_lengths)


def make_answers(teacher: Field, student: Field | None = None, **changes) -> SegmentAnswers:
    draw = DrawOptions(latent_shape=SHAPE, num_prompts=10, lanes=Lanes(8), shift=SHIFT, seed=3)
    values = {"num_segments": 4, "num_teacher_steps": 20, "student_rollout": (0.0, 0.0)}
    return SegmentAnswers(teacher, student or Field(), EMBEDS, draw, SegmentOptions(**values | changes))


def segment_end(answers: SegmentAnswers, sigma: torch.Tensor) -> torch.Tensor:
    """The next of the sampler's levels below each sigma."""
    ends = answers.segment_sigmas
    return torch.stack([ends[ends < level - 1e-6].max() for level in sigma])


@pytest.mark.parametrize("num_segments", [1, 2, 4, 20])
def test_on_a_constant_field_every_target_is_that_constant(num_segments):
    answers = make_answers(Field(constant=0.7), num_segments=num_segments)
    for _ in range(30):
        answer = answers.next()
        assert answer.latents.shape == answer.velocity.shape == (8, *SHAPE) and len(answer.prompts) == 8
        torch.testing.assert_close(answer.velocity, torch.full_like(answer.velocity, 0.7), atol=1e-4, rtol=0)


def test_targets_follow_the_exact_flow_to_second_order():
    # dx/dsigma = x: the flow from sigma to the segment's end multiplies by exp(end - sigma).
    answers, errors, eulers = make_answers(Field(rate=1.0)), [], []
    for _ in range(200):
        answer = answers.next()
        assert all((answers.segment_sigmas[:-1] - level).abs().min() == 0 for level in answer.sigma)
        ends = segment_end(answers, answer.sigma)
        length = (ends - answer.sigma)[:, None, None, None]
        exact = answer.latents * torch.expm1(length) / length
        errors.append((answer.velocity - exact).norm() / exact.norm())
        eulers.append((answer.latents - exact).norm() / exact.norm())
    # A single Euler step over the rest of the segment is what the target would be without the teacher's steps.
    assert sum(errors) < 0.15 * sum(eulers) and max(errors) < 0.03


def test_every_segment_is_taught_from_the_first_batches_on():
    answers, starts = make_answers(Field(constant=1.0)), set()
    for _ in range(12):
        answer = answers.next()
        starts |= {round(value, 4) for value in segment_end(answers, answer.sigma).tolist()}
    assert starts == {round(value, 4) for value in answers.segment_sigmas[1:].tolist()}


def test_a_target_costs_a_call_for_each_of_the_teachers_steps_and_replay_makes_it_cheaper():
    def calls_of(answers, steps):
        for _ in range(steps):
            answers.advance(answers.next(), torch.zeros(8, *SHAPE), 0.0)
        return answers.num_calls

    few, many = (calls_of(make_answers(Field(constant=1.0)), steps) for steps in (200, 500))
    assert (many - few) / 300 == pytest.approx(5.0, abs=0.3)
    replayed = ReplayedAnswers(make_answers(Field(constant=1.0)), EMBEDS, 4, num_steps=800)
    assert calls_of(replayed, 800) / 800 == pytest.approx(5 / 4, abs=0.1)


def test_paths_go_on_from_where_the_students_own_step_lands():
    teacher, student = Field(constant=1.0), Field(constant=-2.0)
    answers = make_answers(teacher, student, student_rollout=(1.0, 1.0))
    levels = answers.segment_sigmas
    for _ in range(60):
        answers.next()
    # The student is asked at starts of segments alone, and the teacher goes on from x + (end - start) (-2).
    landed = []
    for latents, sigma in student.asked:
        assert all((levels - level).abs().min() < 1e-5 for level in sigma)
        landed.append(latents - 2.0 * (segment_end(answers, sigma) - sigma)[:, None, None, None])
    landed = torch.cat(landed)
    late = [(x, level) for asked in teacher.asked[150:] for x, level in zip(*asked, strict=True)]  # paths have moved on
    starts = [x for x, level in late if (levels[1:-1] - level).abs().min() < 1e-5]
    assert len(starts) > 100
    assert all((landed - start).abs().amax(dim=(1, 2, 3)).min() < 1e-5 for start in starts)


def test_without_rollout_the_student_is_never_asked_and_with_half_of_it_half_the_paths_are_its_own():
    student = Field(constant=-2.0)
    answers = make_answers(Field(constant=1.0), student)
    for _ in range(60):
        answers.next()
    assert not student.asked
    answers = make_answers(Field(constant=1.0), student, student_rollout=(0.0, 1.0))
    answers.advance(answers.next(), torch.zeros(8, *SHAPE), 0.5)
    assert (answers.lots < 0.5).float().mean() == pytest.approx(0.5, abs=0.2)


def test_answers_go_on_bit_for_bit_from_a_saved_state(tmp_path):
    from safetensors.torch import load_file, save_file

    one, other = (make_answers(Field(rate=0.5), Field(rate=0.4), student_rollout=(0.5, 0.5)) for _ in range(2))
    for _ in range(23):
        one.advance(one.next(), torch.zeros(8, *SHAPE), 0.3)
    save_file(one.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for _ in range(40):
        first, second = one.next(), other.next()
        assert torch.equal(first.latents, second.latents) and torch.equal(first.velocity, second.velocity)
        assert torch.equal(first.sigma, second.sigma) and first.prompts == second.prompts
        one.advance(first, first.velocity, 0.6)
        other.advance(second, second.velocity, 0.6)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_euler_sampler_takes_one_step_a_segment(steps):
    field, noise = Field(rate=0.8), seeded_noise([1, 2], SHAPE)
    options = SamplingOptions(shift=SHIFT, num_inference_steps=steps, sampler="euler")
    drawn = sample(field, noise, *EMBEDS.batch([0, 1]), options)
    sigmas, latents = wan_scheduler(SHIFT, steps).sigmas, noise
    for start, end in pairwise(sigmas):
        latents = latents + (end - start) * 0.8 * latents
    torch.testing.assert_close(drawn, latents, atol=1e-5, rtol=1e-4)
    assert len(field.asked) == steps and sigmas[-1] == 0
