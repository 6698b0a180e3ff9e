"""A run that is stopped, killed or damaged resumes as if nothing had happened, or says why it cannot.

N + M steps with a stop between must be N + M without: weights and metrics bit for bit on a CPU, for every kind of states, with
replay, average and accumulation. A process that saves all the time is killed with SIGKILL at random moments (whole runs are
killed in tests/faults). A full disk is a real limit on file size; files are cut, flipped, forged and removed.
"""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.lessons import Lessons, make_student
from support.processes import fork
from support.runs import (
    PRUNED_CONFIG,
    as_if_stopped_after,
    at_most,
    file_size_limited,
    read_metrics,
    same_weights,
    snapshot,
    weights_of,
)
from support.torchrun import start
from wandistiller.errors import UserError
from wandistiller.training.checkpoints import CheckpointError, Checkpoints
from wandistiller.training.loop import NonFiniteError, train
from wandistiller.training.objective import Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import RunState, TrainingOptions

STEPS = 11
FLAGS = ["--max_steps", STEPS, "--lr", 1e-3, "--batch_size", 3]


def without_times(folder: Path) -> list[dict]:
    times = ("samples_per_s", "elapsed_s", "eta_s", "memory_bytes")
    return [{name: value for name, value in line.items() if name not in times} for line in read_metrics(folder)]


# ---- whole runs ----

# Every kind of states, with what moves beside them
PATHS = ["--replay", 2]
THREE_SIZES = ["--image_sizes", "32x32", "48x32", "32x48"]
RECIPES = {
    "accumulated": [*PATHS, "--feature_loss_weight", 0.5, "--grad_accum_steps", 2, "--optimizer", "adamw"],
    "muon": ["--optimizer", "muon", "--init_from", "random", "--feature_loss_weight", 1, "--replay", 2],
    "few steps of three sizes": ["--student_steps", 2, "--replay", 2, *THREE_SIZES],
    "two experts and three sizes": ["--calls_per_expert", 2, "--replay", 1, *THREE_SIZES],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_stopped_twice_ends_as_one_never_stopped_bit_for_bit(train, teachers, tmp_path, recipe):
    teacher = teachers.two if "two experts" in recipe else teachers.one
    whole, stopped, before = tmp_path / "whole", tmp_path / "stopped", snapshot(teacher)
    flags = [*FLAGS, *RECIPES[recipe], "--save_every", 2, "--keep_checkpoints", 9]
    train(teacher, PRUNED_CONFIG, *flags, output_dir=whole).ok()
    shutil.copytree(whole, stopped)
    for step in (2, 8):  # after two steps one of three sizes has had none
        as_if_stopped_after(stopped, step)
        assert f"Resuming from step {step}" in train(teacher, PRUNED_CONFIG, *flags, output_dir=stopped).ok().out
        assert same_weights(whole, stopped) and without_times(whole) == without_times(stopped)
    assert snapshot(teacher) == before


def test_a_run_that_goes_on_with_another_number_of_threads_says_that_bit_for_bit_is_over(train):
    torch.set_num_threads(2)
    train("mock", PRUNED_CONFIG, *FLAGS, "--max_steps", 2, "--save_every", 2).ok()
    again = train("mock", PRUNED_CONFIG, *FLAGS, "--max_steps", 3)
    torch.set_num_threads(1)
    over = train("mock", PRUNED_CONFIG, *FLAGS, "--max_steps", 1)
    assert over.code == 0 and "Nothing is left to train: the run is of 1 steps" in over.out
    assert again.code == 0 and "threads" not in again.out
    assert (
        "was written with 2 threads, and there are 1 now" in train("mock", PRUNED_CONFIG, *FLAGS, "--max_steps", 4).out
    )


def test_two_runs_do_not_write_to_one_folder(train, flags_of, tmp_path):
    (process,) = start(1, flags_of("out", "--max_steps", 100_000), tmp_path / "log.txt")
    while not (tmp_path / "out" / "metrics.jsonl").exists():
        assert process.is_alive(), (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    outcome = train("mock", PRUNED_CONFIG, *FLAGS, "--overwrite")
    process.kill()
    process.join()
    assert outcome.code == 2 and "another run is writing to it" in outcome.err
    train("mock", PRUNED_CONFIG, *FLAGS).ok()


def test_another_run_in_the_same_folder_is_refused_with_both_values_and_overwrite_keeps_it_beside(
    train, teachers, tmp_path
):
    flags = [*FLAGS, "--save_every", 4]
    train(teachers.one, PRUNED_CONFIG, *flags).ok()
    assert train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 15, "--lr", 5e-4).code == 0, "no longer, or slower"
    assert [line["step"] for line in read_metrics(tmp_path / "out")] == list(range(1, 16))
    before = weights_of(tmp_path / "out")
    for changes, config, words in (
        (["--seed", 3], PRUNED_CONFIG, ["seed 0", "now 3"]),
        (["--ema_decay", 0], PRUNED_CONFIG, ["ema True", "now False"]),
        (["--batch_size", 2], PRUNED_CONFIG, ["samples_per_step 3, now 2"]),
        (["--teacher_dtype", "fp8"], PRUNED_CONFIG, ["teacher_dtype", "now 'fp8'"]),
        (["--teacher_steps", 9], PRUNED_CONFIG, ["num_inference_steps", "now 9"]),
        (["--teacher_sampler", "euler"], PRUNED_CONFIG, ["teacher_sampler", "now 'euler'"]),
        (THREE_SIZES, PRUNED_CONFIG, ["image_sizes"]),
        ([], PRUNED_CONFIG | {"depth": 3}, ["student depth 2, now 3"]),
    ):
        outcome = train(teachers.one, config, *flags, *changes).refused()
        assert all(word in outcome.err for word in [*words, "--overwrite"]), outcome.err
    assert all(torch.equal(before[name], value) for name, value in weights_of(tmp_path / "out").items())
    train(teachers.one, config, *flags, "--overwrite").ok()
    (aside,) = (tmp_path / "out").glob("replaced-*")
    assert (aside / "checkpoints").is_dir()
    assert all(torch.equal(before[name], value) for name, value in weights_of(aside).items())


def file_of(manifest: Path) -> Path:
    (file,) = manifest.with_suffix("").glob("*.safetensors")
    return file


def forge(manifest: Path, **changes) -> None:
    """Change a checkpoint's tensors, and its checksums with them; None leaves a tensor out."""
    file, about = file_of(manifest), json.loads(manifest.read_text(encoding="utf-8"))
    with safe_open(file, framework="pt") as saved:
        tensors, metadata = {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata()  # noqa: SIM118
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    lengths = json.loads(metadata["DCP_SHARDING_INFO"])
    metadata["DCP_SHARDING_INFO"] = json.dumps({name: lengths.get(name, {"saved_offsets": [0]}) for name in tensors})
    save_file(tensors, file, metadata)
    about["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(about), encoding="utf-8")


def flip(manifest: Path) -> None:
    content = bytearray(file_of(manifest).read_bytes())
    content[-5] ^= 1
    file_of(manifest).write_bytes(content)


DAMAGES: list[Callable[[Path], object]] = [
    flip,
    lambda manifest: os.truncate(file_of(manifest), 100),
    lambda manifest: file_of(manifest).unlink(),
    lambda manifest: manifest.write_text("{", encoding="utf-8"),
]


def test_checkpoints_each_damaged_in_its_own_way_are_skipped_and_a_run_without_a_whole_one_is_refused(
    train, teachers, tmp_path
):
    steps, whole, folder, lost = 8, *(tmp_path / name for name in ("whole", "damaged", "lost"))
    flags = [*FLAGS, "--save_every", 1, "--keep_checkpoints", 99, "--max_steps", steps]
    train(teachers.one, PRUNED_CONFIG, *flags, output_dir=whole).ok()
    manifests = sorted((whole / "checkpoints").glob("*.json"))

    shutil.copytree(whole, folder)
    for damage, manifest in zip(DAMAGES, manifests[-len(DAMAGES) :], strict=True):
        damage(folder / "checkpoints" / manifest.name)
    shutil.copytree(folder, lost)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=folder)
    assert outcome.code == 0 and f"Resuming from step {steps - len(DAMAGES)} of" in outcome.out, outcome.out
    assert outcome.out.count("skipped, it is damaged") == len(DAMAGES)
    assert same_weights(whole, folder) and without_times(whole) == without_times(folder)

    for manifest in manifests[:-2]:
        (lost / "checkpoints" / manifest.name).unlink()
    before = snapshot(lost)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=lost)
    assert outcome.code == 2 and "none of its 2 checkpoints is whole" in outcome.err and "--overwrite" in outcome.err
    assert snapshot(lost) == before


# ---- the state of a run ----


def make_state(optimizer: str = "adamw", seed: int = 0, **of_lessons) -> RunState:
    trained = TrainedStudent(make_student(seed), Objective())
    optimization = OptimizationOptions(lr=1e-3, optimizer=optimizer, ema_decay=0.9)
    return RunState(
        trained, Lessons(**of_lessons), TrainingOptions(num_steps=STEPS, optimization=optimization, save_every=3)
    )


def checkpoints_in(folder: Path, keep: int = 2, **run) -> Checkpoints:
    return Checkpoints(folder, {"seed": 0} | run, keep)


@pytest.mark.parametrize("broken_at, last_good", [(1, None), (4, 3), (5, 3)], ids=["at once", "saved", "not saved"])
def test_a_step_that_is_not_finite_is_not_saved_and_names_the_newest_checkpoint(tmp_path, broken_at, last_good):
    checkpoints, state = checkpoints_in(tmp_path, keep=1), make_state(broken_at=broken_at)
    with pytest.raises(NonFiniteError, match=f"^step {broken_at}: .*--lr 0.0001") as error:
        train(state, checkpoints=checkpoints)
    if last_good is None:
        assert not list(tmp_path.rglob("*.json"))
        return
    assert f"The newest good checkpoint is step {last_good}." in str(error.value)
    found = checkpoints_in(tmp_path).newest()
    again = make_state(seed=1)
    again.load(found)
    assert again.step == again.batches.num_calls == last_good
    assert all(weight.isfinite().all() for weight in again.trained.parameters())


WEIGHT = "trained.student.proj_out.weight"
FORGERIES = {
    "weights of another shape": {WEIGHT: torch.zeros(3)},
    "no average": {"ema.proj_out.weight": None},
    "no momentum of a matrix": {"optimizer.0.momentum_buffer": None},
    "a moment of no weight": {"optimizer.999.exp_avg": torch.zeros(3)},
    "no losses": {"run.losses": None},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_checkpoint_whose_checksums_are_right_but_not_its_tensors_is_refused_in_one_sentence(tmp_path, name):
    optimizer = "muon" if "momentum" in name else "adamw"
    train(make_state(optimizer), checkpoints=checkpoints_in(tmp_path))
    forge(tmp_path / "checkpoints" / f"step_{STEPS:08d}.json", **FORGERIES[name])
    state = make_state(optimizer, seed=1)
    with pytest.raises(UserError, match=r"step_00000011: does not hold the state of this run .*--overwrite"):
        state.load(checkpoints_in(tmp_path).newest())


# ---- the folder ----


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {name: torch.full((5000,), float(step)) for name in ("one", "two")})
    checkpoints.finish()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def both(*steps: int) -> set[str]:
    return {f"step_{step:08d}{kind}" for step in steps for kind in ("", ".json")}


def save_for_ever(folder: Path) -> None:
    checkpoints = checkpoints_in(folder)
    found = checkpoints.newest()
    for step in range(found.step + 1 if found else 1, 10**6):
        save(checkpoints, step)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    chance, num_unfinished, newest = random.Random(0), 0, 0
    for _ in range(12):
        process = fork(save_for_ever, tmp_path)
        while not (tmp_path / "checkpoints" / f"step_{newest + 1:08d}.json").exists():
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.join()
        found = checkpoints_in(tmp_path).newest()
        tensors = found.read(lambda name, shape, dtype: torch.empty(shape, dtype=dtype))
        assert tensors.keys() == {"one", "two"} and found.step > newest
        assert all((value == found.step).all() for value in tensors.values())
        newest = found.step
        manifests = {name for name in names_in(tmp_path) if name.endswith(".json")}
        num_unfinished += len(names_in(tmp_path)) > 2 * len(manifests)
    assert num_unfinished, "no kill fell into a save"


def test_what_is_written_while_training_goes_on_is_the_state_at_the_save(tmp_path):
    checkpoints, weight = checkpoints_in(tmp_path), torch.zeros(10**6)
    for step in (1, 2):
        checkpoints.save(step, {"weight": weight, "part": weight[:9]})
        weight += 1
    checkpoints.finish()
    tensors = checkpoints_in(tmp_path).newest().read(lambda name, shape, dtype: torch.empty(shape, dtype=dtype))
    assert all((tensors[name] == 1).all() for name in ("weight", "part"))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_is_told(tmp_path):
    state = make_state()
    with file_size_limited(10_000), pytest.raises(CheckpointError, match=r"File too large.*there is none yet"):
        train(state, checkpoints=checkpoints_in(tmp_path))
    assert 3 <= state.step <= 6 and checkpoints_in(tmp_path).newest() is None


def test_the_newest_are_kept_and_nothing_in_them_is_pickled(tmp_path):
    save(checkpoints_in(tmp_path, keep=3), *range(2, 12))
    assert names_in(tmp_path) == both(9, 10, 11)
    for path in (path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()):
        assert json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else load_file(path)


def test_a_damaged_checkpoint_takes_no_place_of_a_good_one(tmp_path, capsys):
    save(checkpoints_in(tmp_path), 3, 6)
    flip(tmp_path / "checkpoints" / "step_00000006.json")
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.newest().step == 3 and "step_00000006: skipped, it is damaged" in capsys.readouterr().out
    save(checkpoints, 4)
    assert names_in(tmp_path) == both(3, 4, 6)
    save(checkpoints, 7)
    assert names_in(tmp_path) == both(4, 7)


def test_a_checkpoint_of_another_version_is_refused_as_that(tmp_path):
    save(checkpoints_in(tmp_path), 3)
    with pytest.raises(UserError, match=r"a run with states None, now 'noise' \(it is of another version or command\)"):
        checkpoints_in(tmp_path, states="noise").newest()


def test_what_is_not_a_checkpoint_of_ours_stays_where_a_person_put_it(tmp_path):
    saved = tmp_path / "checkpoints"
    save(checkpoints_in(tmp_path), 8, 11)
    for name in ("best_so_far", "step_backup"):
        shutil.copytree(saved / "step_00000008", saved / name)
    shutil.copy(saved / "step_00000008.json", saved / "step_backup.json")
    (saved / "notes.txt").write_text("mine", encoding="utf-8")
    (saved / "latest").symlink_to("step_00000008")
    theirs = names_in(tmp_path) - both(8, 11)
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.newest().step == 11
    save(checkpoints, 12, 13)
    assert names_in(tmp_path) == theirs | both(12, 13)


@pytest.mark.parametrize("target", ["nowhere", "a folder of mine"])
def test_links_in_the_place_of_checkpoints_are_replaced_and_what_they_lead_to_stays(tmp_path, target):
    saved, mine = tmp_path / "checkpoints", tmp_path / "a folder of mine"
    mine.mkdir()
    (mine / "holiday.jpg").write_bytes(b"mine")
    save(checkpoints_in(tmp_path), 1)
    for name in ("step_00000002", "step_00000003.json", "step_00000004", "step_00000004.json"):
        (saved / name).symlink_to(tmp_path / target)
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.newest().step == 1
    save(checkpoints, 2, 3, 4)
    assert not any((saved / name).is_symlink() for name in both(3, 4)) and checkpoints_in(tmp_path).newest().step == 4
    assert (mine / "holiday.jpg").read_bytes() == b"mine"


MANIFESTS = {
    "the step of another": {"step": 2},
    "no files": {"files": [1]},
    "a file elsewhere": {"files": {"../step_00000002/model.safetensors": "0"}},
    "a stage after it": {"first_step": 9},
    "brackets without end": "[" * 100_000,
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", [*MANIFESTS, "a pipe for weights"])
def test_a_manifest_or_file_of_another_kind_is_skipped_for_the_checkpoint_before_it(tmp_path, capsys, kind):
    save(checkpoints_in(tmp_path), 2, 4)
    manifest, change = tmp_path / "checkpoints" / "step_00000004.json", MANIFESTS.get(kind)
    about = json.loads(manifest.read_text(encoding="utf-8"))
    replaced = file_of(manifest) if change is None else manifest
    replaced.unlink()
    if isinstance(change, str | dict):
        manifest.write_text(change if isinstance(change, str) else json.dumps(about | change), encoding="utf-8")
    else:
        (change or os.mkfifo)(replaced)
    with at_most(20):
        assert checkpoints_in(tmp_path).newest().step == 2
        assert "step_00000004: skipped, it is damaged" in capsys.readouterr().out
        save(checkpoints_in(tmp_path), 4)
    assert checkpoints_in(tmp_path).newest().step == 4


def test_a_disk_that_is_too_small_is_refused_before_training(train, tmp_path):
    outcome = train("mock", PRUNED_CONFIG, *FLAGS, "--save_every", 2, "--keep_checkpoints", 10**9)
    assert outcome.code == 2 and "are free; free some space" in outcome.err and "--save_every 0" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_costs_no_checkpoint_before(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    save(checkpoints, 4)
    with file_size_limited(10_000), pytest.raises(CheckpointError, match=r"File too large.*good one is step_00000004"):
        save(checkpoints, 8)
    assert checkpoints_in(tmp_path).newest().step == 4
