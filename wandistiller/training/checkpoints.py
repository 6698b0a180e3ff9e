"""Checkpoints of a run: written whole or not at all, checksummed, and resumed from bit for bit.

One checkpoint is a folder `step_00000100/` of safetensors files (weights, their average, optimiser, training states;
written by all processes at once) and `step_00000100.json` (its manifest: which run it belongs to, and the files' checksums).
A thread writes them from a copy in host memory, beside the training. The JSON is written last. A checkpoint without it was never
finished, and one with another checksum is damaged; in both cases the run resumes from the checkpoint before it. Nothing is unpickled.
"""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller.errors import UserError, differences, shortened, shown
from wandistiller.files.atomic import file_digest, fsync, write_json
from wandistiller.files.json_files import load_json
from wandistiller.files.paths import remove, require_file
from wandistiller.processes import Processes, error_reason, is_sharded, load_tensors, on_host, save_tensors

FOLDER_NAME = "checkpoints"
_STEP = re.compile(r"step_(\d{8})")  # files of other names are a person's: they are neither counted nor removed


class CheckpointError(RuntimeError):
    """A checkpoint of our own run could not be written. The message says which earlier one is good."""

    exit_code = 1


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint, by what its step_XXXXXXXX.json says.

    Attributes:
        folder: of the files; it lies beside the JSON and has its name.
        files: sha256 of every file.
        first_step: steps before the stage of the run that it belongs to.
        threads: CPU threads of the process that wrote it; their number decides the rounding of sums.
        run: the description of the run.
    """

    folder: Path
    step: int
    files: dict[str, str]
    first_step: int
    threads: int
    run: dict[str, object]

    @classmethod
    def read_manifest(cls, path: Path) -> "Checkpoint":
        """Read the JSON of a checkpoint.

        Raises:
            OSError, KeyError, TypeError, ValueError: it is missing or damaged.
        """
        found = load_json(path)
        types = {"step": int, "files": dict, "first_step": int, "threads": int, "run": dict}
        wrong = [name for name, wanted in types.items() if type(found[name]) is not wanted]
        if wrong or found["step"] != _step_of(path) or not 0 <= found["first_step"] <= found["step"]:
            raise ValueError(f"{path.name} holds something else as {', '.join(wrong) or 'step'}")
        return cls(path.with_suffix(""), **{name: found[name] for name in types})

    def read(self, room_for: Callable[[str, torch.Size, torch.dtype], Tensor | None]) -> dict[str, Tensor]:
        """Read its tensors, each into what `room_for` returns for its name, shape and dtype; None leaves it out."""
        return load_tensors(self.folder, room_for)


class Checkpoints:
    """The checkpoints of one output folder. Every process of a run calls every method.

    Args:
        description: what a run must share with a checkpoint to resume from it, as JSON values.
        keep: how many of the newest checkpoints stay.
        neutral: what a checkpoint counts as having where its description lacks a name, which came later.
        in_background: whether training goes on while files are written, which takes host memory for a copy of the state.

    Attributes:
        resume_from: what the run goes on from; None where it starts anew.
        last_good: step of the last checkpoint that this process has resumed from or written.
    """

    def __init__(
        self,
        output_dir: str | Path,
        description: dict[str, object],
        keep: int = 2,
        processes: Processes | None = None,
        neutral: dict[str, object] | None = None,
        in_background: bool = True,
    ):
        self.folder = Path(output_dir) / FOLDER_NAME
        self.description, self.neutral = json.loads(json.dumps([description, neutral or {}]))  # as it will be read back
        self.keep = keep
        self.processes, self.in_background = processes or Processes(), in_background
        self.writers = self.processes.beside()  # those that the thread takes part in
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None
        self.resume_from: Checkpoint | None = None
        self.last_good: int | None = None
        self.damaged: set[int] = set()  # steps that were skipped, which count for nothing among those to keep

    @property
    def first_step(self) -> int:
        """Steps taken by earlier commands."""
        return 0 if self.resume_from is None else self.resume_from.step

    def newest(self) -> Checkpoint | None:
        """Return the newest good checkpoint, or None if there is none at all. A damaged one is skipped and reported.

        Raises:
            UserError: it belongs to a run that differs in what must be the same, or all checkpoints are damaged.
        """
        found = self.processes.from_first(manifests_in(self.folder))
        for path in found:
            checkpoint, reason = None, None
            try:
                checkpoint = Checkpoint.read_manifest(path)
                self._check_files(checkpoint)
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                reason = error_reason(error)
            if not self.processes.all_true(reason is None):
                told = shortened(reason or "another process found so")
                print(f"{path.with_suffix('')}: skipped, it is damaged ({told})")
                self.damaged.add(_step_of(path))
                continue
            self._check_run(checkpoint.run)
            self.resume_from, self.last_good = checkpoint, checkpoint.step
            return checkpoint
        if found:
            raise UserError(
                f"{self.folder}: none of its {len(found)} checkpoints is whole; copy them again, or add --overwrite to "
                "start anew (what is there is kept beside)"
            )
        return None

    def _check_files(self, checkpoint: Checkpoint) -> None:
        """Compare this process's part of the files with their checksums."""
        for name in sorted(checkpoint.files)[self.processes.rank :: self.processes.count]:
            if Path(name).name != name:
                raise ValueError(f"{shown(name)} is no name of a file")
            file = checkpoint.folder / name
            require_file(file)
            if file_digest(file) != checkpoint.files[name]:
                raise ValueError(f"the checksum of {name} differs")

    def _check_run(self, description: dict[str, object]) -> None:
        """Refuse a checkpoint of a run that differs in what must be the same."""
        theirs, ours = self.neutral | description, self.neutral | self.description
        if differing := differences(theirs, ours):
            other = "" if theirs.keys() == ours.keys() else " (it is of another version or command)"
            raise UserError(
                f"{self.folder} belongs to a run with {'; '.join(differing)}{other}. To resume it, give the same flags; to start anew, add "
                f"--overwrite (what is there is kept beside); to go on from its student, --init_from {self.folder.parent} and "
                "another --output_dir"
            )

    def save(self, step: int, tensors: dict[str, Tensor], first_step: int = 0) -> None:
        """Begin to write a checkpoint, once the one before is finished; `finish` waits for it.

        Args:
            first_step: steps before the stage of the run that it belongs to.

        Raises:
            CheckpointError: see `finish`.
        """
        self.finish()
        tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
        if not self.processes.is_first:  # of what all processes have, the first one writes
            tensors = {name: value for name, value in tensors.items() if is_sharded(value)}
        if self.in_background:
            tensors = on_host(tensors)
        about = {"step": step, "first_step": first_step, "threads": torch.get_num_threads(), "run": self.description}
        self.writing = self.thread.submit(self._write, tensors, about)
        if not self.in_background:
            self.finish()

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written, which `finish` will tell."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            CheckpointError: the disk is full or cannot be written to; earlier checkpoints are untouched.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write a checkpoint, then drop the oldest beyond `keep`; every process has a thread that does this."""
        step, folder = about["step"], self.folder / f"step_{about['step']:08d}"
        try:
            self.writers.first_then_all(lambda: self._make_room(folder))
            save_tensors(folder, tensors, self.writers)
            about["files"] = self._checksums(folder)
            self.writers.first_then_all(lambda: self._complete(folder, about))
            self.last_good = step
        except (OSError, UserError) as error:
            last = self.last_good
            kept = "there is none yet"
            if last is not None:
                kept = f"the last good one is step_{last:08d}, and the same command resumes from it"
            raise CheckpointError(
                f"{folder}: cannot be written ({error_reason(error)}); {kept}. Free some space first"
            ) from None

    def _make_room(self, folder: Path) -> None:
        """Make the folder, empty. What was there stops being a checkpoint first, by losing its manifest."""
        if not self.folder.parent.is_dir():
            print(
                f"Warning: {self.folder.parent} was moved or removed while the run writes to it; it is made anew, and what is saved "
                "from here on lies there"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        remove(folder.with_suffix(".json"))
        remove(folder)  # of a link, which may lead nowhere, the link alone
        folder.mkdir()

    def _checksums(self, folder: Path) -> dict[str, str]:
        """Return the sha256 of every file of a folder, of which each process reads its share."""
        names = self.writers.from_first(sorted(path.name for path in folder.iterdir()))
        own, reason = {}, None
        try:
            own = {name: file_digest(folder / name) for name in names[self.processes.rank :: self.processes.count]}
        except OSError as error:
            reason = error_reason(error)
        found = self.writers.from_each((own, reason))
        if reasons := [reason for _, reason in found if reason]:  # machines may not share the disk
            raise OSError(reasons[0])
        return {name: digest for digests, _ in found for name, digest in digests.items()}

    def _complete(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the manifest, which makes the folder a checkpoint."""
        fsync(folder)  # for the files' names; their contents are synced as they are written
        write_json(folder.with_suffix(".json"), about, indent=1, ensure_ascii=False)
        self._drop_old(about["step"])

    def _drop_old(self, step: int) -> None:
        """Remove the checkpoints before `step` that are damaged or not among the newest.

        Checkpoints beyond `step` were skipped as damaged, and stay until the run writes them again.
        """
        self.damaged.discard(step)
        known = [number for number in map(_step_of, manifests_in(self.folder)) if number not in self.damaged]
        kept = [number for number in known if number <= step][: self.keep]
        # Manifests go first, so that a kill here leaves no checkpoint that lacks files.
        for path in sorted(self.folder.iterdir(), key=Path.is_dir):
            match = _STEP.fullmatch(path.stem)
            if match is None or path.is_symlink() or int(match[1]) > step or int(match[1]) in kept:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix == ".json":
                path.unlink()


def manifests_in(folder: Path) -> list[Path]:
    """Return the manifests of all finished checkpoints of a folder, the newest first."""
    found = folder.glob("*.json") if folder.is_dir() else ()
    return sorted((path for path in found if _STEP.fullmatch(path.stem) and not path.is_symlink()), reverse=True)


def _step_of(manifest: Path) -> int:
    return int(_STEP.fullmatch(manifest.stem)[1])
