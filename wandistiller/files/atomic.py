"""Files and folders that appear whole or not at all: they are written beside their place, fsynced and renamed."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


def fsync(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _default_mode() -> int:
    """Return the mode of a newly made file: what the umask leaves of read and write for everyone."""
    umask = os.umask(0)  # the umask can only be read by setting it
    os.umask(umask)
    return 0o666 & ~umask


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`.

    The file written there replaces `path` on success, and is removed on any failure.
    """
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


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: object, end: str = "", **settings) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        end: text after the JSON, such as a newline.
        settings: arguments of `json.dumps`.
    """
    write_text(path, json.dumps(values, **settings) + end)


def remove_leftovers(path: str | Path) -> None:
    """Remove what a killed process left beside `path` while it wrote a file or a folder there."""
    path = Path(path).resolve()
    for left in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which must be new or empty.

    The folder takes the place of `path` on success, and is removed on any failure.
    """
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
    """Return the sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
