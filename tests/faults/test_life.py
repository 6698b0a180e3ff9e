"""Faults over the whole life of a student: projection, encoding, the teacher's cache, training, saving, export.

The commands are run as a person repeats them: each again until it is done. A real process is killed with SIGKILL at random moments
of all of it (200 in the slow suite, one process and two), and what comes out must be, bit for bit, what comes out undisturbed. A
disk that is full is a real limit on file size, a folder that cannot be written to is met by a process without root's privileges.
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

TRAINING = ["--max_steps", 12, "--lr", 1e-3, "--batch_size", 2, "--save_every", 1, "--replay", 2, "--eval_every", 0]
STUDENT = "student/diffusion_model.safetensors"
LONGEST_S = 120.0


class Life:
    """The commands that make a student in a folder, each with the arguments that it is repeated with.

    Args:
        count: the processes that train.
        cached: whether the teacher's answers are kept in a folder.
    """

    def __init__(self, teacher: Path, folder: Path, *training: object, count: int = 1, cached: bool = False):
        self.folder, self.count, self.log = folder, count, folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        config, prompts = folder / "config.json", folder / "few.txt"
        config.write_text(json.dumps(PRUNED_CONFIG))
        prompts.write_text("\n".join(PROMPTS.read_text().splitlines()[:12]))
        of_teacher = ["--teacher_path", teacher, "--student_config", config]
        self.train = [
            *of_teacher, "--data_path", prompts, "--device", "cpu", "--num_samples", 0, "--output_dir", folder / "student",
            "--prompt_cache", folder / "prompts", *TRAINING, *(["--teacher_cache", folder / "answers"] if cached else []), *training,
        ]  # fmt: skip
        projecting, exported = [*of_teacher, "--output_dir", folder / "projected"], "student.safetensors"
        exporting = ["--student", folder / "student", "--format", "original", "--output", folder / exported]
        self.commands = {
            "projected/diffusion_model.safetensors": (projection_mapper.main, projecting),
            STUDENT: (train_distillation.main, self.train),
            exported: (export_student.main, exporting),
        }

    def steps(self) -> Iterator[tuple[Callable, list[object]]]:
        """The commands that are not done yet, in order."""
        for result, command in self.commands.items():
            if not (self.folder / result).exists():
                yield command

    def live(self) -> int:
        """Run what is left in this process; return the exit code of the first command that fails."""
        return next((code for main, argv in self.steps() if (code := exit_code(main, argv))), 0)

    def begin(self, work: Callable[[], int] | None = None) -> list[multiprocessing.Process]:
        """Start `work` in a fork, or all of a life; training alone where the processes are many."""
        if self.count > 1:
            return start(self.count, [str(word) for word in self.train], self.log)
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        return [fork(run_and_exit, work or self.live, descriptor)]

    def run(self, work: Callable[[], int] | None = None) -> tuple[int, str]:
        """Do it to the end; return an exit code that all processes share, and what they said."""
        processes = self.begin(work)
        for process in processes:
            process.join(LONGEST_S)
        (code,) = {process.exitcode for process in processes}
        return code, self.log.read_text()

    def train_again(self, *flags: object) -> tuple[int, str]:
        return self.run(lambda: exit_code(train_distillation.main, [*self.train, *flags]))

    def results(self) -> dict[str, str]:
        """A digest of the tensors of all that came out; the files beside them name folders and commands."""
        return {name: digest(self.folder / name) for name in self.commands if (self.folder / name).exists()}

    def losses(self) -> list[float]:
        return [line["loss"] for line in read_metrics(self.folder / "student")]


def digest(path: Path) -> str:
    tensors = load_file(path)
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


@pytest.fixture
def life(teachers, tmp_path) -> Callable[..., Life]:
    return lambda name, *training, **how: Life(how.pop("teacher", teachers.one), tmp_path / name, *training, **how)


def wait_for_steps(life: Life, count: int, processes: list[multiprocessing.Process]) -> None:
    metrics, until = life.folder / "student" / "metrics.jsonl", time.monotonic() + LONGEST_S
    while not (metrics.is_file() and metrics.read_text().count("\n") >= count):
        time.sleep(0.005)
        assert all(process.is_alive() for process in processes) and time.monotonic() < until


# ---- killed ----


HOW = {"one process": {}, "teacher cache": {"cached": True}, "two processes": {"count": 2, "cached": True}}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("num_kills", [1, pytest.param(70, marks=pytest.mark.slow)])
def test_a_life_killed_at_random_moments_ends_as_one_never_killed(life, how, num_kills):
    measured = ["--eval_every", 6]
    whole, begun = life("whole", *measured, **how), time.monotonic()
    assert whole.run()[0] == 0
    seconds, chance, kills, number = time.monotonic() - begun, random.Random(num_kills), 0, 0
    while kills < num_kills:
        killed, number, codes = life(f"k{number}", *measured, **how), number + 1, {-signal.SIGKILL}
        while codes != {0}:
            wait_s = chance.uniform(0.02, seconds / 2) if kills < num_kills else LONGEST_S
            processes, until = killed.begin(), time.monotonic() + wait_s
            while any(process.is_alive() for process in processes) and time.monotonic() < until:
                time.sleep(0.01)
            kills += all(process.exitcode is None for process in processes)
            for process in processes:
                process.join(None if any(process.exitcode == 0 for process in processes) else 0)
                process.kill()
                process.join()
            codes = {process.exitcode for process in processes}
            assert codes <= {0, -signal.SIGKILL}, killed.log.read_text()
        assert killed.results() == whole.results() and killed.losses() == whole.losses()
        shutil.rmtree(killed.folder)


def test_when_one_of_two_processes_dies_the_other_ends_in_words_and_the_run_resumes(life):
    both = life("both", "--max_steps", 400, "--save_every", 100, count=2)
    processes = both.begin()
    wait_for_steps(both, 3, processes)
    processes[1].kill()
    for process in processes:
        process.join(LONGEST_S)
    said = both.log.read_text()
    assert processes[0].exitcode == 1 and "Traceback" not in said and "another process" in said, said
    done = len(read_metrics(both.folder / "student"))
    assert life("both", "--max_steps", done + 3, "--save_every", 100, count=2).run()[0] == 0


# ---- nobody reads what it prints ----


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_when_its_reader_leaves_or_its_terminal_closes_a_run_saves_what_it_learnt(life, kind):
    whole, left = (life(name, "--max_steps", 40, "--save_every", 100, "--eval_every", 8) for name in ("whole", "left"))
    whole.run()
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()

    def child() -> None:
        os.close(reader)
        os.setsid()
        if kind == "terminal":
            fcntl.ioctl(writer, termios.TIOCSCTTY, 0)
        run_and_exit(lambda: exit_code(train_distillation.main, left.train), writer)

    process = fork(child)
    os.close(writer)
    said = b""
    while b"step 8:" not in said:
        said += os.read(reader, 1024)
    os.close(reader)
    process.join(LONGEST_S)
    assert process.exitcode == 130
    done = len(read_metrics(left.folder / "student"))
    assert 0 < done < 40 and (left.folder / "student" / "checkpoints" / f"step_{done:08d}.json").exists()
    assert left.train_again()[0] == 0
    assert digest(left.folder / STUDENT) == digest(whole.folder / STUDENT)


# ---- no room, no permission ----


LIMITS = [2_000, 20_000, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (0, 300, 8_000, 40_000, 80_000))]


@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk_at_any_write_is_said_in_words_and_costs_nothing(life, limit):
    """No file may become larger than the limit, which comes to one kind of write after the other."""
    whole, full = life("whole", cached=True), life("full", cached=True)
    whole.run()

    def cramped() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return full.live()

    read, write = os.pipe()  # what is printed must not count against the limit
    process = fork(run_and_exit, cramped, write)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    process.join()
    assert process.exitcode in (1, 2) and "Traceback" not in said and "error: " in said, said
    assert not list(full.folder.rglob("*.tmp")), said
    assert full.run()[0] == 0 and full.results() == whole.results()


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize("name", ["student", "prompts", "answers", "projected", "."])
def test_a_folder_that_cannot_be_written_to_is_said_in_words(life, tmp_path, name):
    one = life("life", cached=True)
    one.log, place = tmp_path / "log.txt", one.folder / name
    place.mkdir(exist_ok=True)
    before = sorted(path.name for path in place.iterdir())
    place.chmod(0o555)

    def restricted() -> int:
        header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
        assert ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) == 0
        return one.live()

    code, said = one.run(restricted)
    place.chmod(0o755)
    lines = [line for line in said.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said and len(lines[0]) < 500, said
    assert sorted(path.name for path in place.iterdir()) == before


# ---- what a run writes to or reads goes or changes ----


@pytest.mark.parametrize("goes", [lambda out: out.rename(f"{out}_elsewhere"), shutil.rmtree], ids=["moved", "removed"])
def test_an_output_folder_that_goes_while_a_run_writes_to_it_is_said_and_costs_nothing(life, goes):
    whole, left = (life(name, "--save_every", 12) for name in ("whole", "left"))
    whole.run()
    (process,) = left.begin()
    wait_for_steps(left, 1, [process])
    goes(left.folder / "student")
    process.join(LONGEST_S)
    said = left.log.read_text()
    assert process.exitcode == 0 and said.count("was moved or removed") == 1, said
    assert left.results() == whole.results()


def change_a_tensor(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(name for name in tensors if name.endswith("weight"))[0]
    save_file(tensors | {name: tensors[name] * 1.001}, path)


# What is done to the folder of a run of 6 steps, before it goes on to 12 -> the word of the refusal; None: it goes on
CHANGES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "no prompt cache": (lambda folder: shutil.rmtree(folder / "prompts"), None),
    "no answers": (lambda folder: [file.unlink() for file in (folder / "answers").glob("answers_*")], "another folder"),
    "another teacher": (lambda folder: change_a_tensor(folder / "teacher" / "transformer"), "teacher"),
    "another text encoder": (lambda folder: change_a_tensor(folder / "teacher" / "text_encoder"), "teacher"),
}


@pytest.mark.parametrize("cached", [False, True], ids=["live teacher", "teacher cache"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_runs_is_said_and_costs_nothing(teachers, tmp_path, life, name, cached):
    change, word = CHANGES[name]
    if name == "no answers" and not cached:
        return
    for folder in ("whole", "left"):
        shutil.copytree(teachers.one, tmp_path / folder / "teacher")
    whole, left = (life(folder, cached=cached, teacher=tmp_path / folder / "teacher") for folder in ("whole", "left"))
    for one in (whole, left):
        assert one.train_again("--max_steps", 6, "--lr_scheduler", "constant")[0] == 0
    change(left.folder)
    if word is not None:
        before = snapshot(left.folder / "student")
        code, said = left.train_again("--lr_scheduler", "constant")
        assert code == 2 and word in said.splitlines()[-1] and "Traceback" not in said, said
        assert snapshot(left.folder / "student") == before
        return
    for one in (whole, left):
        assert one.train_again("--lr_scheduler", "constant")[0] == 0, one.log.read_text()
    assert left.results() == whole.results()
