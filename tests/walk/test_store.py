"""The store hands out every answer, all about as often, and each step draws by its number alone."""

from collections import Counter
from copy import deepcopy
from itertools import pairwise

import pytest
import torch

from support.walks import EMBEDS, Field, make_walk
from wandistiller.walk.batches import LEAD_CALLS, Batches, Schedule
from wandistiller.walk.store import MAX_FEATURE_BYTES, Store

NUM_SLOTS = 8


def answer_of(call: int, rows: range = range(NUM_SLOTS)) -> dict[str, torch.Tensor]:
    """An answer whose values tell call and slot."""
    number = call * 100.0 + torch.tensor(rows)
    values = number[:, None, None, None].expand(-1, 2, 1, 1).clone()
    return {
        "rows": torch.tensor(rows),
        "latents": values,
        "velocity": -values,
        "sigma": number,
        "prompts": number.long(),
    }


def make_store(capacity: int = 16, slots: range = range(NUM_SLOTS)) -> Store:
    return Store(capacity, slots, NUM_SLOTS, key=(5, 0))


def make_batches(
    num_steps: int, replay: int = 4, micro_batch: int = NUM_SLOTS, teacher: Field | None = None, **changes
) -> Batches:
    walk = make_walk(teacher, **changes)
    schedule = Schedule(num_steps, replay)
    store = Store(schedule.capacity, walk.slots, NUM_SLOTS, walk.options.key)
    return Batches([(walk, store)], [schedule], EMBEDS, micro_batch)


def test_a_fresh_answer_is_handed_out_first_and_an_old_one_only_in_its_place():
    store = make_store(capacity=4)
    for call in range(7):
        store.add(answer_of(call))
        assert store.sample(call, range(NUM_SLOTS))["sigma"].tolist() == [
            call * 100 + slot for slot in range(NUM_SLOTS)
        ]
    for step in range(7, 60):
        taken = store.sample(step, range(NUM_SLOTS))
        assert torch.equal(taken["latents"], -taken["velocity"]) and torch.equal(
            taken["prompts"].float(), taken["sigma"]
        )
        assert {int(number) // 100 for number in taken["sigma"]} <= {3, 4, 5, 6}, "the oldest were replaced"
        assert [int(number) % 100 for number in taken["sigma"]] == list(range(NUM_SLOTS))


def test_all_answers_are_handed_out_about_as_often():
    store, counts = make_store(capacity=20), Counter()
    for call in range(20):
        store.add(answer_of(call))
    for step in range(200):
        counts.update(store.sample(step, range(NUM_SLOTS))["sigma"].tolist())
    assert len(counts) == 20 * NUM_SLOTS and min(counts.values()) >= 7 and max(counts.values()) <= 14  # 10 on average


def test_a_slots_share_does_not_depend_on_the_others():
    whole, part = make_store(), make_store(slots=range(3, 5))
    for call in range(10):
        whole.add(answer_of(call))
        part.add(
            {name: values[3:5] if name != "rows" else torch.tensor([0, 1]) for name, values in answer_of(call).items()}
        )
    for step in range(30):
        assert torch.equal(whole.sample(step, range(NUM_SLOTS))["sigma"][3:5], part.sample(step, range(2))["sigma"])


def test_a_store_goes_on_from_a_saved_state_also_in_a_longer_run():
    one, other = make_store(capacity=6), make_store(capacity=9)
    for call in range(6):
        one.add(answer_of(call))
        one.sample(call, range(NUM_SLOTS))
    saved = deepcopy(one.state_dict())
    assert all(len(values) == NUM_SLOTS for values in saved.values())
    other.load_state_dict(saved)
    for step in range(6, 20):
        assert torch.equal(
            one.sample(step, range(NUM_SLOTS))["latents"], other.sample(step, range(NUM_SLOTS))["latents"]
        )


def test_hidden_states_are_kept_while_there_is_room_for_them():
    large = MAX_FEATURE_BYTES // 2 // 16 // NUM_SLOTS // 2 + 1  # two layers of them are too much
    stores = [make_store(), make_store()]
    for store, shape in zip(stores, ((3, 4), (1, large)), strict=True):
        features = {f"features.{layer}": torch.ones(NUM_SLOTS, *shape) for layer in range(2)}
        store.add(answer_of(0) | features)
    kept, left = (store.sample(0, range(NUM_SLOTS)) for store in stores)
    assert kept["features.1"].dtype == torch.bfloat16 and kept["features.1"].shape == (NUM_SLOTS, 3, 4)
    assert "latents" in left and "features.1" not in left


@pytest.mark.parametrize("num_steps, replay", [(320, 4), (1, 4), (7, 1), (1280, 8), (10, 100)])
def test_the_teacher_is_asked_for_a_few_in_a_row_then_more_at_early_steps_and_for_all_in_the_end(num_steps, replay):
    schedule = Schedule(num_steps, replay)
    due = [schedule.due(step) for step in range(num_steps)]
    assert due[-1] == schedule.num_calls == -(-num_steps // replay)
    assert due[:LEAD_CALLS] == [min(step + 1, due[-1]) for step in range(min(LEAD_CALLS, num_steps))]
    assert all(after - before in (0, 1) for before, after in pairwise(due))
    assert due[(3 * num_steps) // 4] >= 0.85 * due[-1]


def test_a_run_asks_as_often_as_was_planned_and_every_step_has_a_whole_batch():
    teacher = Field(constant=1.0)
    batches = make_batches(40, teacher=teacher)
    for step in range(40):
        (batch,) = batches.of_step(step)
        assert (
            batch.latents.shape == batch.velocity.shape == (NUM_SLOTS, 2, 1, 1)
            and len(batch.prompt_lengths) == NUM_SLOTS
        )
        torch.testing.assert_close(batch.velocity, torch.ones_like(batch.velocity), atol=1e-4, rtol=0)
    assert batches.num_calls == batches.schedules[0].num_calls == len(teacher.asked)


def test_micro_batches_are_the_rows_of_the_whole_and_processes_those_of_one():
    whole, halves = make_batches(30), make_batches(30, micro_batch=4)
    for step in range(30):
        (expected,), found = whole.of_step(step), list(halves.of_step(step))
        for name in ("latents", "velocity", "sigma", "prompt_lengths"):
            assert torch.equal(getattr(expected, name), torch.cat([getattr(part, name) for part in found]))


def test_hidden_states_come_with_fresh_answers_even_where_none_are_kept():
    batches = make_batches(12, layers=(0, 1), channels=range(3))
    batches.sources[0][1].num_sizes = MAX_FEATURE_BYTES  # as if so many sizes shared the room: a byte for each
    has_features = [bool(batch.features) for step in range(12) for batch in batches.of_step(step)]
    assert has_features == [step < 3 for step in range(12)], "three calls, each at a step of its own"


def test_batches_of_several_sizes_take_turns():
    sizes = [make_walk(key=(3, 0)), make_walk(key=(3, 1), latent_shape=(2, 2, 1))]
    schedules = [Schedule(10, 2), Schedule(10, 2)]
    stores = [Store(5, range(8), 8, walk.options.key) for walk in sizes]
    batches = Batches(list(zip(sizes, stores, strict=True)), schedules, EMBEDS, 8)
    shapes = [tuple(batch.latents.shape[2:]) for step in range(20) for batch in batches.of_step(step)]
    assert shapes == [(1, 1), (2, 1)] * 10 and batches.num_calls == 10


@pytest.mark.parametrize("changes", [{}, {"boundary": 0.875, "calls_per_expert": 8}])
def test_batches_go_on_bit_for_bit_from_a_saved_state(changes):
    one, other = (make_batches(60, teacher=Field(rate=0.3), **changes) for _ in range(2))
    for step in range(25):
        list(one.of_step(step))
    state = deepcopy(one.state_dict())
    assert all(values.ndim == 0 or len(values) == NUM_SLOTS for values in state.values())
    other.load_state_dict({name: values.clone() for name, values in state.items()})
    for step in range(25, 60):
        (first,), (second,) = one.of_step(step), other.of_step(step)
        assert torch.equal(first.latents, second.latents) and torch.equal(first.velocity, second.velocity)
    assert one.num_calls == other.num_calls
