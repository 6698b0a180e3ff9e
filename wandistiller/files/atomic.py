"""A file or folder appears whole or not at all: written beside its place, fsynced, renamed."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


def fsync(path: Path) -> None:
    """What was written to a file, or the names in a folder, survives a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _default_mode() -> int:
    """What the umask leaves of read and write for all; it can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces `path`, on any failure it is removed."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield beside
        os.chmod(beside, _default_mode())  # some writers make their files private
        fsync(beside)
        os.replace(beside, path)
        fsync(path.parent)  # the rename itself must survive a power cut
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | Path) -> None:
    """Remove what a killed process left beside `path`, of a file or a folder that was to appear there."""
    path = Path(path).resolve()
    for left in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is new or empty; on success it takes its place, on any failure it is removed."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        beside.mkdir()
        yield beside
        for file in beside.rglob("*"):
            if not file.is_symlink():
                fsync(file)
        fsync(beside)
        os.replace(beside, path)
        fsync(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
