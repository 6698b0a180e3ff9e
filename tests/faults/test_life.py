"""Faults over the whole life of a student: projection, encoding, the teacher's cache, training, saving, export.

The commands are run as a person repeats them: each again until it is done. A real process is killed with SIGKILL at random moments
of all of it (200 in the slow suite, one process and two), and what comes out must be, bit for bit, what comes out undisturbed. A
disk that is full is a real limit on file size, a folder that cannot be written to is met by a process without root's privileges.

pytest tests/faults/test_life.py
"""

import ctypes
import fcntl
import hashlib
import json
import multiprocessing
import os
import pty
import random
import resource
import shutil
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import export_student
import projection_mapper
import train_distillation
from support.processes import exit_code, fork, run_and_exit
from support.runs import PROMPTS, PRUNED_CONFIG, read_metrics, snapshot
from support.torchrun import start

STEPS = 16
TRAINING = ["--max_steps", STEPS, "--lr", 1e-3, "--batch_size", 2, "--save_every", 1, "--replay", 2, "--eval_every", 8]
RESULTS = ("student/diffusion_model.safetensors", "student.safetensors", "projected/diffusion_model.safetensors")
LONGEST_S = 120.0


class Life:
    """The commands that make a student in a folder, each with the arguments that it is repeated with."""

    def __init__(self, teacher: Path, folder: Path, *training: object):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.json"
        config.write_text(json.dumps(PRUNED_CONFIG))
        cache = ["--prompt_cache", folder / "prompts"]
        prompts = folder / "few.txt"
        prompts.write_text("\n".join(PROMPTS.read_text().splitlines()[:12]))
        self.project = ["--teacher_path", teacher, "--student_config", config, "--output_dir", folder / "projected"]
        self.train = [
            "--teacher_path", teacher, "--student_config", config, "--data_path", prompts, "--device", "cpu",
            "--num_samples", 0, "--output_dir", folder / "student", *cache, *TRAINING, *training,
        ]  # fmt: skip
        self.export = [
            "--student",
            folder / "student",
            "--format",
            "original",
            "--output",
            folder / "student.safetensors",
        ]

    def steps(self) -> Iterator[tuple[Callable, list[object]]]:
        """The commands that are not done yet, in order."""
        if not (self.folder / "projected" / "diffusion_model.safetensors").exists():
            yield projection_mapper.main, self.project
        if not (self.folder / "student" / "diffusion_model.safetensors").exists():
            yield train_distillation.main, self.train
        if not (self.folder / "student.safetensors").exists():
            yield export_student.main, self.export

    def live(self) -> int:
        """Run what is left in this process; return the exit code of the first command that fails."""
        for main, argv in self.steps():
            if code := exit_code(main, argv):
                return code
        return 0

    def results(self) -> dict[str, str]:
        """A digest of the tensors of all that came out; the files beside them name folders and commands."""
        return {name: digest(self.folder / name) for name in RESULTS}


def digest(path: Path) -> str:
    tensors = load_file(path)
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


def in_a_process(work: Callable[[], int], log: Path) -> multiprocessing.Process:
    """Start `work` in a fork, which spares it the seconds that loading torch takes."""

    def child() -> None:
        os.setpgid(0, 0)
        run_and_exit(work, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))

    return fork(child)


def undisturbed(life: Life) -> float:
    """Live it to the end; return the seconds that it took."""
    start = time.monotonic()
    process = in_a_process(life.live, life.folder / "log.txt")
    process.join()
    assert process.exitcode == 0, (life.folder / "log.txt").read_text()
    return time.monotonic() - start


# ---- killed ----


@pytest.mark.parametrize("cached", [False, True], ids=["live teacher", "teacher cache"])
@pytest.mark.parametrize("num_kills", [1, pytest.param(75, marks=pytest.mark.slow)])
def test_a_life_killed_at_random_moments_ends_as_one_never_killed(teachers, tmp_path, num_kills, cached):
    def life(name: str) -> Life:
        extra = ["--teacher_cache", tmp_path / name / "answers"] if cached else []
        return Life(teachers.one, tmp_path / name, *extra)

    whole = life("whole")
    seconds = undisturbed(whole)
    chance, kills, number = random.Random(num_kills), 0, 0
    while kills < num_kills:
        killed = life(f"killed{number}")
        number += 1
        while True:
            process = in_a_process(killed.live, killed.folder / "log.txt")
            process.join(chance.uniform(0.02, seconds / 2))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                continue
            assert process.exitcode == 0, (killed.folder / "log.txt").read_text()
            break
        assert killed.results() == whole.results()
        assert [line["loss"] for line in read_metrics(killed.folder / "student")] == [
            line["loss"] for line in read_metrics(whole.folder / "student")
        ]
        shutil.rmtree(killed.folder)


def launched(life: Life) -> list[multiprocessing.Process]:
    """Train in two processes, as torchrun starts them."""
    return start(2, [str(word) for word in life.train], life.folder / "log.txt")


def end(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [50])
def test_two_processes_killed_from_the_first_moment_on_end_as_if_never_killed(teachers, tmp_path, num_kills):
    whole = Life(teachers.one, tmp_path / "whole", "--teacher_cache", tmp_path / "whole" / "answers")
    start = time.monotonic()
    processes = launched(whole)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], (whole.folder / "log.txt").read_text()
    seconds, weights = time.monotonic() - start, "student/diffusion_model.safetensors"
    chance, kills, number = random.Random(num_kills), 0, 0
    while kills < num_kills:
        killed = Life(teachers.one, tmp_path / f"k{number}", "--teacher_cache", tmp_path / f"k{number}" / "answers")
        number += 1
        while not (killed.folder / weights).exists():
            processes = launched(killed)
            until = time.monotonic() + chance.uniform(0.1, seconds / 2)
            while any(process.is_alive() for process in processes) and time.monotonic() < until:
                time.sleep(0.01)
            if all(process.exitcode is None for process in processes):
                kills += 1
            else:
                for process in processes:
                    process.join()
                assert [process.exitcode for process in processes] == [0, 0], (killed.folder / "log.txt").read_text()
            end(processes)
        assert digest(killed.folder / weights) == digest(whole.folder / weights)
        shutil.rmtree(killed.folder)


def test_when_one_of_two_processes_dies_the_other_ends_in_words_and_the_run_resumes(teachers, tmp_path):
    life = Life(teachers.one, tmp_path / "life", "--max_steps", 400)
    processes = launched(life)
    metrics = life.folder / "student" / "metrics.jsonl"
    until = time.monotonic() + LONGEST_S
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.02)
        assert all(process.is_alive() for process in processes) and time.monotonic() < until
    processes[1].kill()
    for process in processes:
        process.join(LONGEST_S)
    said = (life.folder / "log.txt").read_text()
    assert processes[0].exitcode == 1 and processes[1].exitcode == -signal.SIGKILL, said
    assert "Traceback" not in said and "another process" in said
    done = len(read_metrics(life.folder / "student"))
    again = launched(Life(teachers.one, life.folder, "--max_steps", done + 3))
    for process in again:
        process.join(LONGEST_S)
    assert [process.exitcode for process in again] == [0, 0], (life.folder / "log.txt").read_text()


# ---- nobody reads what it prints ----


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_when_its_reader_leaves_or_its_terminal_closes_a_run_saves_what_it_learnt(teachers, tmp_path, kind):
    whole, life = (
        Life(teachers.one, tmp_path / name, "--max_steps", 60, "--save_every", 100) for name in ("whole", "life")
    )
    undisturbed(whole)
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()

    def child() -> None:
        os.close(reader)
        os.setsid()
        if kind == "terminal":
            fcntl.ioctl(writer, termios.TIOCSCTTY, 0)
        run_and_exit(lambda: exit_code(train_distillation.main, life.train), writer)

    process = fork(child)
    os.close(writer)
    said = b""
    while b"step 8:" not in said:
        said += os.read(reader, 1024)
    os.close(reader)
    process.join(LONGEST_S)
    assert process.exitcode == 130
    done = len(read_metrics(life.folder / "student"))
    assert 0 < done < 60 and (life.folder / "student" / "checkpoints" / f"step_{done:08d}.json").exists()
    assert in_turn(life, "train") == 0
    assert digest(life.folder / RESULTS[0]) == digest(whole.folder / RESULTS[0])


# ---- no room, no permission, no clock ----


@pytest.mark.parametrize(
    "limit",
    [2_000, 20_000, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (0, 300, 8_000, 40_000, 80_000))],
)
def test_a_full_disk_at_any_write_is_said_in_words_and_costs_nothing(teachers, tmp_path, limit):
    """No file may become larger than the limit, which comes to one kind of write after the other."""
    whole = Life(teachers.one, tmp_path / "whole", "--teacher_cache", tmp_path / "whole" / "answers")
    undisturbed(whole)
    life = Life(teachers.one, tmp_path / "full", "--teacher_cache", tmp_path / "full" / "answers")
    log = life.folder / "log.txt"

    def cramped() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for (main, argv), name in zip(life.steps(), ("project", "train", "export"), strict=False):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            code = exit_code(main, argv)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            print(f"[{name}: {code}]", flush=True)
            if code:
                return code
        return 0

    read, write = os.pipe()  # what is printed must not count against the limit
    process = fork(_printing_to, cramped, read, write)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    process.join()
    log.write_text(said)
    assert process.exitcode in (0, 1, 2), said
    assert "Traceback" not in said and (process.exitcode == 0 or "error: " in said), said
    assert not list(life.folder.rglob("*.tmp")), said
    undisturbed(life)
    assert life.results() == whole.results()


def _printing_to(work: Callable[[], int], read: int, write: int) -> None:
    os.close(read)
    run_and_exit(work, write)


def without_privileges() -> None:
    """Give up root's right to write where permissions forbid it (capset of Linux), in this process alone."""
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)):
        raise OSError(ctypes.get_errno(), "capset")


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize("name", ["student", "prompts", "answers", "projected", "."])
def test_a_folder_that_cannot_be_written_to_is_said_in_words(teachers, tmp_path, name):
    life = Life(teachers.one, tmp_path / "life", "--teacher_cache", tmp_path / "life" / "answers")
    place = life.folder / name
    place.mkdir(exist_ok=True)
    before = sorted(path.name for path in place.iterdir())
    place.chmod(0o555)

    def restricted() -> int:
        without_privileges()
        return life.live()

    log = tmp_path / "log.txt"
    process = in_a_process(restricted, log)
    process.join(LONGEST_S)
    place.chmod(0o755)
    said = log.read_text()
    assert process.exitcode == 2, said
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in said and len(lines[0]) < 500, said
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_clock_that_goes_back_takes_nothing_from_a_run(teachers, tmp_path, monkeypatch):
    whole, life = (Life(teachers.one, tmp_path / name) for name in ("whole", "life"))
    undisturbed(whole)
    now = time.time()

    def earlier() -> float:
        nonlocal now
        now -= 3600
        return now

    def stopped_half_way() -> int:
        monkeypatch.setattr(time, "time", earlier)
        return exit_code(train_distillation.main, [*life.train, "--max_steps", STEPS // 2, "--lr_scheduler", "cosine"])

    process = in_a_process(stopped_half_way, life.folder / "log.txt")
    process.join()
    assert process.exitcode == 0, (life.folder / "log.txt").read_text()

    def rest() -> int:
        monkeypatch.setattr(time, "time", earlier)
        return exit_code(train_distillation.main, life.train)

    process = in_a_process(rest, life.folder / "log.txt")
    process.join()
    assert process.exitcode == 0, (life.folder / "log.txt").read_text()
    steps = [line["step"] for line in read_metrics(life.folder / "student")]
    assert steps == list(range(1, STEPS + 1))
    assert all(line["elapsed_s"] >= 0 for line in read_metrics(life.folder / "student"))


# ---- what a run reads changes or goes ----


def test_a_teacher_cache_that_vanishes_is_said_and_can_be_asked_for_anew(teachers, tmp_path):
    life = Life(teachers.one, tmp_path / "life", "--teacher_cache", tmp_path / "answers", "--max_steps", 10)
    assert in_turn(life) == 0
    for path in (tmp_path / "answers").glob("answers_*"):
        path.unlink()
    longer = Life(teachers.one, life.folder, "--teacher_cache", tmp_path / "answers", "--max_steps", 20)
    assert in_turn(longer, "train") == 2
    said = (life.folder / "log.txt").read_text()
    assert "was begun for" in said and "another folder" in said and "Traceback" not in said
    shutil.rmtree(tmp_path / "answers")
    assert in_turn(longer, "train") in (0, 2)
    assert "Traceback" not in (life.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    "goes", [lambda out: out.rename(out.with_name("elsewhere")), shutil.rmtree], ids=["moved", "removed"]
)
def test_an_output_folder_that_goes_while_a_run_writes_to_it_is_said_and_costs_nothing(teachers, tmp_path, goes):
    whole, life = (Life(teachers.one, tmp_path / name, "--save_every", 12) for name in ("whole", "life"))
    undisturbed(whole)
    process = in_a_process(life.live, life.folder / "log.txt")
    metrics, until = life.folder / "student" / "metrics.jsonl", time.monotonic() + LONGEST_S
    while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.005)
    goes(metrics.parent)
    process.join(LONGEST_S)
    log = (life.folder / "log.txt").read_text()
    assert process.exitcode == 0 and log.count("was moved or removed") == 1, log
    assert life.results() == whole.results()


def test_a_prompt_cache_that_vanishes_between_runs_is_made_again(teachers, tmp_path):
    whole, life = (Life(teachers.one, tmp_path / name, "--max_steps", 10) for name in ("whole", "life"))
    undisturbed(whole)
    half = Life(teachers.one, life.folder, "--max_steps", 10)
    assert in_turn(half, "train") == 0
    shutil.rmtree(life.folder / "prompts")
    (life.folder / "student" / "checkpoints" / "step_00000010.json").unlink()
    assert in_turn(life, "train") == 0
    assert digest(life.folder / RESULTS[0]) == digest(whole.folder / RESULTS[0])


def trained_on(teacher: Path, place: Path, name: str) -> Path:
    """Copy a teacher, one of whose tensors has been trained on a little."""
    shutil.copytree(teacher, place)
    path = place / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] * 1.001}, path)
    return place


@pytest.mark.parametrize("name", ["blocks.0.attn2.to_k.weight", "condition_embedder.time_embedder.linear_1.bias"])
def test_a_teacher_that_changes_between_runs_is_said_and_costs_nothing(teachers, tmp_path, name):
    answers = ["--teacher_cache", tmp_path / "answers"]
    live, cached = tmp_path / "live", tmp_path / "cached"
    assert in_turn(Life(teachers.one, live, "--max_steps", 8), "train") == 0
    assert in_turn(Life(teachers.one, cached, *answers, "--max_steps", 8), "train") == 0
    before = {folder: snapshot(folder) for folder in (live / "student", cached / "student", tmp_path / "answers")}
    other = trained_on(teachers.one, tmp_path / "other", name)
    for folder, life in (
        (live, Life(other, live, "--max_steps", 16)),
        (cached, Life(other, cached, *answers, "--max_steps", 16)),
        (tmp_path / "third", Life(other, tmp_path / "third", *answers, "--max_steps", 8)),
    ):
        assert in_turn(life, "train") == 2
        said = (folder / "log.txt").read_text()
        assert "teacher" in said.splitlines()[-1] and "Traceback" not in said, said
    assert before == {folder: snapshot(folder) for folder in before}
    assert in_turn(Life(teachers.one, live, "--max_steps", 16), "train") == 0


def in_turn(life: Life, what: str = "all") -> int:
    work = life.live if what == "all" else lambda: exit_code(train_distillation.main, life.train)
    process = in_a_process(work, life.folder / "log.txt")
    process.join(LONGEST_S)
    return process.exitcode
