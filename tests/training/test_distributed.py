"""Several processes train as one does: the same steps, the same checkpoints, and stops that lose nothing.

Losses, gradient norms and learning rates must agree to 1e-5 over the steps of a run: DDP, FSDP2 of student and teacher, accumulation.
Runs saved by N processes resume with M (1 -> 2 -> 1 with FSDP2); tests/faults kills them at random moments. Processes are forked from the test's own with torchrun's environment, which saves the seconds that loading torch
takes, and gloo carries their messages; the launcher itself is run too. Nothing has run with NCCL.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_distillation
from support.runs import ROOT, as_if_stopped_after, read_metrics, same_weights, weights_of
from support.torchrun import start

RECIPE = ["--replay", 2, "--feature_loss_weight", 0.5]
FSDP = ["--shard"]
# Each with its steps, and the ways beside DDP and accumulation in which two processes share the weights
RECIPES = {
    "trajectory": (RECIPE, 6, [FSDP, ["--shard", "student", "--batch_size", 1, "--grad_accum_steps", 2]]),
    # Maps are idle at replayed answers
    "maps of features, adamw": (["--replay", 3, "--feature_loss_weight", 1, "--optimizer", "adamw"], 6, [FSDP]),
    "few steps": (["--student_steps", 2, "--replay", 2], 4, [["--shard", "student"]]),
    "two experts": (["--calls_per_expert", 2], 6, [FSDP]),
    "three sizes": ([*RECIPE, "--image_sizes", "32x32", "48x32", "32x48"], 4, []),
}


def check_same_run(one: Path, other: Path, rel: float = 1e-5) -> None:
    """The same steps within the rounding of float32, and the same student."""
    for line, same in zip(read_metrics(one), read_metrics(other), strict=True):
        for name in ("loss", "grad_norm", "lr", "teacher_calls", "feature_loss"):
            assert (line[name] or 0) == pytest.approx(same[name] or 0, rel=rel), f"step {line['step']}: {name}"
        buckets, same_buckets = ([value or 0 for value in found["loss_by_sigma"]] for found in (line, same))
        assert buckets == pytest.approx(same_buckets, rel=10 * rel)
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5)


@pytest.fixture
def run(launch, flags_of, tmp_path):
    """Run to the end in so many processes, into a folder of this name; return what was said."""

    def run(output: str, count: int, *flags: object, nodes: int = 1, **named) -> str:
        codes, said = launch(count, flags_of(output, *flags, **named), nodes)
        assert codes == [0] * count, said
        return said

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_take_the_steps_of_one_with_the_same_global_batch(run, teachers, tmp_path, recipe):
    flags, steps, shared = RECIPES[recipe]
    teacher = teachers.two if recipe == "two experts" else teachers.one
    ways = [(1, ["--batch_size", 4]), (2, ["--batch_size", 2]), (1, ["--batch_size", 1, "--grad_accum_steps", 4])]
    ways += [(2, ["--batch_size", 2, *way]) for way in shared]
    for number, (count, way) in enumerate(ways):
        run(str(number), count, *flags, "--max_steps", steps, *way, teacher=teacher)
        check_same_run(tmp_path / "0", tmp_path / str(number))


def test_two_machines_of_two_shard_within_each_and_go_on_with_any_number_of_processes(run, tmp_path):
    """Each machine has a copy of the weights in two shards; whatever wrote a checkpoint, the run ends as that of one process."""
    flags = [*RECIPE, "--shard", "--save_every", 2, "--keep_checkpoints", 9, "--max_steps", 5]
    run("one", 1, *flags, "--batch_size", 4)
    for count, nodes, stopped in ((4, 2, 0), (2, 1, 2)):
        as_if_stopped_after(tmp_path / "two", stopped)
        said = run("two", count, *flags, "--batch_size", 4 // count, nodes=nodes)
        assert stopped == 0 or f"Resuming from step {stopped}" in said
        check_same_run(tmp_path / "one", tmp_path / "two")


def test_a_teacher_cache_that_two_processes_fill_is_that_of_one_bit_for_bit(run, tmp_path):
    flags = ["--max_steps", 8, "--batch_size", 2, "--teacher_cache"]
    run("two", 2, *flags, tmp_path / "cache")
    said = run("one", 1, *flags, tmp_path / "cache", "--batch_size", 4, "--offline_teacher")
    assert "Asking the teacher" not in said
    run("alone", 1, *flags, tmp_path / "alone cache", "--grad_accum_steps", 2)
    answers = [
        {file.name: file.read_bytes() for file in folder.glob("answers_*")} for folder in tmp_path.glob("*cache")
    ]
    assert len(answers) == 2 and answers[0] == answers[1] != {}
    for output in ("one", "two"):
        check_same_run(tmp_path / "alone", tmp_path / output)


@pytest.mark.parametrize("shard", [[], ["--shard", "student"]])
def test_two_processes_stopped_and_gone_on_with_end_as_if_never_stopped(run, tmp_path, shard):
    flags = [*RECIPE, *shard, "--batch_size", 1, "--grad_accum_steps", 2, "--save_every", 3, "--keep_checkpoints", 9]
    run("whole", 2, *flags, "--max_steps", 7)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    as_if_stopped_after(tmp_path / "stopped", 3)
    assert "Resuming from step 3" in run("stopped", 2, *flags, "--max_steps", 7)
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_goes_on_with_another_number_of_processes(run, tmp_path):
    flags = [*RECIPE, "--shard", "--save_every", 2, "--lr_scheduler", "constant"]
    for count, steps, batch_size in ((1, 2, 4), (2, 4, 2), (1, 6, 4)):
        before = read_metrics(tmp_path / "out") if steps > 2 else []
        said = run("out", count, *flags, "--batch_size", batch_size, "--max_steps", steps)
        assert steps == 2 or f"Resuming from step {steps - 2}" in said
        lines = read_metrics(tmp_path / "out")
        assert lines[: len(before)] == before and [line["step"] for line in lines] == list(range(1, steps + 1))


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_saves(flags_of, tmp_path):
    flags = flags_of("out", *RECIPE, "--batch_size", 2, "--max_steps", 5000, "--save_every", 1000)
    processes, metrics = start(2, flags, tmp_path / "log.txt"), tmp_path / "out" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.05)
        assert all(process.is_alive() for process in processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [130, 130]
    steps = len(read_metrics(tmp_path / "out"))
    assert (tmp_path / "out" / "checkpoints" / f"step_{steps:08d}.json").exists()


def test_torchrun_starts_a_run_that_speaks_once(flags_of, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = ["train_distillation.py", *flags_of("out", *RECIPE, "--batch_size", 2, "--max_steps", 3)]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" of 4 samples, ") == 1
    assert done.stdout.count("Done: 3 steps") == 1 and done.stderr.count("step 1/3") == 1
    assert len(read_metrics(tmp_path / "out")) == 3


def test_a_mistake_is_said_by_the_first_process_and_by_others_under_their_number(launch, flags_of):
    codes, said = launch(2, flags_of("out", "--max_steps", 3, "--layers", "0,99"))
    assert codes == [2, 2] and said.count("\nprocess 1: error: ") == 1 and said.startswith("error: "), said


def test_half_an_environment_of_a_launcher_is_refused(run_main, flags_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_main(train_distillation.main, *flags_of("out", "--max_steps", 3)).refused("WORLD_SIZE without RANK")
