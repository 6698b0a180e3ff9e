"""Several processes train as one does: the same steps, the same checkpoints, and stops that lose nothing.

Losses, gradient norms and learning rates must agree to 1e-5 over 20 steps: DDP, FSDP2 of student and teacher,
accumulation. Runs saved by N processes resume with M (1 -> 2 -> 1 with FSDP2), and both processes are killed at 2
random moments (20 are slow). Processes are forked from the test's own with torchrun's environment, which saves the
seconds that loading torch takes, and gloo carries their messages; the launcher itself is run too. Nothing has run with
NCCL.

pytest tests/training/test_distributed.py
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_distillation
from support.runs import (
    ROOT,
    read_metrics,
    weights_of,
)
from support.torchrun import start

RECIPE = ["--replay", 2, "--student_rollout", 0, 1, "--renoise_fraction", 0.5, "--feature_loss_weight", 0.5]
RECIPES = {
    "trajectory": RECIPE,
    "maps of features": ["--init", "random", "--replay", 8, "--feature_loss_weight", 1],  # idle at replayed answers
    "noise": ["--states", "noise"],
    "few steps": ["--student_steps", 2, "--replay", 2],
    "two experts": ["--calls_per_expert", 2],
    "three sizes": [*RECIPE, "--image_sizes", "32x32", "48x32", "32x48"],
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


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- the same steps, however a batch is shared out ----


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_take_the_steps_of_one_with_the_same_global_batch(flags_of, launch, teachers, tmp_path, recipe):
    flags = [*RECIPES[recipe], "--max_steps", {"trajectory": 20, "maps of features": 12}.get(recipe, 8)]
    teacher = teachers.two if recipe == "two experts" else teachers.one

    def run(output: str, count: int, *shared: object) -> None:
        codes, said = launch(count, flags_of(output, *flags, *shared, teacher=teacher))
        assert codes == [0] * count, said

    run("alone", 1, "--batch_size", 4)
    run("ddp", 2, "--batch_size", 2)
    run("passes", 1, "--batch_size", 1, "--grad_accum_steps", 4)
    for output in ("ddp", "passes"):
        check_same_run(tmp_path / "alone", tmp_path / output)
    if recipe in ("trajectory", "two experts", "maps of features"):
        run("fsdp", 2, "--batch_size", 2, "--shard", "--eval_every", 4)  # measuring leaves training as it was
        check_same_run(tmp_path / "alone", tmp_path / "fsdp")
    if recipe == "trajectory":
        run("fsdp in passes", 2, "--batch_size", 1, "--grad_accum_steps", 2, "--shard", "student")
        check_same_run(tmp_path / "alone", tmp_path / "fsdp in passes")


def test_muon_takes_the_same_steps_of_whole_matrices_in_one_process_in_two_and_sharded(flags_of, launch, tmp_path):
    """With torch's own, whose products are always bfloat16, the losses of shards are off by more than 1e-5 within these steps."""
    flags = [*RECIPE, "--optimizer", "muon", "--max_steps", 12]
    assert launch(1, flags_of("alone", *flags, "--batch_size", 4))[0] == [0]
    for output, shard in (("ddp", []), ("fsdp", ["--shard", "student"])):
        codes, said = launch(2, flags_of(output, *flags, "--batch_size", 2, *shard))
        assert codes == [0, 0], said
        check_same_run(tmp_path / "alone", tmp_path / output)


def test_two_processes_fill_a_teacher_cache_together_and_any_number_learns_from_it(flags_of, launch, tmp_path):
    def files_of(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("answers_*")}

    flags = ["--teacher_cache", tmp_path / "cache", "--max_steps", 20]
    assert launch(2, flags_of("two", *flags, "--batch_size", 2))[0] == [0, 0]
    codes, said = launch(1, flags_of("one", *flags, "--batch_size", 4, "--offline_teacher"))
    assert codes == [0] and "Asking the teacher" not in said, said
    alone = ["--teacher_cache", tmp_path / "alone cache", "--max_steps", 20, "--batch_size", 2, "--grad_accum_steps", 2]
    assert launch(1, flags_of("alone", *alone))[0] == [0]
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "alone cache")
    check_same_run(tmp_path / "alone", tmp_path / "two")


# ---- stops ----


@pytest.mark.parametrize("shard", [[], ["--shard", "student"], ["--shard", "student", "--optimizer", "muon"]])
def test_two_processes_stopped_and_gone_on_with_end_as_if_never_stopped(flags_of, launch, tmp_path, shard):
    flags = [*RECIPE, *shard, "--batch_size", 1, "--grad_accum_steps", 2, "--save_every", 4, "--keep_checkpoints", 9]
    assert launch(2, flags_of("whole", *flags, "--max_steps", 11))[0] == [0, 0]
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (8, 11):  # as if it had been stopped between steps 4 and 8
        (tmp_path / "stopped" / "checkpoints" / f"step_{step:08d}.json").unlink()
    codes, said = launch(2, flags_of("stopped", *flags, "--max_steps", 11))
    assert codes == [0, 0] and "Resuming from step 4" in said
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert [line["loss"] for line in read_metrics(tmp_path / "whole")] == [
        line["loss"] for line in read_metrics(tmp_path / "stopped")
    ]


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_two_processes_killed_at_random_moments_end_as_if_never_killed(flags_of, launch, tmp_path, num_kills):
    flags = [*RECIPE, "--batch_size", 2, "--max_steps", 12 * num_kills, "--save_every", 1]
    assert launch(2, flags_of("whole", *flags))[0] == [0, 0]
    chance, num_unfinished, saved = random.Random(1), 0, tmp_path / "killed" / "checkpoints"
    for _ in range(num_kills):
        before = set(saved.glob("*.json"))
        processes = start(2, flags_of("killed", *flags), tmp_path / "log.txt")
        while all(process.is_alive() for process in processes) and set(saved.glob("*.json")) <= before:
            time.sleep(0.005)  # until they have saved by themselves
        time.sleep(chance.uniform(0, 0.5))  # in a step, or in one of the saves that follow every step
        assert all(process.is_alive() for process in processes), "they were over before they could be killed"
        for process in processes:
            process.kill()
            process.join()
        num_unfinished += any(not path.with_suffix(".json").exists() for path in saved.iterdir() if path.is_dir())
    assert num_unfinished or num_kills < 20, "no kill fell into a save"
    codes, said = launch(2, flags_of("killed", *flags))
    assert codes == [0, 0] and "Resuming from step" in said
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_run_goes_on_with_another_number_of_processes_and_the_weights_it_had(flags_of, launch, tmp_path):
    flags = [*RECIPE, "--shard", "--save_every", 5, "--lr_scheduler", "constant"]
    for count, steps, batch_size in ((1, 5, 4), (2, 10, 2), (1, 15, 4)):
        codes, said = launch(count, flags_of("out", *flags, "--batch_size", batch_size, "--max_steps", steps))
        assert codes == [0] * count, said
        assert steps == 5 or (f"Resuming from step {steps - 5}" in said and "start anew:" not in said)
    assert launch(1, flags_of("alone", *flags, "--batch_size", 4, "--max_steps", 5))[0] == [0]
    first = read_metrics(tmp_path / "alone")
    assert [line["loss"] for line in read_metrics(tmp_path / "out")[:5]] == [line["loss"] for line in first]
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == list(range(1, 16))


def test_the_same_command_on_more_processes_goes_on_and_says_that_its_states_start_anew(flags_of, launch, tmp_path):
    flags = [*RECIPE, "--shard", "--save_every", 5, "--batch_size", 2]
    before = None
    for count, steps in ((1, 5), (2, 6), (1, 7)):
        codes, said = launch(count, flags_of("out", *flags, "--max_steps", steps, "--lr", 1e-9 if steps > 5 else 1e-3))
        assert codes == [0] * count, said
        if before is not None:  # with next to no learning rate, the weights that were loaded are those that are saved
            assert "start anew" in said
            for name, weight in weights_of(tmp_path / "out").items():
                torch.testing.assert_close(weight, before[name], rtol=0, atol=2e-3)
        before = weights_of(tmp_path / "out")


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_saves(flags_of, tmp_path):
    processes = start(
        2, flags_of("out", *RECIPE, "--batch_size", 2, "--max_steps", 5000, "--save_every", 1000), tmp_path / "l"
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.05)
        assert all(process.is_alive() for process in processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [130, 130]
    steps = len(read_metrics(tmp_path / "out"))
    assert (tmp_path / "out" / "checkpoints" / f"step_{steps:08d}.json").exists()


# ---- the launcher itself ----


def torchrun(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_torchrun_starts_a_run_that_speaks_once(flags_of, tmp_path):
    flags = flags_of("out", *RECIPE, "--batch_size", 2, "--max_steps", 3)
    done = torchrun("--nproc_per_node", 2, "train_distillation.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Samples a step: --batch_size 2 x --grad_accum_steps 1 x 2 processes = 4") == 1
    assert done.stdout.count("Done: 3 steps") == 1 and done.stderr.count("step 1/3") == 1
    assert len(read_metrics(tmp_path / "out")) == 3


def test_a_mistake_is_said_once_by_all_processes_together(flags_of):
    done = torchrun(
        "--nproc_per_node", 2, "train_distillation.py", *flags_of("out", "--max_steps", 3, "--layers", "0,99")
    )
    assert done.returncode != 0 and done.stderr.count("error: ") == 1


@pytest.mark.parametrize("flag", ["--nproc_per_node=2", "--nnodes", "--local-rank=0"])
def test_a_flag_of_the_launcher_is_known_as_such(run_main, flag):
    outcome = run_main(train_distillation.main, flag)
    assert outcome.code == 2 and "is a flag of torchrun: torchrun --" in outcome.err


def test_a_flag_of_the_launcher_keeps_its_value_in_the_answer(run_main):
    outcome = run_main(train_distillation.main, "--nproc_per_node", 2, "--max_steps", 3)
    assert outcome.code == 2 and "torchrun --nproc_per_node 2 train_distillation.py ..." in outcome.err


def test_half_an_environment_of_a_launcher_is_refused(run_main, flags_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = run_main(train_distillation.main, *flags_of("out", "--max_steps", 3))
    assert outcome.code == 2 and "WORLD_SIZE without RANK" in outcome.err and len(outcome.err.splitlines()) == 1
