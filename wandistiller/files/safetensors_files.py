"""Safetensors files: opened in this module alone, so that a missing or damaged file is refused the same way everywhere."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wandistiller.errors import UserError, first_line
from wandistiller.files.atomic import atomic_path
from wandistiller.files.checked_json import TeacherFileError, read_json
from wandistiller.files.paths import require_file, stays_inside


class DamagedFileError(UserError):
    """A safetensors file is missing or damaged; `reason` is the part of the message that says how."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of its tensors before any of them is read.

    Attributes:
        shapes: shape of each tensor by its name.
        dtypes: dtype of each tensor as the format spells it, such as "BF16" or "F8_E4M3".
        metadata: texts that the writer of the file added.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


@contextmanager
def _refusing_damage(path: str | Path) -> Iterator[None]:
    try:
        require_file(path)
        yield
    except FileNotFoundError:
        reason = "there is no such file"
        raise DamagedFileError(f"{path}: {reason}", reason) from None
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        advice = "a download cut short looks like this, copy it again"
        raise DamagedFileError(f"{path}: is not a whole safetensors file ({reason}); {advice}", reason) from None


def open_safetensors(path: str | Path) -> safe_open:
    """Open a file whose tensors are then read one by one; its header is checked against its size."""
    with _refusing_damage(path):
        return safe_open(path, framework="pt")


def read_header(path: str | Path, among: frozenset[str] | None = None) -> SafetensorsHeader:
    """Read names, shapes, dtypes and metadata of a file, but none of its tensors.

    Args:
        among: only tensors of these names are looked at; None for all of the file.
    """
    with _refusing_damage(path), safe_open(path, framework="pt") as file:
        names = file.keys() if among is None else among.intersection(file.keys())
        slices = {name: file.get_slice(name) for name in names}
        return SafetensorsHeader(
            shapes={name: tuple(part.get_shape()) for name, part in slices.items()},
            dtypes={name: part.get_dtype() for name, part in slices.items()},
            metadata=file.metadata() or {},
        )


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read all tensors of a file."""
    with _refusing_damage(path):
        return safetensors.torch.load_file(path, device=device)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    with atomic_path(path) as beside:
        try:
            safetensors.torch.save_file(dict(tensors), beside, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            # The library tells what the system said in its message alone.
            if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def indexed_files(index: Path) -> list[Path]:
    """Return the shards that a `*.safetensors.index.json` names, in its order.

    Raises:
        TeacherFileError: the index is damaged, or names a file that is missing or outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TeacherFileError(f"{index}: has no weight_map from tensors to files; copy the checkpoint again")
    for name in weight_map.values():
        if not stays_inside(name):
            raise TeacherFileError(f"{index}: names {name!r}, which lies outside its folder")
    names = list(dict.fromkeys(weight_map.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise TeacherFileError(
            f"{index}: names {missing[0]!r}, which is not there ({len(missing)} of {len(names)} shards are missing)"
        )
    return [index.parent / name for name in names]
