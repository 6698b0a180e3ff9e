"""The loss is what it is in closed form: weights over noise levels, and hidden states beside velocities.

pytest tests/training/test_objective.py
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wandistiller.sampling.flow import shift_sigma
from wandistiller.targets.answers import Answer
from wandistiller.training.feature_loss import FeatureLoss
from wandistiller.training.objective import SIGMA_WEIGHTINGS, Objective, sigma_weights
from wandistiller.wan.prompt_embeds import mock_prompt_embeds

EMBEDS = mock_prompt_embeds([f"prompt {number}" for number in range(5)], 6)
LEVELS = torch.linspace(0, 1, 100_001, dtype=torch.float64)


class Scale(nn.Module):
    """A student that answers `scale` times its latents, by way of two blocks with hidden states (B, L, C)."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.asked = []

    def forward(self, latents, timestep, prompt_embeds, prompt_lengths):
        self.asked.append((timestep, prompt_embeds, prompt_lengths))
        tokens = self.scale * latents.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.transpose(1, 2).unflatten(2, latents.shape[2:])


def make_answer(features: tuple[torch.Tensor, ...] = ()) -> Answer:
    generator = torch.Generator().manual_seed(0)
    latents, velocity = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    prompts = [4, 0, 2]
    prompt_embeds, prompt_lengths = EMBEDS.batch(prompts)
    return Answer(
        latents=latents,
        sigma=torch.tensor([0.1, 0.6, 1.0]),
        prompts=prompts,
        prompt_embeds=prompt_embeds,
        prompt_lengths=prompt_lengths,
        velocity=velocity,
        weights=torch.ones(3),
        features=features,
    )


# ---- weights over noise levels ----


@pytest.mark.parametrize("kind", SIGMA_WEIGHTINGS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_weights_are_one_on_average_over_the_levels_that_are_drawn(kind, shift):
    weights = sigma_weights(kind, shift_sigma(LEVELS, shift), shift)
    assert float(torch.trapezoid(weights, LEVELS)) == pytest.approx(1, abs=1e-4)
    assert weights.min() >= 0


def test_no_weighting_weighs_every_level_alike():
    assert torch.equal(sigma_weights("none", torch.tensor([0.0, 0.3, 1.0]), 5.0), torch.ones(3))


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_x0_weighs_by_sigma_squared(shift):
    weights = sigma_weights("x0", torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64), shift)
    assert_close(weights / weights[-1], torch.tensor([0, 1 / 16, 1 / 4, 1], dtype=torch.float64))
    if shift == 1:  # integral of sigma^2 from 0 to 1
        assert float(weights[-1]) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_endpoint_weighs_by_how_far_a_step_of_uniform_u_moves(shift):
    u = torch.linspace(0, 1, 21, dtype=torch.float64, requires_grad=True)
    sigma = shift_sigma(u, shift)
    (slope,) = torch.autograd.grad(sigma.sum(), u)
    assert_close(sigma_weights("endpoint", sigma.detach(), shift), slope)


# ---- the loss ----


@pytest.mark.parametrize("kind", SIGMA_WEIGHTINGS)
def test_the_loss_is_the_weighted_mean_of_the_samples_squared_errors(kind):
    student, answer = Scale(0.5), make_answer()
    loss = Objective(shift=3.0, sigma_weighting=kind)(student, answer, 0.3)
    squares = (0.5 * answer.latents - answer.velocity).square().mean(dim=(1, 2, 3))
    assert_close(loss.by_sample, squares)
    assert_close(loss.total.detach(), (sigma_weights(kind, answer.sigma, 3.0) * squares).mean())
    assert_close(loss.student_velocity, 0.5 * answer.latents)
    assert not loss.by_sample.requires_grad and not loss.student_velocity.requires_grad

    loss.total.backward()
    weights = sigma_weights(kind, answer.sigma, 3.0)[:, None, None, None]
    slope = (2 * weights * (0.5 * answer.latents - answer.velocity) * answer.latents).mean()
    assert_close(student.scale.grad, slope)


def test_the_student_is_asked_at_the_states_noise_levels_with_their_prompts():
    student = Scale(1.0)
    Objective(shift=3.0)(student, make_answer())
    ((timestep, prompt_embeds, lengths),) = student.asked
    assert_close(timestep, torch.tensor([100.0, 600.0, 1000.0]))
    expected_embeds, expected_lengths = EMBEDS.batch([4, 0, 2])
    assert torch.equal(prompt_embeds, expected_embeds) and torch.equal(lengths, expected_lengths)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_hidden_states_count_in_units_of_the_teachers_velocity_and_fade_along_a_line(progress):
    generator = torch.Generator().manual_seed(1)
    features = tuple(torch.randn(3, 4, 4, generator=generator) for _ in range(2))
    feature_loss = FeatureLoss(4, 6, 2, has_maps=False)
    student, answer = Scale(0.5), make_answer(features)
    objective = Objective(shift=3.0, feature_loss=feature_loss, feature_weight=0.8)
    loss = objective(student, answer, progress)

    tokens = 0.5 * answer.latents.flatten(2).transpose(1, 2)
    error = feature_loss([tokens, tokens], features)
    expected = (
        loss.by_sample.mean() + 0.8 * (1 - progress) * (answer.velocity.square().flatten(1).mean(dim=1) * error).mean()
    )
    assert_close(loss.total.detach(), expected)
    assert error.min() > 0.1 and not any(block._forward_hooks for block in student.blocks)


def test_a_replayed_answer_without_hidden_states_costs_its_velocity_error_alone():
    objective = Objective(shift=3.0, feature_loss=FeatureLoss(4, 6, 2, has_maps=True), feature_weight=0.8)
    loss = objective(Scale(0.5), make_answer())
    assert_close(loss.total.detach(), loss.by_sample.mean())


def test_a_relative_error_of_hidden_states_counts_as_much_as_one_of_the_velocity():
    answer = make_answer()
    answer = replace(answer, velocity=answer.latents, features=(answer.latents.flatten(2).mT,) * 2)
    feature_loss = FeatureLoss(4, 4, 2, has_maps=False)
    objective = Objective(shift=3.0, feature_loss=feature_loss, feature_weight=1.0)
    loss = objective(Scale(0.9), answer)  # a tenth off in both
    assert_close(loss.total.detach(), 2 * loss.by_sample.mean())
