"""States get the right prompts, finished paths give renoised states, and options give the states they ask for.

Saved states must resume bit for bit.

pytest tests/targets/test_states.py
"""

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch

import wandistiller.targets.renoise
from support.runs import IDENTITY_CONFIG
from support.states import (
    BOUNDARY,
    SHIFT,
    STUDENTS,
    TEACHERS,
    PathLog,
    check_goes_on_from_a_saved_state,
    make_noise,
    make_pool,
    make_renoised,
    step_of_states,
    unshift,
    walk,
)
from wandistiller import StudentConfig
from wandistiller.run.flags import STATES, parse_args
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.noise import NoiseStates
from wandistiller.targets.prompt_order import PromptOrder, PromptSwap
from wandistiller.targets.renoise import SAMPLES_PER_LANE, RenoisedStates
from wandistiller.targets.states import BUILDERS, StatesOptions, build_states
from wandistiller.targets.trajectories import TrajectoryStates
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.settings import resolve_settings


def setting(**config):
    config = StudentConfig.from_dict(IDENTITY_CONFIG | config)
    settings = resolve_settings(open_teacher("mock", config), shift=SHIFT)
    return config, replace(settings, num_inference_steps=6)  # so that paths are soon finished


# ---- the order of prompts ----


@pytest.mark.parametrize("num_prompts, batch_size", [(7, 3), (8, 4), (5, 9), (1, 1)])
def test_batches_cover_every_prompt_once_an_epoch_in_an_order_of_its_own(num_prompts, batch_size):
    order, steps = PromptOrder(num_prompts, seed=2), math.ceil(num_prompts / batch_size)
    epochs = [list(chain(*(order.take(batch_size) for _ in range(steps)))) for _ in range(3)]
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)
    if num_prompts > 4:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_repeats_with_its_seed_alone():
    first, again, other = ([order.take(4) for _ in range(9)] for order in (PromptOrder(20, seed) for seed in (1, 1, 2)))
    assert first == again != other and max(map(len, first)) == 4


# ---- the swap of prompts ----


@pytest.mark.parametrize("probability", [0.3, 1.0])
@pytest.mark.parametrize("sigma", [1.0, 0.9, 0.5, 0.0])
def test_the_probability_of_a_swap_falls_exponentially_from_sigma_one(probability, sigma):
    generator, num_states = torch.Generator().manual_seed(0), 20_000
    swapped = PromptSwap(probability, 10**6)([-1] * num_states, torch.full((num_states,), sigma), generator)
    share = sum(prompt != -1 for prompt in swapped) / num_states
    assert share == pytest.approx(probability * math.exp(-5 * (1 - sigma)), abs=0.012)


def test_a_swap_gives_any_of_the_prompts_alike():
    prompts = PromptSwap(1.0, 5)([0] * 10_000, torch.ones(10_000), torch.Generator().manual_seed(0))
    assert torch.bincount(torch.tensor(prompts)).tolist() == pytest.approx([2000] * 5, abs=200)


def test_a_swap_of_probability_zero_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert PromptSwap(0.0, 5)([3, 1], torch.ones(2), generator) == [3, 1]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("kind", ["noise", "trajectory", "renoise"])
@pytest.mark.parametrize("probability, has_extra", [(0.0, False), (0.5, True)])
def test_extra_prompts_come_by_the_swap_alone(kind, probability, has_extra):
    options = StatesOptions(
        kind=kind,
        prompt_swap=probability,
        num_extra_prompts=4,
        renoise_fraction=0.5 if kind == "renoise" else 0.0,
    )
    states, seen = build_states(options, *setting(), 6, Lanes(4)), set()
    for _ in range(300):
        batch = states.draw()
        seen |= set(batch.prompts)
        states.advance(batch, torch.zeros_like(batch.latents))
    assert seen == set(range(10 if has_extra else 6))
    assert kind != "renoise" or batch.slots.count(-1) == 2


# ---- states of finished paths ----


def clean_of(prompts: list[int]) -> torch.Tensor:
    """A clean sample for every prompt, (B, 2, 1, 1)."""
    numbers = torch.tensor(prompts, dtype=torch.float32)
    return torch.stack([numbers, -0.5 * numbers], dim=1)[..., None, None]


def walk_to_clean(states: RenoisedStates, num_batches: int) -> list:
    """Answer with the velocity that leads every path to its prompt's clean sample; the batches as they came."""
    batches = []
    for _ in range(num_batches):
        batch = states.draw()
        clean, sigma = clean_of(batch.prompts), batch.sigma[:, None, None, None]
        batches.append(batch)
        states.advance(batch, (batch.latents - clean) / sigma)
    return batches


def renoised_part(batch) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    rows = [row for row, slot in enumerate(batch.slots) if slot < 0]
    return batch.latents[rows], batch.sigma[rows], [batch.prompts[row] for row in rows]


def test_renoised_states_are_fresh_unit_noise_mixed_into_the_clean_sample_of_their_prompt():
    noises, sigmas, prompts = [], [], set()
    states = make_renoised(0.75, num_steps=5)
    states.sigma_range = (0.1, 1.0)  # of renoised states; the paths still end at sigma 0
    for batch in walk_to_clean(states, 900):
        latents, sigma, chosen = renoised_part(batch)
        level = sigma[:, None, None, None]
        noises += [(latents - (1 - level) * clean_of(chosen)) / level] if chosen else []
        sigmas += sigma.tolist()
        prompts |= set(chosen)
    noise = torch.cat(noises).flatten()
    assert len(noise) > 5000 and prompts == set(range(10))
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.03 and noise.abs().max() < 6
    assert len(set(noise.tolist())) > 0.99 * len(noise), "noise was used again"
    # Spread evenly over the range before its shift, as all noise levels are:
    u = unshift(torch.tensor(sigmas, dtype=torch.float64))
    low = unshift(0.1)
    assert u.min() >= low - 1e-6 and u.max() <= 1
    assert torch.histc((u - low) / (1 - low), bins=5, min=0, max=1) / len(u) == pytest.approx([0.2] * 5, abs=0.02)


@pytest.mark.parametrize("fraction, num_renoised", [(0.25, 2), (0.5, 4), (1.0, 7)])
def test_a_share_of_every_batch_is_renoised_once_enough_paths_are_finished(fraction, num_renoised):
    states = make_renoised(fraction, num_steps=4)
    for _ in range(300):
        enough = (states.num_kept > 0).sum() >= num_renoised
        batch = states.draw()
        assert len(batch.prompts) == len(batch.latents) == len(batch.sigma) == 8
        assert batch.slots.count(-1) == (num_renoised if enough else 0)
        states.advance(batch, torch.zeros_like(batch.latents))
    assert enough, "no batch was renoised"


def test_only_paths_that_the_teacher_alone_has_finished_are_kept_and_none_of_the_first_round():
    states, log = make_renoised(0.25, num_steps=12), PathLog()
    walk(states, 0.0, 150, log)
    walk(states, 0.5, 400, log)
    assert states.num_kept.sum() > 100 and states.num_kept.max() < SAMPLES_PER_LANE, "some samples were overwritten"
    samples = torch.cat([kept[:count] for kept, count in zip(states.samples, states.num_kept.tolist(), strict=True)])

    def is_kept(path) -> bool:
        return bool(((path.start - TEACHERS - samples).abs().amax(dim=(1, 2, 3)) < 1e-4).any())

    kept = 0
    for path in log.finished:
        if path.is_of_first_round or STUDENTS in path.rates:
            assert not is_kept(path)
        elif (
            not path.born < 150 <= path.ended
        ):  # those that were under way may have become the student's in their last step
            assert is_kept(path)
            kept += 1
    assert kept > 100
    known = torch.stack([path.start - TEACHERS for path in [*log.finished, *log.open.values()]])
    assert all(((sample - known).abs().amax(dim=(1, 2, 3)) < 1e-4).any() for sample in samples)


def test_the_newest_samples_replace_the_oldest_of_their_lane(monkeypatch):
    monkeypatch.setattr(wandistiller.targets.renoise, "SAMPLES_PER_LANE", 2)
    states, kept = make_renoised(0.25, num_steps=4), {lane: [] for lane in range(8)}
    keep = states.paths.on_finish
    states.paths.on_finish = lambda latents, prompt, lane: (
        kept[lane].append((latents.clone(), prompt)),
        keep(latents, prompt, lane),
    )
    walk(states, 0.0, 80, PathLog())
    for lane in range(8):
        assert len(kept[lane]) > 3
        newest = {prompt_and_sample(prompt, latents) for latents, prompt in kept[lane][-2:]}
        stored = zip(states.prompts[lane], states.samples[lane], strict=True)
        assert newest == {prompt_and_sample(*pair) for pair in stored}


def prompt_and_sample(prompt, latents: torch.Tensor) -> tuple:
    return int(prompt), *latents.flatten().tolist()


@pytest.mark.parametrize("num_before", [3, 20, 90])  # no sample yet, few, many
def test_renoised_states_go_on_from_a_saved_state(num_before):
    def make(seed: int) -> RenoisedStates:
        return make_renoised(0.5, num_steps=4, seed=seed, swap=PromptSwap(0.3, 15))

    check_goes_on_from_a_saved_state(make, step_of_states, num_before)


@pytest.mark.parametrize("make", [make_noise, make_pool])
def test_swapped_states_go_on_from_a_saved_state(make):
    check_goes_on_from_a_saved_state(lambda seed: make(seed=seed, swap=PromptSwap(0.5, 40)), step_of_states, 9)


# ---- by the run's options ----


def test_states_are_of_the_students_size_at_the_teachers_shift():
    config, settings = setting(image_size=64)
    noise, paths, renoised = (
        build_states(StatesOptions(kind=kind, renoise_fraction=fraction, seed=7), config, settings, 55, Lanes(4))
        for kind, fraction in (("noise", 0.0), ("trajectory", 0.0), ("renoise", 0.5))
    )
    assert isinstance(noise, NoiseStates) and noise.draw().latents.shape == (4, 16, 8, 8)
    assert isinstance(paths, TrajectoryStates) and paths.latents.shape == (4, 2, 16, 8, 8)
    assert isinstance(renoised, RenoisedStates) and renoised.num_renoised == 2
    for states in (noise, paths, renoised.paths):
        assert (states.shift, states.swap.probability) == (SHIFT, 0.0)
    assert paths.num_steps == settings.num_inference_steps
    assert torch.equal(paths.draw().latents, renoised.draw().latents)


def test_the_experts_boundary_and_the_range_of_noise_levels_reach_the_states():
    config, settings = setting()
    assert (
        build_states(
            StatesOptions(kind="trajectory", calls_per_expert=3), config, settings, 5, Lanes(4)
        ).calls_per_expert
        == 0
    )
    two = replace(settings, guidance_scale_2=settings.guidance_scale, boundary_ratio=BOUNDARY)
    states = build_states(StatesOptions(kind="trajectory", calls_per_expert=3), config, two, 5, Lanes(4))
    assert (states.boundary, states.calls_per_expert) == (BOUNDARY, 3)
    for kind, sigma_range in (("noise", (0.3, 0.6)), ("trajectory", (0.6, 1.0))):
        states = build_states(StatesOptions(kind=kind, sigma_range=sigma_range), config, settings, 5, Lanes(4))
        for _ in range(60):
            batch = states.draw()
            assert batch.sigma.min() >= sigma_range[0] - 1e-6 and batch.sigma.max() <= sigma_range[1]
            states.advance(batch, batch.latents)


def test_states_follow_the_seed_of_the_run():
    one, same, other = (
        build_states(StatesOptions(kind="renoise", renoise_fraction=0.5, seed=seed), *setting(), 9, Lanes(4))
        for seed in (1, 1, 2)
    )
    steps = [[step_of_states(states) for _ in range(200)][-1] for states in (one, same, other)]
    assert one.num_kept.sum() > 20 and torch.equal(steps[0][0], steps[1][0])
    assert not torch.equal(steps[0][0], steps[2][0])


def test_the_flags_know_the_kinds_that_can_be_built():
    assert STATES.keys() == BUILDERS.keys()
    for kind in STATES:
        assert parse_args(["--teacher_path", "x", "--states", kind]).states.states == kind
