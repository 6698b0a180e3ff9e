"""Several builders fill one teacher cache: real processes that know nothing of each other, which may be killed at any moment.

The oracle is one builder alone with the same parts: whoever asks for which part, the folder ends the same to the byte. Every call of
the teacher is counted in a file, so that none is asked for twice but what a killed builder had not written yet.

pytest tests/targets/test_cache_builders.py
"""

import errno
import fcntl
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.caches import BATCH_SIZE, contents, make_answers, make_description
from wandistiller.errors import UserError
from wandistiller.files import locks
from wandistiller.targets import cache_builders, cache_parts
from wandistiller.targets.answers import TeacherAnswers
from wandistiller.targets.cache import TeacherCache
from wandistiller.targets.cache_builders import Filling, fill_together
from wandistiller.targets.cache_parts import CachePart, parts_of
from wandistiller.targets.cache_shards import STORED_NAMES
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.prompt_order import PromptOrder
from wandistiller.targets.state_batch import DrawOptions
from wandistiller.targets.trajectories import PathOptions, TrajectoryStates

NUM_BATCHES, NUM_PARTS = 26, 3  # 9, 9 and 8 batches
SHARD_BATCHES = 4
LONGEST_S = 60.0


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Several shards in every part, and no long waits; forks inherit it."""
    monkeypatch.setattr(cache_parts, "SHARD_BATCHES", SHARD_BATCHES)
    monkeypatch.setattr(cache_builders, "POLL_S", 0.02)
    monkeypatch.setattr(locks, "POLL_S", 0.02)


def open_cache(folder: Path, num_parts: int = NUM_PARTS, num_batches: int = NUM_BATCHES, **description) -> TeacherCache:
    parts = parts_of(num_batches, num_parts) if num_parts > 1 else []
    return TeacherCache(folder, make_description() | description, parts=parts)


def fill(
    folder: Path,
    num_parts: int = NUM_PARTS,
    on_batch: Callable[[CachePart, int], None] = lambda part, done: None,
    on_wait: Callable[[str], None] = lambda text: None,
) -> TeacherCache:
    """Be a builder until the cache is complete; each call of the teacher is a byte in a file beside the folder."""
    cache = open_cache(folder, num_parts)
    log = folder.with_suffix(".asked")

    def counted(part: CachePart) -> TeacherAnswers:
        answers = make_answers(part=(part.index, num_parts))
        ask = answers.ask

        def counting(*args: object):
            with log.open("ab") as file:
                file.write(b"%d" % part.index)
            return ask(*args)

        answers.ask = counting
        return answers

    filling = Filling(cache, NUM_BATCHES, counted, lambda part: lambda done: on_batch(part, done))
    fill_together([filling], on_wait)
    return cache


def num_asked(folder: Path) -> int:
    return len(folder.with_suffix(".asked").read_bytes())


def in_processes(*works: Callable[[], object]) -> list[multiprocessing.Process]:
    """Start builders that begin together, so that each gets a part."""
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(len(works))

    def child(work: Callable[[], object]) -> None:
        gate.wait(LONGEST_S)
        work()

    processes = [context.Process(target=child, args=(work,)) for work in works]
    for process in processes:
        process.start()
    return processes


def codes_of(processes: list[multiprocessing.Process]) -> list[int | None]:
    for process in processes:
        process.join(LONGEST_S)
    return [process.exitcode for process in processes]


def slowly(part: CachePart, done: int) -> None:
    """So that no builder is done before another has begun."""
    time.sleep(0.02)


def dies_at(batch: int) -> Callable[[CachePart, int], None]:
    """Kill -9 as the answer to a batch has come."""

    def on_batch(part: CachePart, done: int) -> None:
        slowly(part, done)
        if done == batch:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_batch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one builder makes of the same parts by itself: its folder, to be read only."""
    folder = tmp_path_factory.mktemp("alone") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_parts, "SHARD_BATCHES", SHARD_BATCHES)
        fill(folder)
    assert num_asked(folder) == NUM_BATCHES
    return folder


# ---- what is in it ----


def test_each_part_holds_what_its_own_paths_are_answered_and_is_read_in_order(alone):
    names = [path.name for path in sorted(alone.iterdir())]
    assert names == [*(f"answers_{number:05d}.safetensors" for number in range(3 + 3 + 2)), "cache.json"]
    shards = [load_file(alone / name) for name in names[:-1]]
    for part, (start, end, num_batches) in enumerate([(0, 3, 9), (3, 6, 9), (6, 8, 8)]):
        answers, batches = make_answers(part=(part, NUM_PARTS)), []
        for _ in range(num_batches):
            batches.append(answers.next())
            answers.advance(batches[-1], batches[-1].velocity, 0.0)
        stored = {name: torch.cat([shard[name] for shard in shards[start:end]]) for name in STORED_NAMES}
        assert torch.equal(stored["latents"], torch.cat([batch.latents for batch in batches]).half())
        assert torch.equal(stored["velocity"], torch.cat([batch.velocity for batch in batches]).half())
        assert stored["prompts"].tolist() == [prompt for batch in batches for prompt in batch.prompts]
    for number, one in enumerate(shards):
        assert all(not torch.equal(one["latents"][:3], other["latents"][:3]) for other in shards[:number])
    about = json.loads((alone / "cache.json").read_text())
    assert about["is_complete"] and sum(about["rows"]) == NUM_BATCHES * BATCH_SIZE and "num_parts" not in about


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8, 11])
def test_parts_share_out_the_paths_and_the_prompts_of_one_build(num_parts):
    draw = DrawOptions(latent_shape=(1, 2, 2), num_prompts=10, lanes=Lanes(2), shift=3.0, seed=4)
    built = [
        TrajectoryStates(draw.of_part(part, num_parts), PathOptions(num_steps=8, per_lane=8))
        for part in range(num_parts)
    ]
    assert sum(states.num_paths for states in built) == max(8, num_parts)
    assert len({states.latents.sum().item() for states in built}) == num_parts  # noises of their own
    whole = PromptOrder(10, seed=4)
    expected = [whole.take(1)[0] for _ in range(33)]
    hands = [PromptOrder(10, seed=4, part=part, num_parts=num_parts) for part in range(num_parts)]
    dealt = [hand.take(1)[0] for _, hand in zip(range(33), hands * 33, strict=False)]
    assert dealt == expected
    resumed = PromptOrder(10, seed=4, part=0, num_parts=num_parts)
    resumed.load_state_dict(hands[-1].state_dict())
    assert [resumed.take(2) for _ in range(9)] == [hands[-1].take(2) for _ in range(9)]


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_parts_hold_all_batches_in_shards_of_their_own(num_parts):
    parts = parts_of(NUM_BATCHES, num_parts)
    assert sum(part.num_batches for part in parts) == NUM_BATCHES
    assert [number for part in parts for number in part.numbers] == list(range(parts[-1].numbers.stop))
    assert all(len(part.numbers) == math.ceil(part.num_batches / SHARD_BATCHES) for part in parts)


# ---- several at once ----


def test_three_builders_at_once_make_what_one_makes_and_ask_nothing_twice(alone, tmp_path):
    folder = tmp_path / "cache"
    processes = in_processes(*[lambda: fill(folder, on_batch=slowly)] * 3)
    assert codes_of(processes) == [0, 0, 0]
    assert contents(folder) == contents(alone)
    assert num_asked(folder) == NUM_BATCHES
    first = folder.with_suffix(".asked").read_bytes()[:9]
    assert set(first) == set(b"012")  # all three were at work from the beginning
    assert open_cache(folder).num_answers == NUM_BATCHES * BATCH_SIZE


def test_the_others_take_over_what_a_killed_builder_leaves(alone, tmp_path):
    folder, dead = tmp_path / "cache", SHARD_BATCHES + 2
    processes = in_processes(*[lambda: fill(folder, on_batch=slowly)] * 2, lambda: fill(folder, on_batch=dies_at(dead)))
    assert codes_of(processes) == [0, 0, -signal.SIGKILL]
    assert contents(folder) == contents(alone)
    assert num_asked(folder) == NUM_BATCHES + 2  # the two batches that were not in a shard yet


def test_all_are_killed_and_started_again(alone, tmp_path):
    folder = tmp_path / "cache"
    works = [lambda dead=dead: fill(folder, on_batch=dies_at(dead)) for dead in (1, 5, 7)]
    assert codes_of(in_processes(*works)) == [-signal.SIGKILL] * 3
    with pytest.raises(UserError, match="begun with --cache_parts 3, this run has 2"):
        open_cache(folder, 2)
    processes = in_processes(*[lambda: fill(folder)] * 3)
    assert codes_of(processes) == [0, 0, 0]
    assert contents(folder) == contents(alone)
    assert num_asked(folder) == NUM_BATCHES + 1 + 1 + 3


@pytest.mark.slow
def test_builders_that_are_killed_at_random_moments_lose_a_shard_at_most(alone, tmp_path):
    """Six builders, one of which is killed and started again sixty times, also while it locks, resumes and finishes."""
    chance = random.Random(0)
    for number in range(5):
        folder, kills = tmp_path / f"cache{number}", 0
        processes = in_processes(*[lambda folder=folder: fill(folder, on_batch=slowly)] * 3)
        while kills < 12 and any(process.is_alive() for process in processes):
            time.sleep(chance.uniform(0.0, 0.2))
            index = chance.randrange(3)
            if processes[index].is_alive():
                processes[index].kill()
                kills += 1
            processes[index].join()
            (processes[index],) = in_processes(lambda folder=folder: fill(folder, on_batch=slowly))
        assert codes_of(processes) == [0, 0, 0]
        assert contents(folder) == contents(alone)
        assert num_asked(folder) <= NUM_BATCHES + kills * SHARD_BATCHES


def test_a_builder_says_whom_it_waits_for_once_and_takes_over_when_that_one_dies(alone, tmp_path):
    folder, said = tmp_path / "cache", []
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def hang(part: CachePart, done: int) -> None:
        begun.set()
        signal.pause()

    def on_wait(text: str) -> None:
        said.append(text)
        deadline.append(time.monotonic() + 0.2)

    def kill_later() -> None:
        while not deadline or time.monotonic() < deadline[0]:
            time.sleep(0.01)
        os.kill(hanging.pid, signal.SIGKILL)

    deadline: list[float] = []
    (hanging,) = in_processes(lambda: fill(folder, on_batch=hang))
    assert begun.wait(LONGEST_S)

    killer = threading.Thread(target=kill_later)
    killer.start()
    fill(folder, on_wait=on_wait)
    killer.join()
    assert said == [f"{folder}: part 1 of 3 (process {hanging.pid} on {os.uname().nodename})"]
    assert contents(folder) == contents(alone) and codes_of([hanging]) == [-signal.SIGKILL]


def test_builders_of_a_cache_in_one_part_take_turns(tmp_path):
    """As two runs that share a new --teacher_cache do: the second learns from what the first asks for."""
    folder, whole = tmp_path / "cache", tmp_path / "whole"
    TeacherCache(whole, make_description()).build(make_answers(), NUM_BATCHES, lambda done: None)
    processes = in_processes(
        lambda: fill(folder, 1, slowly), lambda: fill(folder, 1, dies_at(6)), lambda: fill(folder, 1, slowly)
    )
    assert sorted(codes_of(processes)) in ([0, 0, 0], [-signal.SIGKILL, 0, 0])
    assert contents(folder) == contents(whole)
    assert num_asked(folder) <= NUM_BATCHES + 2


def test_a_kill_before_the_cache_is_marked_complete_asks_for_nothing_again(alone, tmp_path, monkeypatch):
    folder = tmp_path / "cache"

    def killed_in_finish() -> None:
        TeacherCache.finish = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        fill(folder)

    assert codes_of(in_processes(killed_in_finish)) == [-signal.SIGKILL]
    assert not open_cache(folder).is_complete
    fill(folder, on_batch=lambda part, done: pytest.fail("the teacher was asked"))
    assert contents(folder) == contents(alone)


# ---- refused ----


@pytest.fixture
def begun(tmp_path):
    """A cache that one builder has begun and left."""
    folder = tmp_path / "cache"
    assert codes_of(in_processes(lambda: fill(folder, on_batch=dies_at(SHARD_BATCHES + 1)))) == [-signal.SIGKILL]
    return folder


def test_a_builder_of_something_else_is_refused_and_changes_nothing(begun):
    before = contents(begun)
    for changes, words in [
        ({"num_parts": 1}, "--cache_parts 3, this run has 1"),
        ({"num_parts": 4}, "--cache_parts 3, this run has 4"),
        ({"num_batches": 30}, "begun for 26 batches of answers, this run asks for 30"),
        ({"guidance_scale": 5.0}, "guidance_scale 3.0, this run has 5.0"),
    ]:
        with pytest.raises(UserError, match=words) as refusal:
            open_cache(begun, **changes)
        assert len(str(refusal.value)) < 500
    assert contents(begun) == before


def test_a_builder_of_something_else_that_comes_at_the_same_moment_is_refused_too(begun, tmp_path):
    late = tmp_path / "late"
    other = open_cache(late, guidance_scale=5.0)  # there is nothing yet, so nothing to refuse
    first = open_cache(late)
    first.begin()
    with pytest.raises(UserError, match=r"guidance_scale 3.0, this run has 5.0"):
        other.begin()


def test_a_folder_that_another_builder_begins_at_the_same_moment_is_no_strange_one(tmp_path, monkeypatch):
    folder, listed = tmp_path / "cache", Path.iterdir
    other = open_cache(folder)

    def list_while_another_begins(path: Path):
        if path == folder and not (folder / "cache.json").exists():
            other.begin()
        return listed(path)

    folder.mkdir()
    monkeypatch.setattr(Path, "iterdir", list_while_another_begins)
    assert not open_cache(folder).is_complete
    assert (folder / "cache.json").exists()


def test_a_complete_cache_serves_any_number_of_parts(alone):
    assert {open_cache(alone, parts).num_answers for parts in (1, 2, 3, 9)} == {NUM_BATCHES * BATCH_SIZE}


@pytest.mark.parametrize("name", ["state_part_0.safetensors", "answers_00000.safetensors"])
def test_what_a_killed_builder_left_damaged_is_named(begun, name):
    (begun / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"{name}: is missing or damaged.*remove"):
        fill(begun, on_batch=lambda part, done: pytest.fail("the teacher was asked"))


def test_without_locks_one_builder_works_and_parts_are_refused(tmp_path, monkeypatch):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"--cache_parts 3: .* file system without locks .*--teacher_cache"):
        fill(tmp_path / "parts")
    assert fill(tmp_path / "one", 1).is_complete


def test_a_lock_is_held_by_one_at_a_time_and_leaves_no_file(tmp_path):
    """Holders remove the file that they have locked; nobody may end up with a lock on a file that is no longer there."""
    lock, inside = tmp_path / "lock", tmp_path / "inside"

    def take_turns() -> None:
        for _ in range(60):
            with locks.waited_for(lock):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                inside.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "POLL_S", 0.0)
        assert codes_of(in_processes(*[take_turns] * 3)) == [0, 0, 0]
    assert not list(tmp_path.iterdir())
