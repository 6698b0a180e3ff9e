"""A cache holds the teacher's answers whoever asks for them: bit for bit the same, whole or not at all."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.walks import SHAPE, Field, make_walk
from wandistiller.errors import UserError
from wandistiller.walk.cache import AnswerError, CachedAnswers, Layout, TeacherCache

LAYOUT = Layout(num_calls=24, batch_size=8, micro_batch=4)
DESCRIPTION = {"teacher": "abc", "latent_shape": list(SHAPE), "shift": 3.0}


def open_cache(folder: Path, layout: Layout = LAYOUT, **changes) -> TeacherCache:
    return TeacherCache(folder, DESCRIPTION | changes, layout)


def fill(cache: TeacherCache, chunks: list[range] | None = None, teacher: Field | None = None) -> None:
    def walk_of(slots: range):
        return make_walk(teacher or Field(rate=0.3), slots=slots, num_slots=cache.layout.num_slots, batch_size=8)

    cache.fill(cache.layout.chunks if chunks is None else chunks, walk_of, lambda done: None)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def filled(tmp_path) -> TeacherCache:
    cache = open_cache(tmp_path / "cache")
    fill(cache)
    return cache


@pytest.mark.parametrize("num_parts", [2, 3, 50])
def test_builders_of_parts_write_the_files_of_one_bit_for_bit_in_any_order(filled, tmp_path, num_parts):
    parts = [open_cache(tmp_path / "parts") for _ in range(num_parts)]
    for part in reversed(range(num_parts)):
        assert not parts[part].is_complete or part < num_parts - len(LAYOUT.chunks)
        fill(parts[part], LAYOUT.of_part(part, num_parts))
    assert parts[0].is_complete and contents(filled.folder) == contents(tmp_path / "parts")


def test_every_slot_is_in_one_chunk_and_a_layout_has_as_many_calls_as_were_asked_for():
    for num_calls in (1, 3, 24, 100, 5000):
        layout = Layout(num_calls, 8, 4)
        assert [slot for chunk in layout.chunks for slot in chunk] == list(range(layout.num_slots))
        assert sum(layout.calls_of(chunk) for chunk in layout.chunks) * 4 == num_calls * 8
        assert all(layout.calls_of(chunk) >= 1 for chunk in layout.chunks)


def test_a_filling_that_ends_anywhere_goes_on_with_the_chunk_it_was_at(filled, tmp_path):
    class Dies(Field):
        def velocity_and_features(self, *asked):
            if len(self.asked) == 20:
                raise KeyboardInterrupt
            return super().velocity_and_features(*asked)

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        fill(open_cache(folder), teacher=Dies(rate=0.3))
    left = open_cache(folder)
    assert not left.is_complete and 0 < len(left.missing(LAYOUT.chunks)) < len(LAYOUT.chunks)
    fill(left)
    assert contents(filled.folder) == contents(folder)
    teacher = Field()
    fill(open_cache(folder), teacher=teacher)
    assert not teacher.asked, "a complete cache asks nothing"


@pytest.mark.parametrize("value, message", [(float("nan"), "not finite"), (1e6, "more than torch.float16 holds")])
def test_an_answer_that_cannot_be_stored_is_refused(tmp_path, value, message):
    with pytest.raises(AnswerError, match=message):
        fill(open_cache(tmp_path / "cache"), teacher=Field(constant=value))


def test_a_folder_of_other_answers_says_what_differs(filled):
    with pytest.raises(UserError, match=r"was made with shift 3.0, now 5.0.*Give another folder"):
        open_cache(filled.folder, shift=5.0)


def test_a_complete_cache_serves_any_length_and_an_unfinished_one_its_own(filled, tmp_path):
    longer = Layout(num_calls=48, batch_size=8, micro_batch=4)
    assert open_cache(filled.folder, longer).is_complete
    half = open_cache(tmp_path / "half")
    fill(half, LAYOUT.of_part(0, 2))
    with pytest.raises(UserError, match=r"was begun for 24 batches.*this run asks for 48"):
        open_cache(half.folder, longer)


LAYOUTS = ["[]", '{"x": 1}', '{"num_calls": -Infinity, "batch_size": 4, "micro_batch": 2}']
LAYOUTS += [
    '{"num_calls": 9, "batch_size": 4, "micro_batch": 0}',
    '{"num_calls": 9, "batch_size": 999999999, "micro_batch": 1}',
]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", *(f'{{"format": 2, "answers_of": {{}}, "layout": {layout}}}' for layout in LAYOUTS),
        json.dumps({"answers_of": DESCRIPTION, "is_complete": True, "num_shards": 1}),  # of the first version
    ],
)  # fmt: skip
def test_a_description_that_is_damaged_or_of_another_version_is_refused(filled, text):
    (filled.folder / "cache.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is damaged or of another version; remove"):
        open_cache(filled.folder)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a teacher cache"):
        open_cache(tmp_path)


def answers_of(cache: TeacherCache, slots: range = range(8)) -> CachedAnswers:
    return CachedAnswers(cache, slots, 8, (5, 0))


def test_every_answer_comes_once_an_epoch_in_another_order_each_epoch(filled):
    answers, known = answers_of(filled), set()
    for file in answers.files:
        known |= {round(float(x[0]), 4) for x in load_file(file)["latents"].float()}
    epochs = []
    for epoch in range(2):
        taken = [
            answers.sample(step, range(8))["latents"][:, 0, 0, 0].tolist()
            for step in range(24 * epoch, 24 * epoch + 24)
        ]
        epochs.append([round(x, 4) for batch in taken for x in batch])
    assert set(epochs[0]) == set(epochs[1]) == known and epochs[0] != epochs[1]
    assert Counter(epochs[0]) == Counter(epochs[1])


def test_a_process_reads_its_rows_of_the_whole(filled):
    whole, part = answers_of(filled), answers_of(filled, range(2, 6))
    for step in range(10):
        expected, found = whole.sample(step, range(8)), part.sample(step, range(4))
        assert all(torch.equal(expected[name][2:6], found[name]) for name in found)


@pytest.mark.parametrize("name", ["latents", "velocity", "sigma", "prompts", "checksums"])
def test_a_changed_value_is_found_when_its_answer_is_read(filled, name):
    file = filled.file_of(LAYOUT.chunks[1])
    tensors = load_file(file)
    tensors[name][0] = tensors[name][0] + 1
    save_file(tensors, file)
    answers = answers_of(filled)
    with pytest.raises(
        UserError, match=rf"{file.name}: is missing or damaged \(its answer 0 is not the one that was written"
    ):
        for step in range(24):
            answers.sample(step, range(8))


@pytest.mark.parametrize("damage", ["shorter", "other shape", "a tensor more"])
def test_a_damaged_file_is_refused_by_its_header(filled, damage):
    file = filled.file_of(LAYOUT.chunks[0])
    if damage == "shorter":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        tensors = load_file(file)
        tensors |= {
            "other shape": {"velocity": tensors["velocity"][:1].clone()},
            "a tensor more": {"more": torch.zeros(1)},
        }[damage]
        save_file(tensors, file)
    with pytest.raises(UserError, match=r"is missing or damaged|is not a whole safetensors file"):
        answers_of(filled)
