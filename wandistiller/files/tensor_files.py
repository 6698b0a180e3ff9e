"""Files of tensors, of safetensors and of torch.save: a missing or damaged one is refused the same way everywhere.

Headers and tensors are read by offset, and no file is mapped: a file larger than memory opens, and what was read leaves no pages.
Nothing but `torch.load(weights_only=True)` unpickles: onto the meta device it tells where each storage of a checkpoint lies.
"""

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wandistiller.errors import UserError, first_line, shown
from wandistiller.files.atomic import atomic_path
from wandistiller.files.json_files import parse_json, read_json
from wandistiller.files.paths import require_file, stays_inside

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_PICKLE_BYTES = 2**26  # of names and shapes; the values lie in records of their own


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor whose values lie in a file one after another.

    Attributes:
        dtype: as the safetensors format spells it, such as "BF16" or "F8_E4M3".
        offset: of its first byte in the file.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int

    def read(self) -> Tensor:
        """Read the tensor to the CPU in its stored precision; a type without a counterpart in torch is refused."""
        with refusing_damage(self.path):
            return self.read_bytes().view(DTYPES[self.dtype]).reshape(self.shape)

    def read_bytes(self) -> Tensor:
        values = np.fromfile(self.path, np.uint8, self.num_bytes, offset=self.offset)
        if len(values) < self.num_bytes:
            raise ValueError(f"it ends {self.num_bytes - len(values):,} bytes before {self.key} does")
        return torch.from_numpy(values)

    def with_shape(self, shape: tuple[int, ...]) -> Self:
        """Return the same values in another shape, which must have as many."""
        if prod(shape) != prod(self.shape):
            raise UserError(
                f"{self.path}: {self.key} is to have shape {list(shape)}, but has the values of {list(self.shape)}"
            )
        return replace(self, shape=shape)


class Header(NamedTuple):
    """Tensors of a file by name, and what its writer added: texts, of GGUF also numbers, arrays of these and lists of texts."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, Any]


@contextmanager
def refusing_damage(path: str | Path, what: str = "is not a whole safetensors file") -> Iterator[None]:
    """Turn what goes wrong inside while a file is read into one message."""
    try:
        require_file(path)
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        advice = "a download cut short looks like this, copy it again"
        raise UserError(f"{path}: {what} ({first_line(error)}); {advice}") from None


def open_safetensors(path: str | Path) -> safe_open:
    """Map a file whose tensors are then read one by one; its header is checked against its size."""
    with refusing_damage(path):
        return safe_open(path, framework="pt")


def read_header(path: str | Path) -> Header:
    """Read names, shapes, dtypes and metadata of a file, but none of its tensors."""
    path = Path(path)
    with refusing_damage(path):
        # The library holds names, shapes, types and places against each other and the file's size.
        with safe_open(path, framework="np") as checked:
            metadata = checked.metadata()
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = parse_json(file.read(length).decode())
        tensors = {
            key: StoredTensor(path, key, tuple(entry["shape"]), entry["dtype"], 8 + length + begin, end - begin)
            for key, entry in entries.items()
            if key != "__metadata__"
            for begin, end in [entry["data_offsets"]]
        }
    return Header(tensors, metadata or {})


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, whole or not at all."""
    # Names of files that are no UTF-8 get question marks, as in atomic.py; the format holds UTF-8 alone.
    texts = {name: text.encode("utf-8", "replace").decode() for name, text in (metadata or {}).items()}
    with atomic_path(path) as beside:
        try:
            safetensors.torch.save_file(dict(tensors), beside, metadata=texts or None)
        except SafetensorError as error:
            # The library tells what the system said in its message alone.
            if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def indexed_files(index: Path) -> list[Path]:
    """Return the shards that a `*.safetensors.index.json` names, in its order.

    Raises:
        UserError: the index is damaged, or names a file that is missing, outside its folder or no safetensors file.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map from tensors to files; copy the checkpoint again")
    for name in weight_map.values():
        if not stays_inside(name) or not name.endswith(".safetensors"):
            raise UserError(f"{index}: names {name!r}, which lies outside its folder or is no .safetensors file")
    names = list(dict.fromkeys(weight_map.values()))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index}: names {missing[0]!r}, which is not there ({len(missing)} of {len(names)} shards are missing)"
        )
    return [index.parent / name for name in names]


# ---- torch.save ----


def read_torch_header(path: Path) -> Header:
    """Return every tensor of a checkpoint; no value is read.

    Raises:
        UserError: it is missing or damaged, holds more than tensors, or is in torch's format before 1.6.
    """
    try:
        require_file(path)
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("its records are compressed, which torch does not write")
                if record.filename.endswith(".pkl") and record.file_size > _MOST_PICKLE_BYTES:
                    raise ValueError(f"its {record.filename} has {record.file_size:,} bytes")
        values = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch and zipfile have a dozen types for a bad file
        is_more = type(error).__name__ == "UnpicklingError"  # its module is not imported anywhere in this project
        reason = "a pickle of more than tensors, which is never opened" if is_more else first_line(error)
        raise UserError(
            f"{path}: is no whole checkpoint of torch.save ({reason}); copy it again, or get the safetensors version"
        ) from None
    tensors = _tensors_in(path, values)
    return Header(
        {str(name): _stored(path, str(name), value, path.stat().st_size) for name, value in tensors.items()}, {}
    )


def _tensors_in(path: Path, values: object) -> dict:
    """Return the tensors by name, which trainers keep among other things, such as {"state_dict": ..., "epoch": 3}."""
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path}: holds no tensors by name")
    inner = {name: value for name, value in values.items() if isinstance(value, dict)}
    models = [name for name, value in inner.items() if any(isinstance(part, Tensor) for part in value.values())]
    if len(models) > 1:
        names = ", ".join(map(shown, models))
        raise UserError(f"{path}: holds several models ({names}); save one of them as a file of its own")
    if models:
        return inner[models[0]]
    return _tensors_in(path, next(iter(inner.values()))) if len(inner) == len(values) == 1 else values


def _stored(path: Path, name: str, value: object, size: int) -> StoredTensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_contiguous():
        raise UserError(f"{path}: {name} is no plain tensor; get the safetensors version")
    storage = value.untyped_storage()
    start = int(storage._checkpoint_offset or 0) + int(value.storage_offset()) * value.element_size()
    if start + value.nbytes > size or value.storage_offset() * value.element_size() + value.nbytes > storage.nbytes():
        raise UserError(f"{path}: {name} ends behind the file; copy it again")
    dtype = _NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return StoredTensor(path, name, tuple(value.shape), dtype, start, value.nbytes)
