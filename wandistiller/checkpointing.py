"""Checkpoints of a run: written whole or not at all, checksummed, and gone on from bit for bit.

One checkpoint is `step_000100.safetensors` (weights, their average, optimiser, training states, random numbers) and
`step_000100.json` (what run it belongs to, and the checksum). The JSON comes last, so a checkpoint without it, or with
another checksum, was never finished or is damaged, and the one before it is used. Nothing is unpickled.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wandistiller.atomic import atomic_path
from wandistiller.errors import UserError

FOLDER_NAME = "checkpoints"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written during training; the message says which one before it is good."""

    exit_code = 1


@dataclass(frozen=True)
class Checkpoint:
    """A good checkpoint, read."""

    step: int
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one output folder.

    Args:
        description: what must be the same for going on to make sense, as JSON values.
        keep: how many of the newest stay.
    """

    def __init__(self, output_dir: str | Path, description: dict[str, object], keep: int = 2):
        self.folder = Path(output_dir) / FOLDER_NAME
        self.description = json.loads(json.dumps(description))  # as it will be read back
        self.keep = keep

    def exist(self) -> bool:
        return any(self.folder.glob("step_*.json"))

    def newest(self, say: Callable[[str], None] = print) -> Checkpoint | None:
        """The newest good checkpoint; a damaged one is skipped, and `say` is told.

        Raises:
            UserError: it belongs to a run that differs in what must be the same.
        """
        from safetensors.torch import load_file

        for manifest in sorted(self.folder.glob("step_*.json"), reverse=True):
            tensors_file = manifest.with_suffix(".safetensors")
            try:
                about = json.loads(manifest.read_text(encoding="utf-8"))
                step, checksum, description = about["step"], about["sha256"], about["run"]
                if file_digest(tensors_file) != checksum:
                    raise ValueError("its checksum differs")
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
                say(f"{tensors_file}: skipped, it is damaged ({reason}); the one before it is used")
                continue
            self._check(description)
            return Checkpoint(step, load_file(tensors_file))
        return None

    def _check(self, description: dict[str, object]) -> None:
        names = sorted(description.keys() | self.description.keys())
        differing = [
            f"{name} {description.get(name)!r}, now {self.description.get(name)!r}"
            for name in names
            if description.get(name) != self.description.get(name)
        ]
        if differing:
            raise UserError(
                f"{self.folder} belongs to a run with {'; '.join(differing)}. To go on with it, give the same flags; to "
                "start anew, add --overwrite (what is there is kept beside) or give another --output_dir"
            )

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint, then drop the oldest beyond `keep`.

        Raises:
            CheckpointError: the disk is full or cannot be written to; earlier checkpoints are untouched.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        name = self.folder / f"step_{step:08d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(name) as beside:
                save_file({key: value.detach().contiguous() for key, value in tensors.items()}, beside)
                checksum = file_digest(beside)
            with atomic_path(name.with_suffix(".json")) as beside:
                about = {"step": step, "sha256": checksum, "run": self.description}
                beside.write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            last = max((path.stem for path in self.folder.glob("step_*.json")), default=None)
            kept = f"the last good one is {last}, and the same command goes on from it" if last else "there is none yet"
            raise CheckpointError(f"{name}: cannot be written ({reason}); {kept}. Free some space first") from None
        self._drop_old()

    def _drop_old(self) -> None:
        kept = {path.stem for path in sorted(self.folder.glob("step_*.json"))[-self.keep :]}
        for path in self.folder.iterdir():
            # The manifest goes first: what is left of a checkpoint is then no checkpoint.
            if path.stem not in kept and path.suffix == ".json":
                path.unlink()
        for path in self.folder.iterdir():
            if path.suffix in (".safetensors", ".tmp") and path.stem not in kept:
                path.unlink()

    def check_disk(self, num_bytes: int) -> None:
        """Refuse a run whose checkpoints cannot fit, before it starts."""
        existing = self.folder
        while not existing.exists():
            existing = existing.parent
        needed, free = (self.keep + 1) * num_bytes, shutil.disk_usage(existing).free
        if needed > free:
            raise UserError(
                f"{self.folder}: {self.keep} checkpoints and one being written take about {needed:,} bytes, {free:,} are "
                "free; free some space, give another --output_dir, a smaller --keep_checkpoints, or --save_every 0"
            )


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
