"""What the tests of the commands share: one thread, no network, tiny Wan checkpoints, and a command run in-process."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before torch and huggingface_hub are imported. With tiny tensors a second thread costs more than it saves.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from safetensors.torch import load_file
from wan_folders import write_original_folder, write_pipeline_folder, write_single_file

import train_distillation
from wandistiller.command_line import run_command

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "data" / "static_prompts.txt"

# The own shape of what wan_folders writes: 3 layers, 2 heads of 12 channels.
IDENTITY_CONFIG = {
    "model_type": "WanLiteStudent",
    "block": "wan",
    "hidden_size": 24,
    "depth": 3,
    "num_heads": 2,
    "ffn_dim": 40,
    "num_channels": 16,
    "image_size": 32,
    "patch_size": 2,
    "text_max_length": 512,
    "text_encoder_output_dim": 20,
    "freq_dim": 256,
    "eps": 1e-6,
}
PRUNED_CONFIG = IDENTITY_CONFIG | {"hidden_size": 12, "depth": 2, "num_heads": 1, "ffn_dim": 24}


@dataclass(frozen=True)
class Outcome:
    """What a person sees of a command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Teachers:
    """Tiny checkpoints on disk, to be read only, and a cache for their prompts' embeddings."""

    one: Path  # diffusers pipeline folder
    two: Path  # the same with two experts
    original: Path  # original folder, without a usable text encoder
    single_file: Path  # ComfyUI's layout; heads of 128
    prompt_cache: Path


@pytest.fixture(scope="session")
def teachers(tmp_path_factory) -> Teachers:
    folder = tmp_path_factory.mktemp("teachers")
    places = Teachers(*(folder / name for name in ("one", "two", "original", "single.safetensors", "prompt_cache")))
    write_pipeline_folder(places.one)
    write_pipeline_folder(places.two, two_experts=True, seed=5)
    write_original_folder(places.original)
    write_single_file(places.single_file, prefix="model.diffusion_model.")
    return places


@pytest.fixture
def run_main(capsys) -> Callable[..., Outcome]:
    """Run a command's main in this process, as its `if __name__` does."""

    def run(main: Callable[[list[str]], int | None], *args: object) -> Outcome:
        capsys.readouterr()
        try:
            code = run_command(lambda: main([str(arg) for arg in args]))
        except SystemExit as stop:  # argparse's way out
            code = stop.code
        return Outcome(code, *capsys.readouterr())

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
    """Train a student of `config` on the CPU; returns the outcome. Flags given here win over the defaults below."""

    def run(teacher: Path | str, config: dict, *flags: object, output_dir: Path | None = None):
        folder = output_dir or tmp_path / "out"
        return run_main(
            train_distillation.main, "--teacher_path", teacher, "--student_config", write_config(config),
            "--data_path", PROMPTS, "--prompt_cache", teachers.prompt_cache, "--device", "cpu", "--output_dir", folder,
            "--num_samples", 0, "--save_every", 0, *flags,
        )  # fmt: skip

    return run


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder: its content's hash and its modification time."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_model.safetensors")
