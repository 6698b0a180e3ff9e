"""What the tests of the commands share: one thread, no network, tiny Wan checkpoints, and a command run in-process."""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

# Before torch and huggingface_hub are imported. With tiny tensors a second thread costs more than it saves.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

import train_distillation
from support.processes import exit_code
from support.runs import PROMPTS, PRUNED_CONFIG, Outcome, Teachers
from support.torchrun import FLAGS, start
from support.wan_folders import write_original_folder, write_pipeline_folder, write_single_file

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage() -> None:
    """Leave what is loaded so far out of garbage collection: half of a tiny run's time would go into looking through libraries."""
    gc.freeze()


def words_of_run(teachers: Teachers, teacher: object, config: Path, output_dir: Path, *flags: object) -> list[str]:
    """A run on the CPU; flags given here win.

    There is one stage, so that the teacher is asked at all steps; tests of the second one type --student_steps.
    """
    words = [
        "--teacher_path", teacher, "--student_config", config, "--data_path", PROMPTS, "--prompt_cache", teachers.prompt_cache,
        "--device", "cpu", "--output_dir", output_dir, "--num_samples", 0, "--save_every", 0, "--student_steps", "none", *flags,
    ]  # fmt: skip
    return [str(word) for word in words]


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> Teachers:
    folder = tmp_path_factory.mktemp("teachers")
    places = Teachers(*(folder / name for name in ("one", "two", "original", "single.safetensors", "prompt_cache")))
    write_pipeline_folder(places.one)
    write_pipeline_folder(places.two, two_experts=True, seed=5)
    write_original_folder(places.original)
    write_single_file(places.single_file, prefix="model.diffusion_model.")
    # A first run loads libraries and encodes the prompts, which forks of this process are then spared.
    (folder / "config.json").write_text(json.dumps(PRUNED_CONFIG), encoding="utf-8")
    argv = words_of_run(places, places.one, folder / "config.json", folder / "first", "--max_steps", 1)
    assert exit_code(train_distillation.main, argv) == 0
    gc.freeze()
    return places


@pytest.fixture
def run_main(capsys) -> Callable[..., Outcome]:
    """Run a command's main in this process, as its `if __name__` does."""

    def run(main: Callable[[list[str]], int | None], *args: object) -> Outcome:
        capsys.readouterr()
        return Outcome(exit_code(main, args), *capsys.readouterr())

    return run


@pytest.fixture
def write_config(tmp_path) -> Callable[..., Path]:
    """Write a student config beside the test's other files."""

    def write(values: object, name: str = "config.json") -> Path:
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def train(run_main, write_config, tmp_path, teachers: Teachers):
    """Train a student of `config` on the CPU; returns the outcome."""

    def run(teacher: Path | str, config: dict, *flags: object, output_dir: Path | None = None):
        argv = words_of_run(teachers, teacher, write_config(config), output_dir or tmp_path / "out", *flags)
        return run_main(train_distillation.main, *argv)

    return run


@pytest.fixture
def flags_of(teachers, write_config, tmp_path):
    """The command line of a run on the CPU, into a folder of the test's own."""

    def flags(output: str, *flags: object, teacher: Path | None = None, config: dict = PRUNED_CONFIG) -> list[str]:
        folder = tmp_path / output
        return words_of_run(teachers, teacher or teachers.one, write_config(config), folder, *FLAGS, *flags)

    return flags


@pytest.fixture
def launch(tmp_path):
    """Run the command in so many processes, as if on so many machines; their exit codes, and what they said."""

    def run(count: int, argv: list[str], nodes: int = 1) -> tuple[list[int], str]:
        log = tmp_path / "log.txt"
        log.unlink(missing_ok=True)
        processes = start(count, argv, log, nodes=nodes)
        for process in processes:
            process.join()
        return [process.exitcode for process in processes], log.read_text()

    return run
