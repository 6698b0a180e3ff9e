"""A run that is stopped, killed or damaged resumes as if nothing had happened, or says why it cannot.

N + M steps with a stop between must be N + M without: weights and metrics bit for bit on a CPU, for every kind of
states, with replay, average, rollouts and accumulation. A real process is killed with SIGKILL at 4 random moments, in
steps and in saves (20 are slow, 2 minutes). A full disk is a real limit on file size; files are cut, flipped and
removed.

pytest tests/training/test_checkpoints.py
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_distillation
from support.runs import PRUNED_CONFIG, at_most, read_metrics, weights_of
from wandistiller.reports.progress import Progress
from wandistiller.training.checkpoints import Checkpoints

# Every kind of states, with what moves beside them
RECIPES = {
    "trajectory": ["--replay", 2, "--student_rollout", 0, 1, "--renoise_fraction", 0.5, "--feature_loss_weight", 0.5],
    "accumulated": ["--replay", 2, "--student_rollout", 0, 1, "--renoise_fraction", 0.25, "--grad_accum_steps", 2],
    "noise": ["--states", "noise", "--prompt_swap", 0.5],
    "few steps": ["--student_steps", 2, "--replay", 2],
    "two experts": ["--calls_per_expert", 2],
    "muon": ["--optimizer", "muon", "--init", "random", "--feature_loss_weight", 1, "--replay", 2],
}
STEPS = 11
FLAGS = ["--max_steps", STEPS, "--lr", 1e-3, "--batch_size", 3]


def stop_after(monkeypatch, step: int) -> None:
    """The power goes after so many steps: what comes after the step's metrics does not happen."""
    show = Progress.step

    def show_and_stop(self, metrics):
        show(self, metrics)
        if metrics.step == step:
            raise ConnectionAbortedError("stopped by the test")

    monkeypatch.setattr(Progress, "step", show_and_stop)


def same_weights(one, two) -> bool:
    one, two = weights_of(one), weights_of(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def without_times(folder) -> list[dict]:
    times = ("samples_per_s", "elapsed_s", "eta_s", "memory_bytes")
    return [{name: value for name, value in line.items() if name not in times} for line in read_metrics(folder)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_stopped_and_gone_on_with_ends_as_one_never_stopped_bit_for_bit(
    train, teachers, tmp_path, monkeypatch, recipe
):
    teacher = teachers.two if recipe == "two experts" else teachers.one
    flags = [*FLAGS, *RECIPES[recipe], "--save_every", 3]
    assert train(teacher, PRUNED_CONFIG, *flags, output_dir=tmp_path / "whole").code == 0
    for step in (5, 10):  # twice, and not at a checkpoint
        with monkeypatch.context() as patched:
            stop_after(patched, step)
            assert train(teacher, PRUNED_CONFIG, *flags, output_dir=tmp_path / "stopped").code == 1
    outcome = train(teacher, PRUNED_CONFIG, *flags, output_dir=tmp_path / "stopped")
    assert outcome.code == 0 and "Resuming from step 9" in outcome.out
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "stopped")


def test_ctrl_c_saves_a_checkpoint_and_the_same_command_goes_on(train, teachers, tmp_path, monkeypatch):
    flags = [*FLAGS, "--save_every", 100]
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "whole").code == 0
    show = Progress.step

    def show_and_press(self, metrics):
        show(self, metrics)
        if metrics.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "step", show_and_press)
        assert train(teachers.one, PRUNED_CONFIG, *flags).code == 130
    outcome = train(teachers.one, PRUNED_CONFIG, *flags)
    assert outcome.code == 0 and "Resuming from step 4" in outcome.out
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def run_quietly(argv: list[str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    os._exit(train_distillation.main(argv))


@pytest.mark.parametrize("num_kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_one_never_killed(train, teachers, write_config, tmp_path, num_kills):
    flags = ["--max_steps", 30 * num_kills, "--lr", 1e-3, "--batch_size", 3, "--save_every", 1, "--replay", 2]
    flags += ["--student_rollout", 0, 1]
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "whole").code == 0
    argv = [
        "--teacher_path", teachers.one, "--student_config", write_config(PRUNED_CONFIG), "--data_path",
        train_distillation.parse_args(["--teacher_path", "x"]).data.data_path, "--prompt_cache", teachers.prompt_cache,
        "--device", "cpu", "--num_samples", 0, "--output_dir", tmp_path / "killed", *flags,
    ]  # fmt: skip
    context, chance, num_unfinished = multiprocessing.get_context("fork"), random.Random(0), 0
    saved = tmp_path / "killed" / "checkpoints"
    for _ in range(num_kills):
        before = set(saved.glob("*.json"))
        process = context.Process(target=run_quietly, args=([str(word) for word in argv],))
        process.start()
        while process.is_alive() and set(saved.glob("*.json")) <= before:  # until it has saved by itself
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.3))  # in a step, or in one of the saves that follow every step
        assert process.is_alive(), "it was over before it could be killed"
        process.kill()
        process.join()
        num_unfinished += any(not path.with_suffix(".json").exists() for path in saved.iterdir() if path.is_dir())
    assert num_unfinished or num_kills < 20, "no kill fell into a save"
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "killed").code == 0
    assert same_weights(tmp_path / "whole", tmp_path / "killed")


# ---- what is kept ----


def test_the_newest_are_kept_and_a_finished_run_is_saved_too(train, teachers, tmp_path):
    assert train(teachers.one, PRUNED_CONFIG, *FLAGS, "--save_every", 2, "--keep_checkpoints", 3).code == 0
    names = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert names == {f"step_{step:08d}{kind}" for step in (8, 10, 11) for kind in ("", ".json")}
    outcome = train(teachers.one, PRUNED_CONFIG, *FLAGS, "--save_every", 2)
    assert outcome.code == 0 and "Resuming from step 11" in outcome.out


def test_a_damaged_checkpoint_takes_no_place_of_a_good_one(train, teachers, tmp_path, monkeypatch):
    flags = [*FLAGS, "--save_every", 3, "--max_steps", 6]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    saved = tmp_path / "out" / "checkpoints"
    for file in (saved / "step_00000006").iterdir():
        os.truncate(file, 100)
    flags = [*FLAGS, "--save_every", 1, "--keep_checkpoints", 1]
    with monkeypatch.context() as patched:
        stop_after(patched, 5)
        train(teachers.one, PRUNED_CONFIG, *flags)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags)
    assert outcome.code == 0 and "step_00000006: skipped" in outcome.out and "Resuming from step 4" in outcome.out
    assert {path.name for path in saved.iterdir()} == {"step_00000011", "step_00000011.json"}


def test_checkpoints_that_are_all_damaged_are_not_trained_over(train, teachers, tmp_path):
    flags = [*FLAGS, "--save_every", 4]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    for file in (tmp_path / "out" / "checkpoints").glob("*/*"):
        os.truncate(file, 100)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    outcome = train(teachers.one, PRUNED_CONFIG, *flags)
    assert outcome.code == 2 and "none of its 2 checkpoints is whole" in outcome.err and "--overwrite" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_what_is_not_a_checkpoint_of_ours_stays_where_a_person_put_it(train, teachers, tmp_path):
    flags = [*FLAGS, "--save_every", 4]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    saved = tmp_path / "out" / "checkpoints"
    shutil.copytree(saved / "step_00000008", saved / "best_so_far")
    shutil.copytree(saved / "step_00000008", saved / "step_backup")
    shutil.copy(saved / "step_00000008.json", saved / "step_backup.json")
    (saved / "notes.txt").write_text("mine", encoding="utf-8")
    (saved / "latest").symlink_to("step_00000008")
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 20)
    assert outcome.code == 0 and "Resuming from step 11" in outcome.out, outcome.err
    assert {"best_so_far", "step_backup", "step_backup.json", "notes.txt", "latest"} <= set(os.listdir(saved))
    assert len(list(saved.glob("step_0*.json"))) == 2


def test_two_runs_do_not_write_to_one_folder(train, teachers, tmp_path):
    flags = [*FLAGS, "--save_every", 4]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    other = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)  # as a run holds it
        outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--overwrite")
    finally:
        os.close(other)
    assert outcome.code == 2 and "another run is writing to it" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 12).code == 0


def test_a_finished_run_can_be_prolonged_and_its_rate_changed(train, teachers, tmp_path):
    assert train(teachers.one, PRUNED_CONFIG, *FLAGS, "--save_every", 5).code == 0
    outcome = train(teachers.one, PRUNED_CONFIG, *FLAGS, "--save_every", 5, "--max_steps", 15, "--lr", 5e-4)
    assert outcome.code == 0 and "Resuming from step 11" in outcome.out
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == list(range(1, 16))


@pytest.mark.parametrize("damage", ["flipped byte", "cut", "no weights", "no manifest", "broken manifest"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(train, teachers, tmp_path, damage):
    flags = [*FLAGS, "--save_every", 4]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    manifest = tmp_path / "out" / "checkpoints" / "step_00000011.json"
    (newest,) = manifest.with_suffix("").glob("*.safetensors")
    content = bytearray(newest.read_bytes())
    if damage == "flipped byte":
        content[-5] ^= 1
        newest.write_bytes(content)
    elif damage == "cut":
        newest.write_bytes(content[:-100])
    elif damage == "no weights":
        newest.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{", encoding="utf-8")
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    outcome = train(teachers.one, PRUNED_CONFIG, *flags)
    assert outcome.code == 0 and "Resuming from step 8" in outcome.out
    assert ("skipped" in outcome.out) == (damage != "no manifest")
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def forge(manifest: Path, **changes) -> None:
    """Change a checkpoint's tensors, and its checksums with them; None leaves a tensor out."""
    (file,) = manifest.with_suffix("").glob("*.safetensors")
    about = json.loads(manifest.read_text(encoding="utf-8"))
    with safe_open(file, framework="pt") as saved:
        tensors, metadata = {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata()  # noqa: SIM118
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    lengths = json.loads(metadata["DCP_SHARDING_INFO"])
    metadata["DCP_SHARDING_INFO"] = json.dumps({name: lengths.get(name, {"saved_offsets": [0]}) for name in tensors})
    save_file(tensors, file, metadata)
    about["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(about), encoding="utf-8")


WEIGHT = "trained.student.proj_out.weight"
FORGERIES = {
    "no weights": {WEIGHT: None},
    "weights of another shape": {WEIGHT: torch.zeros(3)},
    "weights of another type": {WEIGHT: torch.zeros(64, 12, dtype=torch.int32)},
    "weights that are no numbers": {WEIGHT: torch.full((64, 12), torch.nan)},
    "no average": {"ema.proj_out.weight": None},
    "no moment of a weight": {"optimizer.0.exp_avg": None},
    "a moment of no weight": {"optimizer.999.exp_avg": torch.zeros(3)},
    "no losses": {"run.losses": None},
    "fewer losses than steps": {"run.losses": torch.zeros(2, dtype=torch.float64)},
    "no random numbers": {"random.cpu": None},
    "random numbers of no generator": {"random.cpu": torch.zeros(5056, dtype=torch.uint8)},
    "no prompts": {"answers.states.paths.order": None},
    "a prompt twice": {"answers.states.paths.order": torch.zeros(55, dtype=torch.int64)},
    "a position without end": {"answers.states.paths.position": torch.tensor(10**9)},
}


FORGERIES_OF_DEFAULTS = {
    "no momentum of a matrix": {"optimizer.0.momentum_buffer": None},
    "momentum of another shape": {"optimizer.0.momentum_buffer": torch.zeros(3)},
    "no prompts": {"answers.source.states.paths.order": None},
    "no uses of stored answers": {"answers.uses": None},
    "uses of other lanes": {"answers.uses": torch.zeros(7, 1, dtype=torch.int64)},
    "fewer answers than places": {"answers.counters": torch.tensor([3, 0])},
}


def test_a_checkpoint_whose_checksums_are_right_but_not_its_tensors_is_skipped_too(train, teachers, tmp_path):
    plain, default = ["--optimizer", "adamw", "--replay", 1], []
    check_skips(train, teachers, tmp_path / "plain", plain, FORGERIES)
    check_skips(train, teachers, tmp_path / "default", default, FORGERIES_OF_DEFAULTS)


def check_skips(train, teachers, tmp_path, recipe, forgeries):
    flags = ["--max_steps", 3, "--lr", 1e-3, "--batch_size", 3, "--save_every", 2, "--keep_checkpoints", 3, *recipe]
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "whole").code == 0
    for name, changes in forgeries.items():
        folder = shutil.copytree(tmp_path / "whole", tmp_path / name)
        forge(folder / "checkpoints" / "step_00000003.json", **changes)
        with at_most(60):
            outcome = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=folder)
        assert outcome.code == 0, (name, outcome.err)
        assert "step_00000003: skipped, it is damaged" in outcome.out and "from step 2" in outcome.out, name
        assert same_weights(tmp_path / "whole", folder), name
        assert without_times(tmp_path / "whole") == without_times(folder), name


def test_a_run_whose_only_checkpoint_holds_no_state_is_refused_not_started_over(train, teachers, tmp_path):
    flags = ["--max_steps", 2, "--save_every", 2]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    before = weights_of(tmp_path / "out")
    forge(tmp_path / "out" / "checkpoints" / "step_00000002.json", **{WEIGHT: None})
    outcome = train(teachers.one, PRUNED_CONFIG, *flags)
    assert outcome.code == 2 and "none of its 1 checkpoints is whole" in outcome.err and "--overwrite" in outcome.err
    assert all(torch.equal(before[name], value) for name, value in weights_of(tmp_path / "out").items())


MANIFESTS = {
    "a step that is text": {"step": "4"},
    "the step of another": {"step": 2},
    "no files": {"files": [1]},
    "a checksum that is a number": {"files": {"model.safetensors": 3}},
    "a batch that is text": {"batch_size": "3"},
    "commands that are text": {"commands": ["python"]},
    "a command without a step": {"commands": [{"lr": 1.0, "command": "python"}]},
    "a run that is a number": {"run": 3},
    "brackets without end": "[" * 100_000,
}


def test_a_manifest_of_another_kind_is_skipped_for_the_one_before_it(train, teachers, tmp_path, capsys):
    assert train(teachers.one, PRUNED_CONFIG, "--max_steps", 4, "--save_every", 2).code == 0
    manifest = tmp_path / "out" / "checkpoints" / "step_00000004.json"
    about = json.loads(manifest.read_text(encoding="utf-8"))
    checkpoints = Checkpoints(tmp_path / "out", about["run"], about["batch_size"])
    assert checkpoints.newest().step == 4
    for name, changes in MANIFESTS.items():
        text = changes if isinstance(changes, str) else json.dumps(about | changes)
        manifest.write_text(text, encoding="utf-8")
        assert checkpoints.newest().step == 2, name
        assert "step_00000004: skipped, it is damaged" in capsys.readouterr().out, name
    manifest.unlink()
    for make in (os.mkfifo, Path.mkdir):
        make(manifest)
        with at_most(20):
            outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 4, "--save_every", 2)
        assert outcome.code == 0 and "Resuming from step 2" in outcome.out
        assert manifest.is_file()  # written again
        manifest.unlink()


def test_a_pipe_in_the_place_of_the_weights_keeps_no_run_waiting(train, teachers, tmp_path):
    assert train(teachers.one, PRUNED_CONFIG, "--max_steps", 4, "--save_every", 2).code == 0
    about = json.loads((tmp_path / "out" / "checkpoints" / "step_00000004.json").read_text(encoding="utf-8"))
    (weights,) = (tmp_path / "out" / "checkpoints" / "step_00000004").glob("*.safetensors")
    weights.unlink()
    os.mkfifo(weights)
    with at_most(20):
        assert Checkpoints(tmp_path / "out", about["run"], about["batch_size"]).newest().step == 2


@pytest.mark.parametrize("target", ["nowhere", "a folder of mine"])
def test_links_in_the_place_of_checkpoints_are_replaced_and_what_they_lead_to_stays(train, teachers, tmp_path, target):
    saved, mine = tmp_path / "out" / "checkpoints", tmp_path / "a folder of mine"
    mine.mkdir()
    (mine / "holiday.jpg").write_bytes(b"mine")
    assert train(teachers.one, PRUNED_CONFIG, "--max_steps", 1, "--save_every", 1).code == 0
    for name in ("step_00000002", "step_00000003.json", "step_00000004", "step_00000004.json"):
        (saved / name).symlink_to(tmp_path / target)
    for steps in (3, 4):
        outcome = train(teachers.one, PRUNED_CONFIG, "--save_every", 1, "--max_steps", steps)
        assert outcome.code == 0, outcome.err
    assert (saved / "step_00000004").is_dir() and not (saved / "step_00000004").is_symlink()
    assert (mine / "holiday.jpg").read_bytes() == b"mine"


# ---- refused ----


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--guidance_scale", 2.5], ["guidance_scale", "2.5"]),
        (["--seed", 3], ["seed 0", "now 3"]),
        (["--states", "noise"], ["'trajectory'", "'noise'"]),
        (["--ema_decay", 0], ["ema True", "now False"]),
    ],
)
def test_another_run_in_the_same_folder_is_refused_with_both_values(train, teachers, tmp_path, changes, words):
    flags = [*FLAGS, "--save_every", 4]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    before = weights_of(tmp_path / "out")
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, *changes)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
    assert all(word in outcome.err for word in [*words, "--overwrite"])
    assert all(torch.equal(before[name], value) for name, value in weights_of(tmp_path / "out").items())


def test_another_student_is_refused_and_overwrite_keeps_the_earlier_run_beside(train, teachers, tmp_path):
    flags = [*FLAGS, "--save_every", 4]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    before = weights_of(tmp_path / "out")
    other = PRUNED_CONFIG | {"depth": 3}
    assert "student depth 2, now 3" in train(teachers.one, other, *flags).err
    assert train(teachers.one, other, *flags, "--overwrite").code == 0
    (aside,) = (tmp_path / "out").glob("replaced-*")
    assert (aside / "checkpoints").is_dir()
    assert all(torch.equal(before[name], value) for name, value in weights_of(aside).items())


# ---- disks ----


def test_a_disk_that_fills_during_training_ends_the_run_with_the_last_checkpoint_good(
    train, teachers, tmp_path, monkeypatch
):
    flags = [*FLAGS, "--save_every", 4]
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "whole").code == 0
    (weights,) = (tmp_path / "whole" / "checkpoints" / "step_00000008").glob("*.safetensors")
    show, limits = Progress.step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def show_and_fill(self, metrics):
        """After step 5 no file may grow beyond half a checkpoint."""
        show(self, metrics)
        if metrics.step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (weights.stat().st_size // 2, limits[1]))

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "step", show_and_fill)
        try:
            outcome = train(teachers.one, PRUNED_CONFIG, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 1 and len(outcome.err.splitlines()) >= 1 and "Traceback" not in outcome.err
    assert "File too large" in outcome.err and "step_00000004" in outcome.err
    outcome = train(teachers.one, PRUNED_CONFIG, *flags)
    assert outcome.code == 0 and "Resuming from step 4" in outcome.out
    assert same_weights(tmp_path / "whole", tmp_path / "out")


def test_a_disk_too_small_is_refused_before_training(train, teachers, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    outcome = train(teachers.one, PRUNED_CONFIG, *FLAGS, "--save_every", 4)
    assert outcome.code == 2 and "1,000 are free" in outcome.err and "--keep_checkpoints" in outcome.err


def test_nothing_in_a_checkpoint_is_pickled(train, teachers, tmp_path):
    assert train(teachers.one, PRUNED_CONFIG, *FLAGS, "--save_every", 4).code == 0
    for path in (path for path in (tmp_path / "out" / "checkpoints").rglob("*") if path.is_file()):
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            assert load_file(path)
