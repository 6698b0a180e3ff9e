"""What the tests of the commands share: shapes of tiny students, what a person sees of a command, and what a run's folder holds."""

import contextlib
import hashlib
import json
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


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

    def ok(self) -> "Outcome":
        """Hold it to exit code 0."""
        assert self.code == 0, self.err
        return self

    def refused(self, *words: str) -> "Outcome":
        """Hold it to exit code 2 and one message, without a traceback, that holds these words."""
        assert self.code == 2 and self.err.count("\n") == 1 and "Traceback" not in self.err, self.err
        assert all(word in self.err for word in words), self.err
        return self


@dataclass(frozen=True)
class Teachers:
    """Tiny checkpoints on disk, to be read only, and a cache for their prompts' embeddings."""

    one: Path  # diffusers pipeline folder
    two: Path  # the same with two experts
    original: Path  # original folder, without a usable text encoder
    single_file: Path  # ComfyUI's layout; heads of 128
    prompt_cache: Path


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


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all checkpoints that a run kept."""
    files = sorted((folder / "checkpoints").glob("step_*/*.safetensors"))
    assert files
    return {f"{file.parent.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same student, bit for bit."""
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def as_if_stopped_after(folder: Path, step: int) -> None:
    """Take the later checkpoints from a run that kept all: it stands as if its process had ended before the next was whole."""
    for manifest in (folder / "checkpoints").glob("step_*.json"):
        if manifest.stem > f"step_{step:08d}":
            manifest.unlink()


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """End what waits inside for something that never comes, such as a writer to a named pipe."""

    def give_up(signum: int, frame: object) -> None:
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def file_size_limited(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
