"""Locks between processes, on one machine or on several that share a file system: the system takes a lock back when its holder dies.

A lock is the flock of a file that names its holder. A file rather than its folder, because NFS locks only what is open for
writing.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

POLL_S = 1.0


class NoLocksError(OSError):
    """The file system has no locks."""


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[bool]:
    """Try to take the lock; yield True if acquired. No file is left behind.

    Raises:
        NoLocksError: the file system has none.
        OSError: the file cannot be made.
    """
    descriptor = _lock(path)
    if descriptor is None:
        yield False
        return
    try:
        yield True
    finally:
        # Before it is let go, so that it is never the file that somebody else has locked by now.
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def waited_for(path: Path, on_wait: Callable[[str], None] = lambda holder: None) -> Iterator[None]:
    """Wait until this process has the lock, and hold it inside.

    Args:
        on_wait: called once with who has it, where there is somebody.

    Raises:
        NoLocksError: the file system has none.
        OSError: the file cannot be made.
    """
    has_told = False
    while True:
        with locked_file(path) as is_mine:
            if is_mine:
                yield
                return
        if not has_told:
            on_wait(holder_of(path))
            has_told = True
        time.sleep(POLL_S)


def holder_of(path: Path) -> str:
    """Return who has written their name into a lock's file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:200] or "another process"
    except OSError:  # it has been let go meanwhile
        return "another process"


def _lock(path: Path) -> int | None:
    """Return the descriptor that holds the lock; None where another process has it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        raise NoLocksError("no locks on this system") from None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise NoLocksError(error.errno, f"locks do not work there: {error.strerror}") from None
        if _is_at(descriptor, path):
            with contextlib.suppress(OSError):  # a full disk takes nothing but the name
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # whoever had it has removed it between our opening and our locking


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
