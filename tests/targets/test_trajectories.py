"""Training states are pure noise, or a pool of sampling paths that the teacher or the student walks.

The oracles are Euler's method by hand and velocity fields that are known in closed form. Saved states must resume bit
for bit.

pytest tests/targets/test_trajectories.py
"""

from itertools import chain, pairwise

import pytest
import torch

from support.states import (
    BOUNDARY,
    STUDENTS,
    TEACHERS,
    PathLog,
    check_goes_on_from_a_saved_state,
    make_noise,
    make_pool,
    step_of_states,
    unshift,
    walk,
)
from wandistiller.targets.trajectories import TrajectoryStates


def after_first_round(**changes) -> TrajectoryStates:
    """A pool whose slots have all left sigma 1."""
    pool = make_pool(**changes)
    for _ in range(8):  # 64 slots in batches of 8
        batch = pool.draw()
        assert (batch.sigma == 1).all()
        pool.advance(batch, torch.zeros_like(batch.latents))
    return pool


# ---- noise ----


def test_noise_states_are_unit_noise_of_the_students_size_spread_over_the_noise_levels():
    batch = make_noise(64, 64, sigma_range=(0.25, 0.75)).draw()
    assert batch.latents.shape == (64, 16, 8, 8) and batch.latents.dtype == torch.float32
    assert batch.sigma.shape == (64,) and batch.sigma.dtype == torch.float32
    assert abs(batch.latents.mean()) < 0.02 and abs(batch.latents.std() - 1) < 0.02
    assert batch.sigma.min() >= 0.25 and batch.sigma.max() <= 0.75
    # Stratified: undone from the shift, exactly one draw lies in each of 64 equal slices.
    u = (unshift(batch.sigma.double()) - unshift(0.25)) / (unshift(0.75) - unshift(0.25))
    assert sorted((64 * u).floor().long().tolist()) == list(range(64))


def test_noise_states_repeat_with_their_seed_and_move_on():
    one, same, other = (make_noise(seed=seed) for seed in (1, 1, 2))
    first, again = one.draw(), same.draw()
    assert torch.equal(first.latents, again.latents) and torch.equal(first.sigma, again.sigma)
    assert first.prompts == again.prompts and not torch.equal(first.latents, one.draw().latents)
    assert not torch.equal(first.latents, other.draw().latents)


def test_noise_states_are_no_part_of_a_path():
    states, same = make_noise(), make_noise()
    batch, _ = states.draw(), same.draw()
    states.advance(batch, batch.latents, batch.latents, 1.0)
    assert set(batch.slots) == {-1} and torch.equal(states.draw().latents, same.draw().latents)


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
    clean, ends = torch.tensor([0.3, -2.0])[:, None, None], []
    pool = make_pool(per_lane=1, num_steps=5, on_finish=lambda latents, prompt, lane: ends.append(latents.clone()))
    for _ in range(60):
        batch = pool.draw()
        sigma = batch.sigma[:, None, None, None]
        noise = (batch.latents - (1 - sigma) * clean) / sigma
        pool.advance(batch, noise - clean)
    assert len(ends) > 50 and all(torch.allclose(end, clean, atol=1e-4) for end in ends)


def test_the_pool_covers_all_noise_levels_after_its_first_round_and_keeps_doing_so():
    pool, total = after_first_round(), torch.zeros(5)
    for step in range(400):
        shares = torch.histc(unshift(pool.sigma), bins=5, min=0, max=1) / 64
        total += shares
        assert shares.min() > 0 and shares.max() <= 0.45, f"step {step}: {shares.tolist()}"
        batch = pool.draw()
        assert len(set(batch.slots)) == 8
        pool.advance(batch, torch.zeros_like(batch.latents))
    assert (total / 400).min() > 0.08, total / 400  # one step's shares vary, since paths have few levels


def test_batches_are_stratified_over_the_pools_noise_levels():
    pool = after_first_round()
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
    pool = make_pool(sigma_range=(0.875, 1.0))
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


def test_a_path_keeps_the_prompt_it_was_swapped_for():
    def swap(prompts, sigma, generator):
        """At sigma 1 alone: to one of ten prompts that no path starts with."""
        return [prompt + 10 if level == 1 else prompt for prompt, level in zip(prompts, sigma.tolist(), strict=True)]

    pool, prompt_of = make_pool(swap=swap), {}
    num_kept = 0
    for _ in range(200):
        batch = pool.draw()
        for slot, prompt, sigma in zip(batch.slots, batch.prompts, batch.sigma.tolist(), strict=True):
            assert 10 <= prompt < 20
            num_kept += sigma < 1
            assert sigma == 1 or prompt == prompt_of[slot]
            prompt_of[slot] = prompt
        pool.advance(batch, torch.zeros_like(batch.latents))
    assert num_kept > 1000


# ---- paths of the student ----


def test_without_rollout_the_students_velocity_has_no_effect():
    with_student, without = make_pool(), make_pool()
    for _ in range(60):
        first, second = with_student.draw(), without.draw()
        assert torch.equal(first.latents, second.latents)
        with_student.advance(first, first.latents, torch.full_like(first.latents, 99.0), 0.0)
        without.advance(second, second.latents)


def test_with_full_rollout_every_path_follows_the_student_alone():
    log = PathLog()
    walk(make_pool(num_steps=8), 1.0, 200, log)
    assert len(log.finished) > 100
    assert all(set(path.rates) <= {STUDENTS} for path in log.finished)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_the_paths_is_the_students_each_from_start_to_end(share):
    log = PathLog()
    walk(make_pool(num_steps=8), share, 800, log)
    paths = [path for path in log.finished if path.rates]
    assert len(paths) > 500 and all(
        len(set(path.rates)) == 1 and path.rates[0] in (TEACHERS, STUDENTS) for path in paths
    )
    students = sum(STUDENTS in path.rates for path in paths) / len(paths)
    assert students == pytest.approx(share, abs=0.06)


def test_a_growing_share_takes_paths_over_and_gives_none_back():
    log, pool = PathLog(), make_pool(num_steps=8)
    for share in torch.linspace(0, 1, 300).tolist():
        walk(pool, share, 1, log)
    assert all(path.rates == sorted(path.rates, reverse=True) for path in log.finished)  # the teacher's moves first
    led_by = [{TEACHERS}, {TEACHERS, STUDENTS}, {STUDENTS}]
    counts = [sum(set(path.rates) == leaders for path in log.finished) for leaders in led_by]
    assert min(counts) > 10 and sum(counts) > 200


# ---- two experts ----


def experts_of_batches(pool: TrajectoryStates, num_batches: int) -> list[list[str]]:
    """The experts that each batch needs, in the order in which a teacher asks them."""
    needed = []
    for _ in range(num_batches):
        batch = pool.draw()
        is_high = batch.sigma >= BOUNDARY
        needed.append([name for name, rows in (("high", is_high), ("low", ~is_high)) if rows.any()])
        drawn = [slot for slot in batch.slots if slot >= 0]
        assert len(set(drawn)) == len(drawn) >= 4 and batch.weights.mean() == pytest.approx(1)
        assert [weight > 0 for weight in batch.weights.tolist()] == [slot >= 0 for slot in batch.slots]
        pool.advance(batch, torch.zeros_like(batch.latents))
    return needed


def num_switches(needed: list[list[str]]) -> int:
    return sum(one != other for one, other in pairwise(chain(*needed)))


@pytest.mark.parametrize("calls", [4, 10])
def test_batches_of_one_expert_come_in_rows_and_neither_side_starves(calls):
    needed = experts_of_batches(after_first_round(boundary=BOUNDARY, calls_per_expert=calls), 500)
    assert all(len(experts) == 1 for experts in needed)
    mixed = experts_of_batches(after_first_round(boundary=BOUNDARY), 500)
    assert num_switches(needed) / 5 < 100 / calls < num_switches(mixed) / 5 / 4
    # Three tenths of a path's steps lie above the boundary, so as much of the calls must be for them, from first to last:
    for start in range(0, 500, 100):
        share = sum(experts == ["high"] for experts in needed[start : start + 100]) / 100
        assert 0.15 < share < 0.5, f"batches {start} on: {share}"


def test_calls_of_one_expert_leave_no_path_behind():
    pool, visits = after_first_round(boundary=BOUNDARY, calls_per_expert=10), torch.zeros(64)
    for _ in range(500):
        batch = pool.draw()
        visits[[slot for slot in batch.slots if slot >= 0]] += 1
        pool.advance(batch, torch.zeros_like(batch.latents))
    assert visits.min() > 0.5 * visits.mean()


def test_calls_of_one_expert_need_two_of_them():
    assert torch.equal(make_pool(calls_per_expert=5).draw().sigma, make_pool().draw().sigma)
    one, other = after_first_round(calls_per_expert=5), after_first_round()
    assert torch.equal(one.draw().sigma, other.draw().sigma)


# ---- going on from a saved state ----


@pytest.mark.parametrize("num_before", [0, 7])
def test_noise_states_go_on_from_a_saved_state(num_before):
    check_goes_on_from_a_saved_state(lambda seed: make_noise(seed=seed), step_of_states, num_before)


@pytest.mark.parametrize("num_before", [0, 3, 8, 60])  # the first round ends after 8
@pytest.mark.parametrize("changes", [{}, {"boundary": BOUNDARY, "calls_per_expert": 5}])
def test_trajectories_go_on_from_a_saved_state(num_before, changes):
    def make(seed: int) -> TrajectoryStates:
        return make_pool(num_steps=6, seed=seed, **changes)

    check_goes_on_from_a_saved_state(make, step_of_states, num_before)


def test_a_pool_goes_on_from_a_wider_one():
    wide, narrow = make_pool(), make_pool(per_lane=2, seed=9)
    for _ in range(20):
        step_of_states(wide)
    narrow.load_state_dict(wide.state_dict())
    for _ in range(20):
        one, other = wide.draw(), narrow.draw()
        assert torch.equal(one.latents, other.latents) and one.prompts == other.prompts
        for pool, batch in ((wide, one), (narrow, other)):
            pool.advance(batch, batch.latents)
