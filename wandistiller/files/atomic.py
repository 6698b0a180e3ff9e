"""Files and folders that appear whole or not at all: they are written beside their place, fsynced and renamed."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from wandistiller.files.paths import remove

_HEX = "[0-9a-f]" * 8


def fsync(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    """Return a new name beside `path`, which `remove_leftovers` knows."""
    return path.with_name(f".{_stem(path)}.{uuid.uuid4().hex[:8]}.tmp")


def _stem(path: Path) -> str:
    """Name of a path, cut so that a temporary name made of it is no longer than file systems allow (255 bytes)."""
    return os.fsdecode(os.fsencode(path.name)[:240])


@contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder inside; yield False where another process has the lock, None where there are no locks (Windows)."""
    descriptor, is_locked = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), None
    try:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            is_locked = False
        except (ImportError, OSError):  # another system, or a file system without locks
            pass
        yield is_locked
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file in a folder of its own beside `path`, where a writer's own temporary files lie too.

    It replaces `path` on success, and is removed on any failure.
    """
    path = Path(path)
    with _temporary_folder(path) as folder:
        file = folder / _stem(path)
        file.touch()
        mode = file.stat().st_mode  # of a new file; safetensors replaces it by one that is private
        yield file
        with suppress(FileNotFoundError):
            mode = os.stat(path).st_mode  # what was private stays so
        os.chmod(file, mode & 0o777)
        fsync(file)
        os.replace(file, path)
        fsync(path.parent)  # the rename itself must survive a power cut


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; a letter of a path that is not UTF-8 is a question mark in it."""
    with atomic_path(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: str | Path, values: object, **settings) -> None:
    """Write a JSON file, whole or not at all; `settings` are arguments of `json.dumps`."""
    write_text(path, json.dumps(values, **settings) + "\n")


def remove_leftovers(path: str | Path) -> None:
    """Remove what killed processes left beside `path` while they wrote a file or a folder there."""
    path = Path(path).resolve()
    remove_all_leftovers(path.parent, escape(_stem(path)))


def remove_all_leftovers(folder: str | Path, of: str = "*") -> None:
    """Remove what killed processes left in a folder while they wrote files there; a living writer has its file locked."""
    for left in Path(folder).glob(f".{of}.{_HEX}.tmp"):
        with suppress(OSError), locked(left) as is_dead:  # a link, or somebody else has removed it
            if is_dead:
                remove(left)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    beside = _temporary(path)
    beside.mkdir()
    try:
        with locked(beside):
            yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which must be new or empty.

    The folder takes the place of `path` on success, and is removed on any failure.

    Raises:
        OSError: a file or a folder that is not empty has come to lie at `path` meanwhile; it is kept.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(path) as beside:
        yield beside
        for file in beside.rglob("*"):
            if not file.is_symlink():
                fsync(file)
        fsync(beside)
        os.replace(beside, path)
        fsync(path.parent)


@contextmanager
def new_files(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, whose files come to lie beside it on success, the one named as `path` last.

    Raises:
        FileExistsError: something has come to lie at such a place meanwhile; it is kept.
    """
    path = Path(path).resolve()
    with _temporary_folder(path) as folder:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            fsync(file)
            _place_new(file, path.with_name(file.name))
        fsync(path.parent)


def _place_new(source: Path, target: Path) -> None:
    """Give a file a second name, which unlike a rename never replaces what is there."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without such names
        target.touch(exist_ok=False)
        os.replace(source, target)


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
