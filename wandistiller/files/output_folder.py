"""The folder that a run writes to: checked before any work, locked while it runs, and never overwriting an earlier student."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.paths import nearest_existing

METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples"
LOSS_PLOT_NAME = "loss.png"
TENSORBOARD_NAME = "tensorboard"
CARD_NAME = "README.md"
# A card of ours holds this mark; a README.md without it is a person's.
CARD_MARK = "<!-- Written by WanDistiller"
EVALUATION_NAME = "evaluation.json"
COMPARISON_NAME = "teacher_vs_student.png"
_OF_A_RUN = [
    "student_config.json",
    "diffusion_model.safetensors",
    "projection_report.json",
    METRICS_NAME,
    SAMPLES_NAME,
    LOSS_PLOT_NAME,
    TENSORBOARD_NAME,
    "checkpoints",
    EVALUATION_NAME,
    COMPARISON_NAME,
    CARD_NAME,
]


def check_output_folder(path: str | Path, flag: str = "--output_dir") -> Path:
    """Refuse a path that cannot become a folder, without creating anything; errors name `flag`."""
    folder = Path(path)
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is a file; give a folder")
    return folder


def check_writable(path: str | Path, flag: str) -> None:
    """Refuse a folder that cannot be written to or made, as far as its permissions tell, without touching anything."""
    existing = nearest_existing(check_output_folder(path, flag).absolute())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: cannot be written to (Permission denied); give another folder")


def prepare_output_folder(path: str | Path, flag: str = "--output_dir") -> Path:
    """Create the folder and prove that it can be written to."""
    folder = check_output_folder(path, flag)
    probe = folder / ".write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written to ({error.strerror}); give another folder") from None
    return folder


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder inside, or until the end of this process however it ends.

    The lock is the folder's own (flock), so that none is left behind as a file.

    Raises:
        UserError: another run has it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"--output_dir {folder}: another run is writing to it; wait for its end, stop it, or give another folder"
                ) from None
        yield
    finally:
        os.close(descriptor)


def set_aside_previous_student(folder: Path) -> Path | None:
    """Move what an earlier run left into a folder of its own, so that a new student never replaces it silently."""
    previous = [folder / name for name in _OF_A_RUN if (folder / name).exists() and _is_ours(folder / name)]
    if not previous:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = next(
        path
        for count in range(1000)
        if not (path := folder / (f"replaced-{stamp}" + (f"-{count}" if count else ""))).exists()
    )
    aside.mkdir()
    for path in previous:
        path.rename(aside / path.name)
    return aside


def _is_ours(path: Path) -> bool:
    """Return whether a run has written it: a README.md may be a person's own, as in a folder cloned from the hub."""
    return path.name != CARD_NAME or is_card(path)


def is_card(path: Path) -> bool:
    """Return whether this is a model card that a run has written; a folder of that name is none."""
    return path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
