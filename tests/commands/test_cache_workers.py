"""Workers fill a --teacher_cache and a run learns from it: the commands themselves, as several people or machines start them.

Whoever asked for which part, the student is bit for bit that of one process that asked for all parts and trained by itself.

pytest tests/commands/test_cache_workers.py
"""

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_distillation
from support.processes import fork, run_and_exit
from support.runs import PRUNED_CONFIG, read_metrics, snapshot, weights_of
from wandistiller.command_line import run_command
from wandistiller.files.output_folder import locked_folder
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets import cache_builders, cache_parts
from wandistiller.targets.answers import TeacherAnswers

LONGEST_S = 120.0
NUM_STEPS = 36


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    """Several shards in every part, short waits, and a file with a byte for every answer; forks inherit it."""
    monkeypatch.setattr(cache_parts, "SHARD_BATCHES", 2)
    monkeypatch.setattr(cache_builders, "POLL_S", 0.05)
    ask = TeacherAnswers.next

    def counted(self: TeacherAnswers):
        with (tmp_path / "asked").open("ab") as file:
            file.write(b".")
        return ask(self)

    monkeypatch.setattr(TeacherAnswers, "next", counted)


@pytest.fixture
def num_asked(tmp_path) -> Callable[[], int]:
    """How many batches the teacher was asked for since the last call."""

    def count() -> int:
        file = tmp_path / "asked"
        number = file.stat().st_size if file.exists() else 0
        file.unlink(missing_ok=True)
        return number

    return count


def started(argv: list[str], log: Path) -> multiprocessing.Process:
    """Start the command in a fork, which spares it the seconds that loading torch takes."""

    def child() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        run_and_exit(lambda: run_command(lambda: train_distillation.main(argv)), descriptor)

    return fork(child)


def ended(processes: list[multiprocessing.Process]) -> list[int | None]:
    for process in processes:
        process.join(LONGEST_S)
    return [process.exitcode for process in processes]


def same_student(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def flags_for(cache: Path, *more: object) -> list[object]:
    return ["--teacher_cache", cache, "--cache_parts", 3, "--max_steps", NUM_STEPS, "--replay", 2, *more]


@pytest.mark.parametrize(
    "sizes",
    [pytest.param([], marks=pytest.mark.slow), ["--image_sizes", "32x32", "48x32"]],
    ids=["one size", "two sizes"],
)
def test_three_workers_fill_what_a_run_learns_from_as_one_process_alone(flags_of, tmp_path, num_asked, sizes):
    log, output = tmp_path / "log.txt", tmp_path / "student"
    alone = flags_of("alone", *flags_for(tmp_path / "alone cache", *sizes))
    assert ended([started(alone, log)]) == [0], log.read_text()
    assert num_asked() == NUM_STEPS // 2
    output.mkdir()
    worker = flags_of("student", *flags_for(tmp_path / "cache", "--cache_only", *sizes))
    before = snapshot(output)
    with locked_folder(output):  # another run is at work there, which is none of a worker's business
        workers = [started(worker, tmp_path / f"worker{number}.txt") for number in range(3)]
        assert ended(workers) == [0, 0, 0], (tmp_path / "worker0.txt").read_text()
    assert num_asked() == NUM_STEPS // 2
    assert snapshot(output) == before and not list(output.iterdir())
    said = "".join((tmp_path / f"worker{number}.txt").read_text() for number in range(3))
    assert said.count("Asking the teacher for part") == 3 * max(1, len(sizes[1:])) and "Traceback" not in said
    assert snapshot(tmp_path / "cache").keys() == snapshot(tmp_path / "alone cache").keys() | {
        name for name in snapshot(tmp_path / "cache") if "held_out" in name
    }
    learner = flags_of("student", *flags_for(tmp_path / "cache", *sizes))
    assert ended([started(learner, log)]) == [0], log.read_text()
    assert num_asked() == 0 and same_student(output, tmp_path / "alone")


def test_a_run_that_is_no_worker_joins_in_and_then_trains(flags_of, tmp_path, num_asked):
    flags = flags_for(tmp_path / "cache")
    worker, learner = flags_of("none", *flags, "--cache_only"), flags_of("student", *flags, "--offline_teacher")
    processes = [started(argv, tmp_path / f"log{number}.txt") for number, argv in enumerate((worker, worker, learner))]
    assert ended(processes) == [0, 0, 0], (tmp_path / "log2.txt").read_text()
    assert num_asked() == NUM_STEPS // 2
    assert len(read_metrics(tmp_path / "student")) == NUM_STEPS and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_workers_killed_at_random_moments_of_their_whole_life_leave_a_cache_as_one_alone(flags_of, tmp_path, num_asked):
    log, chance, kills = tmp_path / "log.txt", random.Random(3), 0
    assert ended([started(flags_of("alone", *flags_for(tmp_path / "alone cache")), log)]) == [0], log.read_text()
    num_asked()
    for number in range(4):
        cache, prompts = tmp_path / f"cache{number}", tmp_path / f"prompts{number}"
        flags = flags_for(cache, "--prompt_cache", prompts)
        worker = flags_of("none", *flags, "--cache_only")
        shutil.copytree(flags_of("none")[flags_of("none").index("--prompt_cache") + 1], prompts)
        since = 0
        while not (cache / "cache.json").exists() or not json.loads((cache / "cache.json").read_text())["is_complete"]:
            workers = [started(worker, log) for _ in range(3)]
            time.sleep(chance.uniform(0.3, 2.5))
            for process in workers:
                process.kill()
                process.join()
            since, kills = since + 3, kills + 3
        assert num_asked() <= NUM_STEPS // 2 + 2 * since
        learner = flags_of(f"student{number}", *flags, "--offline_teacher")
        assert ended([started(learner, log)]) == [0], log.read_text()
        assert same_student(tmp_path / f"student{number}", tmp_path / "alone")
    assert kills >= 12


def test_an_offline_run_measures_at_states_that_a_worker_has_kept(train, teachers, tmp_path, monkeypatch):
    flags = ["--teacher_cache", tmp_path / "cache", "--cache_parts", 2, "--max_steps", 60, "--replay", 1]
    flags += ["--batch_size", 16, "--guidance_scale", 1]
    worker = train(teachers.one, PRUNED_CONFIG, *flags, "--cache_only")
    assert worker.code == 0, worker.err
    assert "Held-out states" in worker.out and not (tmp_path / "out").exists()
    assert f"Done: {tmp_path / 'cache'} holds all" in worker.out
    before = snapshot(tmp_path / "cache")

    def refuse(*args):
        raise AssertionError("a teacher was made")

    monkeypatch.setattr(Teacher, "__init__", refuse)
    assert train(teachers.one, PRUNED_CONFIG, *flags, "--cache_only").code == 0  # there is nothing left to do
    learner = train(teachers.one, PRUNED_CONFIG, *flags, "--offline_teacher", "--cache_parts", 7)
    assert learner.code == 0, learner.err
    assert any(line["velocity_error"] for line in read_metrics(tmp_path / "out"))
    assert snapshot(tmp_path / "cache") == before


def test_parts_that_cannot_be_asked_for_are_refused_before_anything_is_written(
    train, flags_of, launch, teachers, tmp_path
):
    cache = ["--teacher_cache", tmp_path / "cache", "--max_steps", 4, "--replay", 2]
    refused = [
        ([*cache, "--cache_parts", 3], "--cache_parts 3: ", "2 batches of answers; give at most 2"),
        (["--cache_parts", 2, "--max_steps", 4], "--cache_parts", "--teacher_cache FOLDER"),
        (["--cache_only", "--max_steps", 4], "--cache_only", "--teacher_cache FOLDER"),
        ([*cache, "--cache_only", "--dry_run"], "--cache_only", "--dry_run"),
        ([*cache, "--cache_parts", 0], "--cache_parts", "1"),
    ]
    for flags, *words in refused:
        outcome = train(teachers.one, PRUNED_CONFIG, *flags)
        assert outcome.code == 2 and all(word in outcome.err for word in words), outcome.err
        assert "Traceback" not in outcome.err and len(outcome.err) < 500
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()
    codes, said = launch(2, flags_of("two", *cache, "--cache_parts", 2, "--batch_size", 2))
    assert codes == [2, 2] and "is for processes that are started one by one" in said
    assert not (tmp_path / "cache").exists()
    assert train(teachers.one, PRUNED_CONFIG, *cache, "--cache_parts", 2, "--cache_only").code == 0
    codes, said = launch(2, flags_of("two", *cache, "--cache_parts", 2, "--batch_size", 2))
    assert codes == [0, 0], said  # a complete one serves any run
