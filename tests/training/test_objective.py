"""The loss is what it is in closed form: squared errors of velocities, and hidden states beside them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from wandistiller.training.objective import FeatureLoss, Objective
from wandistiller.walk.batches import Batch
from wandistiller.wan.prompt_embeds import mock_prompt_embeds

EMBEDS = mock_prompt_embeds([f"prompt {number}" for number in range(5)], 6)


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


def make_batch(features: tuple[torch.Tensor, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, velocity = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    prompts = [4, 0, 2]
    prompt_embeds, prompt_lengths = EMBEDS.batch(prompts)
    return Batch(
        latents=latents,
        sigma=torch.tensor([0.1, 0.6, 1.0]),
        prompt_embeds=prompt_embeds,
        prompt_lengths=prompt_lengths,
        velocity=velocity,
        features=features,
    )


def test_the_loss_is_the_mean_of_the_samples_relative_squared_errors():
    student, batch = Scale(0.5), make_batch()
    loss = Objective()(student, batch, 0.3)
    scale = batch.velocity.square().mean(dim=(1, 2, 3))
    errors = (0.5 * batch.latents - batch.velocity).square().mean(dim=(1, 2, 3)) / scale
    assert_close(loss.by_sample, errors)
    assert_close(loss.total.detach(), errors.mean())
    assert not loss.by_sample.requires_grad

    loss.total.backward()
    slopes = 2 * (0.5 * batch.latents - batch.velocity) * batch.latents
    assert_close(student.scale.grad, (slopes / scale[:, None, None, None]).mean())


def test_the_student_is_asked_at_the_states_noise_levels_with_their_prompts():
    student = Scale(1.0)
    Objective()(student, make_batch())
    ((timestep, prompt_embeds, lengths),) = student.asked
    assert_close(timestep, torch.tensor([100.0, 600.0, 1000.0]))
    expected_embeds, expected_lengths = EMBEDS.batch([4, 0, 2])
    assert torch.equal(prompt_embeds, expected_embeds) and torch.equal(lengths, expected_lengths)


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_hidden_states_fade_along_a_line(progress):
    generator = torch.Generator().manual_seed(1)
    features = tuple(torch.randn(3, 4, 4, generator=generator) for _ in range(2))
    feature_loss = FeatureLoss(4, 2)
    student, batch = Scale(0.5), make_batch(features)
    objective = Objective(feature_loss=feature_loss, feature_weight=0.8)
    loss = objective(student, batch, progress)

    tokens = 0.5 * batch.latents.flatten(2).transpose(1, 2)
    error = feature_loss([tokens, tokens], features)
    assert_close(loss.total, loss.by_sample.mean() + 0.8 * (1 - progress) * error.mean())
    assert error.min() > 0.1 and not any(block._forward_hooks for block in student.blocks)


def test_a_replayed_batch_without_hidden_states_costs_its_velocity_error_alone():
    objective = Objective(feature_loss=FeatureLoss(4, 2), feature_weight=0.8)
    loss = objective(Scale(0.5), make_batch())
    assert_close(loss.total.detach(), loss.by_sample.mean())


def test_a_relative_error_of_hidden_states_counts_as_much_as_one_of_the_velocity():
    batch = make_batch()
    batch = replace(batch, velocity=batch.latents, features=(batch.latents.flatten(2).mT,) * 2)
    feature_loss = FeatureLoss(4, 2)
    objective = Objective(feature_loss=feature_loss, feature_weight=1.0)
    loss = objective(Scale(0.9), batch)  # a tenth off in both
    assert_close(loss.total.detach(), 2 * loss.by_sample.mean())
