"""The folder that a run writes to: checked before any work, locked while it runs, and never overwriting an earlier student."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.atomic import locked, remove_all_leftovers
from wandistiller.files.paths import nearest_existing

METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples"
OVER_TIME_NAME = "samples_over_time.png"
LOSS_PLOT_NAME = "loss.png"
TENSORBOARD_NAME = "tensorboard"
TRACKER_NAME = "tracker_run.txt"  # what wandb or trackio know the run by
RUN_NAME = "run.yaml"  # the flags of a run
GALLERY_MARK, RUN_MARK = "<!-- Written by WanDistiller", "# Written by WanDistiller"
EVALUATION_NAME = "evaluation.json"
COMPARISON_NAME = "teacher_vs_student.png"
FRONTIER_NAME = "frontier.png"
GALLERY_NAME = "gallery.html"
# What a file of ours holds that a person may have one of by that name
_MARKS = {
    GALLERY_NAME: GALLERY_MARK,
    RUN_NAME: RUN_MARK,
    EVALUATION_NAME: '"wandistiller_version"',
    COMPARISON_NAME: "num_inference_steps",
    FRONTIER_NAME: "WanDistiller",
}
LORA_NAMES = {"diffusers": "lora.safetensors", "original": "lora_comfyui.safetensors"}  # of --train lora
SAMPLE_FILE = re.compile(r"step_(\d{1,15})\.png")
STUDENT_NAMES = ["student_config.json", "diffusion_model.safetensors", "projection_report.json"]
_OF_A_RUN = [
    *STUDENT_NAMES, METRICS_NAME, SAMPLES_NAME, LOSS_PLOT_NAME, TENSORBOARD_NAME, TRACKER_NAME, "checkpoints", EVALUATION_NAME,
    COMPARISON_NAME, FRONTIER_NAME, GALLERY_NAME, RUN_NAME, OVER_TIME_NAME, *LORA_NAMES.values(),
]  # fmt: skip


def check_output_folder(path: str | Path, flag: str = "--output_dir") -> Path:
    """Refuse a path that cannot become a folder, without creating anything; errors name `flag`."""
    folder = Path(path)
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise UserError(f"{flag} {folder}: {existing} is a file; give a folder")
    if folder.is_symlink() and existing != folder:
        raise UserError(f"{flag} {folder}: is a link that leads to no folder; remove it, or give another folder")
    return folder


def check_writable(path: str | Path, flag: str) -> None:
    """Refuse a folder where no file can be made, whatever its permissions say, as in /proc; nothing is left there."""
    existing = nearest_existing(check_output_folder(path, flag).absolute())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written to ({error.strerror}); give another folder") from None


def prepare_output_folder(path: str | Path, flag: str = "--output_dir") -> Path:
    """Create the folder, check that it can be written to, and remove what killed processes left of files in it."""
    folder = check_output_folder(path, flag)
    folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder, flag)
    for place in (folder, folder / SAMPLES_NAME):
        remove_all_leftovers(place)
    return folder


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
    """Keep other runs out of a folder inside, or until the end of this process however it ends; refuse one that another run has.

    The lock is the folder's own (flock), so that none is left behind as a file.
    """
    with locked(folder.resolve()) as is_ours:
        if is_ours is False:
            raise UserError(
                f"--output_dir {folder}: another run is writing to it; wait for its end, stop it, or give another folder"
            )
        yield


def set_aside_previous_student(folder: Path, also: Sequence[str] = ()) -> Path | None:
    """Move what an earlier run left, and `also` these files, into a folder of its own, so that a new student never replaces it silently."""
    # A link that leads nowhere would be in the way as well:
    previous = [file for name in [*_OF_A_RUN, *also] if os.path.lexists(file := folder / name) and has_mark(file)]
    if not previous:
        return None
    aside = folder / datetime.now().strftime("replaced-%Y%m%d-%H%M%S-%f")
    aside.mkdir()
    for path in previous:
        path.rename(aside / path.name)
    return aside


def has_mark(path: Path) -> bool:
    """Return whether we have written a file, which a person may have one of by that name; a folder is none."""
    mark = _MARKS.get(path.name, "")
    return not mark or (path.is_file() and mark.encode() in path.read_bytes())


def check_evaluation_is_ours(folder: Path, flag: str) -> None:
    """Refuse a folder whose files of these names a person put there, be they folders."""
    for file in (folder / name for name in (EVALUATION_NAME, COMPARISON_NAME, FRONTIER_NAME, GALLERY_NAME)):
        if os.path.lexists(file) and not has_mark(file):
            raise UserError(f"{flag} {folder}: {file.name} there was not written by evaluate_student.py; move it away")


def sample_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the sample pictures of a run's folder with their steps, in order."""
    names = ((SAMPLE_FILE.fullmatch(file.name), file) for file in (folder / SAMPLES_NAME).glob("step_*.png"))
    return sorted((int(found[1]), file) for found, file in names if found and file.is_file())
