"""Training states lie on the teacher's sampling paths, or beside them where that was asked for.

The oracles are Euler's method by hand and velocity fields that are known in closed form.
"""

import itertools
from copy import deepcopy

import pytest
import torch

from support.walks import BOUNDARY, Field, TowardsClean, ask, make_walk, unshift
from wandistiller.sampling.sampler import wan_scheduler
from wandistiller.walk.draws import dealt_prompt
from wandistiller.walk.walk import turns

LEVELS = tuple(wan_scheduler(3.0, 4, "euler").sigmas.tolist())
KINDS = {
    "paths": {},
    "segments": {"segment_ends": (1.0, 0.8, 0.4, 0.0)},
    "experts in turn": {"boundary": BOUNDARY, "calls_per_expert": 8},
    "few levels": {"levels": LEVELS, "num_steps": 4},
    "fresh noise at few levels": {"levels": LEVELS, "num_steps": 4, "renoises": True},
    "a range": {"lowest_sigma": 0.5},
}


def invariant_of(answer: dict) -> dict[tuple[int, int], float]:
    """x - sigma, which is the same all along a path of the constant field 1, by slot and prompt."""
    values = (answer["latents"][:, 0, 0, 0] - answer["sigma"]).tolist()
    return dict(zip(zip(answer["rows"].tolist(), answer["prompts"].tolist(), strict=True), values, strict=True))


# ---- what a slot draws ----


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_the_answers_of_a_slot_are_the_same_bit_for_bit_however_slots_are_shared_out(changes):
    teacher = Field(rate=0.3, constant=0.1)
    whole = make_walk(teacher, **changes)
    parts = [make_walk(teacher, range(*ends), **changes) for ends in ((0, 2), (2, 8))]
    num_answers = 0
    for call in range(120):
        expected = whole.ask(call, range(8))
        found = [part.ask(call, range(len(part.slots))) for part in parts]
        for part, answer in zip(parts, found, strict=True):
            if answer:
                answer["rows"] = answer["rows"] + part.slots.start
        for name, values in expected.items():
            assert torch.equal(values, torch.cat([answer[name] for answer in found if answer]))
        for name in ("latents", "sigma", "velocity", "prompts"):
            passed = sorted(str(values) for segment in whole.passed for values in segment[name])
            assert passed == sorted(
                str(values) for part in parts for segment in part.passed for values in segment[name]
            )
        num_answers += len(expected.get("rows", ()))
    assert num_answers > 150


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_micro_batch_at_a_time_is_the_same_as_all_at_once(changes):
    one, other = (make_walk(Field(rate=0.3), **changes) for _ in range(2))
    for call in range(80):
        whole, parts = one.ask(call, range(8)), [other.ask(call, rows) for rows in (range(0, 4), range(4, 8))]
        for name, values in whole.items():
            assert torch.equal(values, torch.cat([part[name] for part in parts if part]))


@pytest.mark.parametrize("num_before", [0, 1, 30])
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_walk_goes_on_bit_for_bit_from_a_saved_state(changes, num_before):
    make = lambda: make_walk(Field(rate=0.3), **changes)  # noqa: E731
    one, other = make(), make()
    ask(one, num_before)
    saved = deepcopy(one.state_dict())
    assert all(len(values) == 8 for values in saved.values()), "slots are the first dimension of everything"
    expected = ask(one, 60, num_before)
    other.load_state_dict(saved)
    for first, second in zip(expected, ask(other, 60, num_before), strict=True):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for first, second in zip(one.passed, other.passed, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_walks_repeat_with_their_seed_and_image_sizes_differ():
    first, same, seed, size = (ask(make_walk(key=key), 20)[-1]["latents"] for key in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert torch.equal(first, same) and not torch.equal(first, seed) and not torch.equal(first, size)


@pytest.mark.parametrize("num_prompts", [7, 10])
def test_slots_are_dealt_every_prompt_once_an_epoch_in_an_order_of_its_own(num_prompts):
    taken = [dealt_prompt((0, 0), place, num_prompts) for place in range(21 * 8)]
    epochs = [
        tuple(taken[start : start + num_prompts])
        for start in range(0, num_prompts * (len(taken) // num_prompts), num_prompts)
    ]
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs) and len(set(epochs)) > 3


# ---- paths ----


def test_a_path_is_eulers_method_with_the_teachers_velocities():
    invariant, num_moves, num_starts = {}, 0, 0
    for answer in ask(make_walk(num_prompts=1000, embeds=_Texts()), 300):
        for place, value in invariant_of(answer).items():
            assert abs(invariant.setdefault(place, value) - value) < 1e-5
        num_starts += int((answer["sigma"] == 1).sum())
        num_moves += int((answer["sigma"] < 1).sum())
    assert num_starts > 100 and num_moves > 1000 and len(invariant) == num_starts


class _Texts:
    """Prompts enough for a path to be known by its own."""

    def batch(self, prompts, device):
        return torch.zeros(len(prompts), 1, 6), torch.ones(len(prompts), dtype=torch.long)


def test_paths_along_the_true_velocity_stay_on_the_line_to_the_clean_sample():
    clean, lines = torch.tensor([0.3, -2.0])[:, None, None], {}
    for answer in ask(make_walk(TowardsClean(clean), num_prompts=1000, embeds=_Texts()), 200):
        directions = (answer["latents"] - clean) / answer["sigma"][:, None, None, None]
        for row, prompt, direction in zip(answer["rows"].tolist(), answer["prompts"].tolist(), directions, strict=True):
            lines.setdefault((row, prompt), []).append(direction)
    paths = [torch.stack(line) for line in lines.values() if len(line) > 3]
    assert len(paths) > 50 and all(torch.allclose(path, path[:1].expand_as(path), atol=1e-3) for path in paths)


def test_the_states_cover_all_noise_levels_from_the_third_call_on():
    walk, counts = make_walk(num_slots=64), torch.zeros(5)
    for call, answer in enumerate(ask(walk, 200)):
        u = unshift(answer["sigma"])
        if call < 2:  # every path jumps from sigma 1 to a level of its own
            assert (answer["sigma"] == 1).all()
            continue
        shares = torch.histc(u, bins=5, min=0, max=1) / 64
        assert shares.min() > 0, f"call {call}: {shares.tolist()}"
        counts += shares / 198
    assert counts.min() > 0.12 and counts.max() < 0.35


def test_a_range_that_ends_above_zero_stops_the_paths_there():
    assert min(float(answer["sigma"].min()) for answer in ask(make_walk(lowest_sigma=BOUNDARY), 100)) >= BOUNDARY


def test_a_few_step_teacher_is_asked_at_its_own_levels_alone():
    walk = make_walk(levels=LEVELS, num_steps=4)
    counts = {level: 0 for level in LEVELS[:-1]}
    for answer in ask(walk, 200):
        for level in answer["sigma"].tolist():
            counts[level] += 1
    assert min(counts.values()) > 0.1 * sum(counts.values())


# ---- two experts ----


def test_experts_in_turn_answer_calls_in_a_row_and_no_path_is_left_behind():
    walk = make_walk(boundary=BOUNDARY, calls_per_expert=10)
    sides, asked = [], torch.zeros(8)
    answers = ask(walk, 300)
    born = walk.born.clone()
    for answer in [*answers, *ask(walk, 300, first=300)]:
        is_high = answer["sigma"] >= BOUNDARY if answer else torch.ones(0)
        sides.append(
            "none" if not len(is_high) else "high" if is_high.all() else "low" if not is_high.any() else "both"
        )
        if answer:
            asked[answer["rows"]] += 1
    switches = sum(one != other for one, other in itertools.pairwise(sides) if "none" not in (one, other))
    high, low = turns(walk.options)
    assert "both" not in sides and switches <= 2 * 600 / (high + low) + 2
    assert asked.min() > 0.7 * asked.max() > 300, "hardly a slot waits"
    assert (walk.born - born).min() > 15, "paths go on to their ends"
    # Three tenths of a path's steps lie above the boundary:
    assert 0.2 < sides.count("high") / 600 < 0.42


# ---- hidden states ----


def test_hidden_states_come_of_the_layers_and_channels_that_were_named():
    (whole,) = ask(make_walk(layers=(0, 2), channels=range(3)), 1)
    (part,) = ask(make_walk(layers=(0, 2), channels=(2, 0)), 1)
    assert whole["features.1"].shape == (8, 2, 3) and "features.2" not in whole
    assert torch.equal(part["features.1"], whole["features.1"][..., [2, 0]])
    assert "features.0" not in ask(make_walk(), 1)[0]
