"""The folder that a run writes to: checked before any work, locked while it runs, and never overwriting an earlier student."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from wandistiller.errors import UserError, shown
from wandistiller.files.atomic import locked, remove_all_leftovers
from wandistiller.files.paths import nearest_existing

MAX_NAME_BYTES = 255  # of a file or folder, on almost every file system
METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples"
OVER_TIME_NAME = "samples_over_time.png"
LOSS_PLOT_NAME = "loss.png"
TENSORBOARD_NAME = "tensorboard"
CARD_NAME = "README.md"
RUN_NAME = "run.yaml"  # the flags of a run
# A file of ours that a person may have one of holds its mark.
CARD_MARK, RUN_MARK = "<!-- Written by WanDistiller", "# Written by WanDistiller"
EVALUATION_NAME = "evaluation.json"
COMPARISON_NAME = "teacher_vs_student.png"
FRONTIER_NAME = "frontier.png"
GALLERY_NAME = "gallery.html"
TRAINED_PROMPTS_NAME = "trained_prompts.sha256"
SAMPLE_FILE = re.compile(r"step_(\d{1,15})\.png")
STUDENT_NAMES = ["student_config.json", "diffusion_model.safetensors", "projection_report.json"]
_OF_A_RUN = [
    *STUDENT_NAMES, TRAINED_PROMPTS_NAME, METRICS_NAME, SAMPLES_NAME, LOSS_PLOT_NAME, TENSORBOARD_NAME, "checkpoints", EVALUATION_NAME,
    COMPARISON_NAME, FRONTIER_NAME, GALLERY_NAME, CARD_NAME, RUN_NAME, OVER_TIME_NAME,
]  # fmt: skip


def check_output_folder(path: str | Path, flag: str = "--output_dir") -> Path:
    """Refuse a path that cannot become a folder, without creating anything; errors name `flag`."""
    folder = Path(path)
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is a file; give a folder")
    if folder.is_symlink() and existing != folder:
        raise UserError(f"{flag} {folder}: is a link that leads to no folder; remove it, or give another folder")
    if too_long := next((part for part in folder.parts if len(os.fsencode(part)) > MAX_NAME_BYTES), None):
        raise UserError(
            f"{flag}: {shown(too_long)} is too long for a name ({len(os.fsencode(too_long))} bytes of {MAX_NAME_BYTES}); give a shorter one"
        )
    return folder


def check_writable(path: str | Path, flag: str) -> None:
    """Refuse a folder where no file can be made, whatever its permissions say, as in /proc; nothing is left there."""
    existing = nearest_existing(check_output_folder(path, flag).absolute())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _cannot_be_written(path, flag, error) from None


def prepare_output_folder(path: str | Path, flag: str = "--output_dir") -> Path:
    """Create the folder, check that it can be written to, and remove what killed processes left of files in it."""
    folder = check_output_folder(path, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_be_written(folder, flag, error) from None
    check_writable(folder, flag)
    for place in (folder, folder / SAMPLES_NAME):
        remove_all_leftovers(place)
    return folder


def _cannot_be_written(folder: str | Path, flag: str, error: OSError) -> UserError:
    return UserError(f"{flag} {folder}: cannot be written to ({error.strerror}); give another folder")


@contextlib.contextmanager
def removed_if_empty(path: str | Path) -> Iterator[None]:
    """On error, remove the folders created here if still empty.

    A file that is refused only once the folder is there, such as a damaged text encoder, then leaves nothing behind.
    """
    folder = Path(path).absolute()
    new = [part for part in (folder, *folder.parents) if not os.path.lexists(part)]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds something by now, or somebody else's run has removed it
            for part in new:
                part.rmdir()
        raise


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder inside, or until the end of this process however it ends.

    The lock is the folder's own (flock), so that none is left behind as a file.

    Raises:
        UserError: another run has it.
    """
    with locked(folder.resolve()) as is_ours:
        if is_ours is False:
            raise UserError(
                f"--output_dir {folder}: another run is writing to it; wait for its end, stop it, or give another folder"
            )
        yield


def set_aside_previous_student(folder: Path, also: Sequence[str] = ()) -> Path | None:
    """Move what an earlier run left into a folder of its own, so that a new student never replaces it silently.

    Args:
        also: names of files that the run will write beside those of every run.
    """
    # A link that leads nowhere would be in the way as well:
    previous = [
        folder / name for name in [*_OF_A_RUN, *also] if os.path.lexists(folder / name) and _is_ours(folder / name)
    ]
    if not previous:
        return None
    aside = folder / datetime.now().strftime("replaced-%Y%m%d-%H%M%S-%f")
    aside.mkdir()
    for path in previous:
        path.rename(aside / path.name)
    return aside


def _is_ours(path: Path) -> bool:
    """Return whether a run has written it: a README.md may be a person's own, as in a folder cloned from the hub."""
    return path.name not in (CARD_NAME, GALLERY_NAME, RUN_NAME) or has_mark(path)


def has_mark(path: Path) -> bool:
    """Return whether this is a card, gallery or file of flags that we have written; a folder of that name is none."""
    mark = RUN_MARK if path.name == RUN_NAME else CARD_MARK
    return path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace")


def check_evaluation_is_ours(folder: Path, flag: str) -> None:
    """Refuse a folder whose evaluation.json or pictures of these names a person put there, be they folders: ours say how they were made.

    Raises:
        UserError: names the file.
    """
    marks_of = {
        EVALUATION_NAME: b'"wandistiller_version"',
        COMPARISON_NAME: b"num_inference_steps",
        FRONTIER_NAME: b"WanDistiller",
    }
    for name, marks in marks_of.items():
        file = folder / name
        if os.path.lexists(file) and not (file.is_file() and marks in file.read_bytes()):
            raise UserError(f"{flag} {folder}: {name} there was not written by evaluate_student.py; move it away")


def sample_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the sample pictures of a run's folder with their steps, in order."""
    names = ((SAMPLE_FILE.fullmatch(file.name), file) for file in (folder / SAMPLES_NAME).glob("step_*.png"))
    return sorted((int(found[1]), file) for found, file in names if found and file.is_file())
