"""Hidden states are those of the right layers, and the error between the two sides is what it should be in closed form.

The teacher must give the hidden states of a pass of the prompt alone beside its guided velocity.
"""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from support.runs import IDENTITY_CONFIG
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.model.transformer import block_outputs
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.objective import FeatureLoss, masked_relative_error, span_ends
from wandistiller.wan.settings import resolve_settings
from wandistiller.wan.wan_files import mock_wan_files

NEGATIVE = torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
SIGMA = torch.tensor([0.1234, 0.9, 0.875, 0.5])  # the two for either expert alternate
LAYERS = (0, 2)


def make_expert(seed: int) -> WanLiteStudent:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanLiteStudent(StudentConfig.from_dict(IDENTITY_CONFIG))


def make_teacher(scale: float, scale_2: float | None) -> Teacher:
    """Random experts, two where the second scale is given."""
    settings = resolve_settings(mock_wan_files(StudentConfig.from_dict(IDENTITY_CONFIG)), guidance_scale=scale)
    settings = replace(settings, guidance_scale_2=scale_2, boundary_ratio=None if scale_2 is None else 0.875)
    names = ("high",) if scale_2 is None else ("high", "low")
    return Teacher({name: make_expert(seed) for seed, name in enumerate(names)}, settings, NEGATIVE)


def batch():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 16, 4, 6, generator=generator)
    return latents, SIGMA, torch.randn(4, 9, 20, generator=generator), torch.tensor([1, 3, 7, 9])


def features_by_hand(expert: WanLiteStudent, layers) -> list[torch.Tensor]:
    """What forward hooks see of a pass of the prompt alone, one sample at a time."""
    seen: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    hooks = [
        expert.blocks[layer].register_forward_hook(lambda *call, layer=layer: seen[layer].append(call[2]))
        for layer in layers
    ]
    latents, sigma, prompt_embeds, lengths = batch()
    with torch.no_grad():
        for row in range(4):
            text = prompt_embeds[row : row + 1, : lengths[row]]
            expert(latents[row : row + 1], 1000 * sigma[row : row + 1], text, lengths[row : row + 1])
    for hook in hooks:
        hook.remove()
    return [torch.cat(seen[layer]) for layer in layers]


@pytest.mark.parametrize("scale, scale_2", [(1.0, None), (3.0, None), (4.0, 3.0), (1.0, 3.0)])
def test_the_teachers_hidden_states_are_those_of_a_pass_of_the_prompt_alone(scale, scale_2):
    teacher = make_teacher(scale, scale_2)
    velocity, features = teacher.velocity_and_features(*batch(), LAYERS)
    expected = features_by_hand(teacher.experts["high"], LAYERS)
    if scale_2 is not None:
        is_high = (SIGMA >= 0.875)[:, None, None]
        of_low = features_by_hand(teacher.experts["low"], LAYERS)
        expected = [torch.where(is_high, high, low) for high, low in zip(expected, of_low, strict=True)]
    assert velocity.shape == (4, 16, 4, 6)
    for state, by_hand in zip(features, expected, strict=True):
        assert state.shape == (4, 6, 24) and not state.requires_grad
        assert_close(state, by_hand, rtol=1e-4, atol=1e-4)
    assert torch.equal(velocity, teacher.velocity(*batch()))


def test_block_outputs_are_collected_inside_alone_also_when_the_pass_fails():
    model = make_expert(0)
    latents, sigma, *text = batch()
    with block_outputs(model, LAYERS) as outputs:
        model(latents, 1000 * sigma, *text)
    model(latents, 1000 * sigma, *text)
    assert len(outputs) == 2 and all(output.requires_grad for output in outputs)
    with pytest.raises(ValueError), block_outputs(model, LAYERS):
        raise ValueError
    assert not any(block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize(
    "layers, depth, ends",
    [([0, 2, 5], 7, [1, 4, 6]), ([0, 1, 2], 3, [0, 1, 2]), ([0], 30, [29]), ([1, 3], 4, [2, 3]), ([0, 2], 3, [1, 2])],
)
def test_a_block_stands_for_its_layer_and_all_up_to_the_next_that_is_kept(layers, depth, ends):
    assert span_ends(layers, depth) == ends


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_hidden_states_err_by_nothing_and_zeros_by_one():
    theirs = [random(3, 5, 8, seed=seed) * 10**seed for seed in range(3)]  # layers of any size weigh alike
    loss = FeatureLoss(8, 3)
    assert loss(theirs, theirs).tolist() == [0, 0, 0]
    assert loss([torch.zeros_like(state) for state in theirs], theirs).tolist() == pytest.approx([1] * 3)
    halves = [theirs[0], torch.zeros_like(theirs[1]), 2 * theirs[2]]
    assert loss(halves, theirs).tolist() == pytest.approx([(0 + 1 + 1) / 3] * 3)
    with pytest.raises(ValueError):
        loss(halves[:2], theirs)


def test_entries_beyond_two_standard_deviations_of_their_own_sample_are_masked():
    expected = torch.stack([random(20, 10), 100 * random(20, 10, seed=1)])  # the second would mask none of the first
    expected[0, 3, 4] = 50.0  # a massive activation
    actual = expected + random(2, 20, 10, seed=2)
    flat = expected.flatten(1)
    distance = (flat - flat.mean(dim=1, keepdim=True)).abs() / flat.std(dim=1, keepdim=True)
    keep = (distance < 2.0).reshape(expected.shape)
    assert not keep[0, 3, 4] and 0.9 < keep.float().mean() < 1 and not keep[1].all()
    by_hand = [
        float((actual - expected)[row][keep[row]].square().sum() / expected[row][keep[row]].square().sum())
        for row in range(2)
    ]
    assert masked_relative_error(actual, expected).tolist() == pytest.approx(by_hand, rel=1e-5)

    elsewhere = torch.where(keep, actual, 1e6)  # whatever is answered there
    assert masked_relative_error(elsewhere, expected).tolist() == pytest.approx(by_hand, rel=1e-5)
    elsewhere[0, 0, 0] = 1e6
    assert keep[0, 0, 0] and masked_relative_error(elsewhere, expected)[0] > 1e5


def test_the_maps_are_learnt():
    ours, weight = random(4, 30, 8), random(8, 8, seed=1)
    theirs = [ours @ weight, ours @ weight.flip(0) + 1]
    loss = FeatureLoss(8, 2)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    values = []
    for _ in range(300):
        value = loss([ours, ours], theirs).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[0] > 0.5 and values[-1] < 1e-3
