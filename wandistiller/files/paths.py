"""Paths: where a folder will lie, and names from a file that must stay in their folder."""

from pathlib import Path, PurePosixPath


def nearest_existing(path: str | Path) -> Path:
    """Return `path` itself where it exists, else the nearest of its parents that does."""
    path = Path(path)
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def stays_inside(name: object) -> bool:
    """Return whether a name that was read from a file leads to a place inside its folder."""
    if not isinstance(name, str) or "\\" in name:  # a backslash separates folders on Windows
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
