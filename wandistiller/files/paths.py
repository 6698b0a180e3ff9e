"""Paths: where a folder will lie, what is a file, and names from a file that must stay in their folder."""

import errno
import os
import shutil
import stat
from pathlib import Path, PurePosixPath


def nearest_existing(path: str | Path) -> Path:
    """Return `path` itself where it exists, else the nearest of its parents that does."""
    path = Path(path)
    while not os.path.exists(path) and path != path.parent:  # Path.exists raises for a name that is too long
        path = path.parent
    return path


def stays_inside(name: object) -> bool:
    """Return whether a name that was read from a file leads to a place inside its folder."""
    if not isinstance(name, str) or "\\" in name:  # a backslash separates folders on Windows
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def require_file(path: str | Path) -> None:
    """Refuse what is no file before it is opened: a named pipe would keep whoever reads it waiting without end.

    What the system itself offers in /dev, such as the pipes that a shell makes for `<(...)`, is let through.

    Raises:
        OSError: there is nothing, or a folder, a pipe, a device or a circle of links.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode) and not Path(path).is_relative_to("/dev"):
        raise OSError(errno.ENXIO, "Not a file but a pipe or a device", str(path))


def remove(path: Path) -> None:
    """Remove what is at a path, whatever it is; of a link only the link goes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
