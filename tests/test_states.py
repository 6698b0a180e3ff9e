"""Where training states come from: pure noise, and a pool of the teacher's own sampling paths.

pytest tests/test_states.py
"""

import torch
from conftest import IDENTITY_CONFIG

from projection_mapper import open_teacher
from wandistiller import StudentConfig
from wandistiller.states import TrajectoryStates, build_states
from wandistiller.teacher import resolve_settings

SHIFT = 3.0


def setting(**config):
    config = StudentConfig.from_dict(IDENTITY_CONFIG | config)
    return config, resolve_settings(open_teacher("mock", config), shift=SHIFT)


def unshift(sigma):
    return sigma / (SHIFT - (SHIFT - 1) * sigma)


def make_pool(**changes) -> TrajectoryStates:
    values = {"shift": SHIFT, "num_steps": 20, "pool_size": 64, "seed": 3}
    return TrajectoryStates((2, 1, 1), 10, 8, **values | changes)


# ---- noise ----


def test_noise_states_are_unit_noise_of_the_students_size_spread_over_the_noise_levels():
    batch = build_states("noise", *setting(image_size=64), 64, 64, sigma_range=(0.25, 0.75)).draw()
    assert batch.latents.shape == (64, 16, 8, 8) and batch.latents.dtype == torch.float32
    assert batch.sigma.shape == (64,) and batch.sigma.dtype == torch.float32
    assert abs(batch.latents.mean()) < 0.02 and abs(batch.latents.std() - 1) < 0.02
    assert batch.sigma.min() >= 0.25 and batch.sigma.max() <= 0.75
    # Stratified: undone from the shift, exactly one draw lies in each of 64 equal slices.
    u = (unshift(batch.sigma.double()) - unshift(0.25)) / (unshift(0.75) - unshift(0.25))
    assert sorted((64 * u).floor().long().tolist()) == list(range(64))


def test_noise_states_repeat_with_their_seed_and_move_on():
    one, same, other = (build_states("noise", *setting(), 20, 4, seed=seed) for seed in (1, 1, 2))
    first, again = one.draw(), same.draw()
    assert torch.equal(first.latents, again.latents) and torch.equal(first.sigma, again.sigma)
    assert first.prompts == again.prompts and not torch.equal(first.latents, one.draw().latents)
    assert not torch.equal(first.latents, other.draw().latents)


# ---- trajectories ----


def test_a_path_is_eulers_method_with_the_velocities_it_was_given():
    # Along a path of the constant field v = 1, x - sigma never changes; a new path starts at sigma 1 with its own noise.
    pool, invariant = make_pool(), {}
    num_moves = num_starts = 0
    for _ in range(300):
        batch = pool.draw()
        for slot, x, sigma in zip(batch.slots, batch.latents[:, 0, 0, 0].tolist(), batch.sigma.tolist(), strict=True):
            if sigma == 1.0:
                num_starts += 1
            else:
                assert abs(x - sigma - invariant[slot]) < 1e-5
                num_moves += 1
            invariant[slot] = x - sigma
        pool.advance(batch, torch.ones_like(batch.latents))
    assert num_starts > 64 and num_moves > 1000


def test_a_path_along_the_true_velocity_ends_at_the_clean_sample():
    clean, pool = torch.tensor([0.3, -2.0])[:, None, None], make_pool(pool_size=8, num_steps=5)
    ends = []
    for _ in range(60):
        batch = pool.draw()
        sigma = batch.sigma[:, None, None, None]
        noise = (batch.latents - (1 - sigma) * clean) / sigma
        before = dict(zip(batch.slots, batch.sigma.tolist(), strict=True))
        velocity = noise - clean
        ends += [batch.latents - sigma * velocity for slot in before]
        pool.advance(batch, velocity)
    assert all(torch.allclose(end, clean.expand_as(end), atol=1e-4) for end in ends)


def test_the_pool_covers_all_noise_levels_after_its_first_round_and_keeps_doing_so():
    pool = make_pool()
    for step in range(400):
        if step >= 8:  # 64 slots in batches of 8
            shares = torch.histc(unshift(pool.sigma), bins=5, min=0, max=1) / 64
            assert shares.min() >= 0.04 and shares.max() <= 0.45, f"step {step}: {shares.tolist()}"
        batch = pool.draw()
        assert len(set(batch.slots)) == 8
        pool.advance(batch, torch.zeros_like(batch.latents))


def test_batches_are_stratified_over_the_pools_noise_levels():
    pool = make_pool()
    for _ in range(8):
        batch = pool.draw()
        assert (batch.sigma == 1).all()
        pool.advance(batch, torch.zeros_like(batch.latents))
    order = pool.sigma.sort().values
    sigma = pool.draw().sigma.sort().values
    assert all(order[8 * part] <= sigma[part] <= order[8 * part + 7] for part in range(8))


def test_sigmas_differ_from_path_to_path_and_every_prompt_gets_its_turn():
    pool, sigmas, prompts = make_pool(), set(), set()
    for _ in range(200):
        batch = pool.draw()
        sigmas |= set(batch.sigma.tolist())
        prompts |= set(batch.prompts)
        pool.advance(batch, torch.zeros_like(batch.latents))
    assert len(sigmas) > 400 and prompts == set(range(10))


def test_a_range_that_ends_above_zero_stops_the_paths_there():
    pool = make_pool(sigma_low=0.875)
    for _ in range(100):
        batch = pool.draw()
        assert batch.sigma.min() >= 0.875
        pool.advance(batch, torch.zeros_like(batch.latents))


def test_trajectories_repeat_with_their_seed():
    one, same, other = make_pool(), make_pool(), make_pool(seed=4)
    for _ in range(40):
        batches = [pool.draw() for pool in (one, same, other)]
        for pool, batch in zip((one, same, other), batches, strict=True):
            pool.advance(batch, batch.latents)
    first, again, different = batches
    assert torch.equal(first.latents, again.latents) and first.prompts == again.prompts
    assert not torch.equal(first.latents, different.latents)


def test_the_pool_follows_the_settings_of_the_teacher():
    config, settings = setting(image_size=64)
    pool = build_states("trajectory", config, settings, 55, 4)
    assert pool.latents.shape == (32, 16, 8, 8) and pool.num_steps == settings.num_inference_steps
