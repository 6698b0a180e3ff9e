"""A teacher that was distilled to few steps is asked at the noise levels of these alone, and its paths are its sampler's.

The oracle of a path is diffusers' FlowMatchEulerDiscreteScheduler; that of a share of guided states is what states draw.

pytest tests/targets/test_few_levels.py
"""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from support.states import SHIFT, check_goes_on_from_a_saved_state, make_noise, make_pool, make_renoised, step_of_states
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, sample
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.prompt_order import PromptSwap
from wandistiller.targets.segments import SegmentAnswers, SegmentOptions
from wandistiller.targets.state_batch import DrawOptions
from wandistiller.targets.states import teacher_levels
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.settings import TeacherSettings

SHAPE = (2, 4, 4)
EMBEDS = mock_prompt_embeds([f"prompt {number}" for number in range(10)], 6)


def settings_of(num_steps: int = 4, shift: float = SHIFT, **changes) -> TeacherSettings:
    values = {"teacher_sampler": "euler"} | changes
    return TeacherSettings("test", shift, num_steps, 3.0, None, None, "", None, None, 8, **values)


def diffusers_scheduler(num_steps: int, shift: float = SHIFT) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    return scheduler


def diffusers_path(noise: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
    """The states of FIELD's path from each noise (B, C, H, W), the noise first."""
    scheduler, states = diffusers_scheduler(num_steps), [noise]
    for timestep in scheduler.timesteps:
        velocity = field(states[-1], timestep.expand(len(noise)) / 1000)
        states.append(scheduler.step(velocity, timestep, states[-1], return_dict=False)[0])
    return states


def field(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A velocity that depends on state and noise level, so that every other path ends elsewhere."""
    return torch.sin(3 * latents) + latents * sigma[:, None, None, None] ** 2


class Field:
    def __init__(self):
        self.asked: list[float] = []

    def velocity(self, latents, sigma, prompt_embeds, prompt_lengths):
        self.asked += sigma.tolist()
        return field(latents, sigma.float())

    def __call__(self, latents, timestep, prompt_embeds, prompt_lengths):
        return field(latents, timestep / 1000)


def test_the_levels_of_four_steps_at_shift_five_are_those_of_step_distilled_wans():
    levels = teacher_levels(settings_of(4, 5.0))
    assert levels == pytest.approx((1.0, 0.9375, 5 / 6, 0.625, 0.0), abs=1e-7)
    assert levels == pytest.approx(diffusers_scheduler(4, 5.0).sigmas.tolist(), abs=1e-7)
    assert teacher_levels(settings_of(4, teacher_sampler="unipc")) is None


@pytest.mark.parametrize("num_steps", [1, 2, 4, 7])
def test_every_path_is_that_of_diffusers_euler_scheduler(num_steps):
    finished, starts, paths = [], {}, {}
    pool = make_pool(
        lambda latents, _prompt, _lane: finished.append(latents.clone()),
        latent_shape=SHAPE,
        levels=teacher_levels(settings_of(num_steps)),
        num_steps=num_steps,
    )
    for _ in range(60):
        batch = pool.draw()
        for row, slot in enumerate(batch.slots):
            if batch.sigma[row] == 1:
                starts[slot] = batch.latents[row].clone()
                paths[slot] = [state[0] for state in diffusers_path(starts[slot][None], num_steps)]
            step = pool.positions[slot]
            torch.testing.assert_close(batch.latents[row], paths[slot][step], atol=1e-5, rtol=1e-5)
        ends = [paths[slot][-1] for slot in batch.slots]
        num_before = len(finished)
        pool.advance(batch, field(batch.latents, batch.sigma))
        for latents in finished[num_before:]:
            assert any(torch.allclose(latents, end, atol=1e-5) for end in ends)
    assert len(finished) > 60 * 8 / num_steps - 64


@pytest.mark.parametrize("make", [make_pool, make_noise, lambda **options: make_renoised(0.5, **options)])
def test_states_lie_at_the_levels_alone_and_at_all_of_them_as_often(make):
    levels = teacher_levels(settings_of(4))
    states, seen = make(levels=levels), []
    for _ in range(160):
        batch = states.draw()
        seen += batch.sigma.tolist()
        states.advance(batch, batch.latents)
    shares = [seen.count(level) / len(seen) for level in levels[:-1]]
    assert sum(shares) == 1 and shares == pytest.approx([0.25] * 4, abs=0.06)


@pytest.mark.parametrize("make", [make_pool, make_noise, lambda **options: make_renoised(0.5, **options)])
def test_states_of_few_levels_go_on_from_a_saved_state(make):
    levels = teacher_levels(settings_of(3))

    def of(seed: int):
        return make(seed=seed, levels=levels, swap=PromptSwap(0.3, 15))

    check_goes_on_from_a_saved_state(of, step_of_states, 25)


def test_a_range_of_noise_levels_ends_the_paths_below_its_last_level():
    pool, seen = make_pool(levels=teacher_levels(settings_of(4)), sigma_range=(0.7, 1.0)), set()
    for _ in range(60):
        batch = pool.draw()
        seen |= {round(level, 4) for level in batch.sigma.tolist()}
        pool.advance(batch, batch.latents)
    assert seen == {1.0, 0.9, 0.75}


# ---- segments ----


def segments_of(num_segments: int, num_steps: int = 4) -> tuple[SegmentAnswers, Field]:
    teacher = Field()
    draw = DrawOptions(
        latent_shape=SHAPE, num_prompts=10, lanes=Lanes(8), shift=SHIFT, levels=teacher_levels(settings_of(num_steps))
    )
    options = SegmentOptions(num_segments=num_segments, num_teacher_steps=num_steps, student_rollout=(0.0, 0.0))
    return SegmentAnswers(teacher, teacher, EMBEDS, draw, options), teacher


@pytest.mark.parametrize("num_segments", [1, 2, 4])
def test_segments_are_walked_in_the_teachers_own_steps(num_segments):
    answers, teacher = segments_of(num_segments)
    size, ends = 4 // num_segments, diffusers_scheduler(4).sigmas
    for _ in range(40):
        answer = answers.next()
        for row, sigma in enumerate(answer.sigma.tolist()):
            start = int((ends - sigma).abs().argmin())
            assert start % size == 0 and ends[start] == pytest.approx(sigma, abs=1e-7)
            latents = answer.latents[row : row + 1]
            for step in range(start, start + size):
                latents = latents + (ends[step + 1] - ends[step]) * field(latents, ends[step : step + 1])
            expected = (latents - answer.latents[row : row + 1]) / (ends[start + size] - ends[start])
            torch.testing.assert_close(answer.velocity[row], expected[0], atol=1e-4, rtol=1e-4)
    assert set(teacher.asked) <= {float(level) for level in ends[:-1]}
    assert answers.num_calls >= 40 * size  # nothing is asked beside the steps of segments


@pytest.mark.parametrize("num_steps", [1, 3, 4, 8])
def test_whoever_draws_takes_the_steps_of_diffusers_scheduler(num_steps):
    teacher, noise = Field(), seeded_noise([1, 2], SHAPE)
    options = SamplingOptions(shift=SHIFT, num_inference_steps=num_steps, sampler="flow_euler")
    drawn = sample(teacher, noise, *EMBEDS.batch([0, 1]), options)
    torch.testing.assert_close(drawn, diffusers_path(noise, num_steps)[-1], atol=1e-5, rtol=1e-5)
    assert len(teacher.asked) == 2 * num_steps
