"""GGUF files: opened in this module alone, so that a missing or damaged file is refused the same way everywhere.

The header is read here, since the gguf library reads an array a number at a time and past a file's end; the library makes numbers
of one tensor at a time, and is needed for such files alone.
"""

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError, first_line
from wandistiller.files.atomic import atomic_path
from wandistiller.files.checked_json import TeacherFileError
from wandistiller.files.paths import require_file
from wandistiller.files.safetensors_files import DamagedFileError

SUFFIX = ".gguf"
# Tensors of these types are kept as they are; those of all others become float32 as they are read.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Converters store some tensors as rows of another length, and note here the shape that these have (ComfyUI-GGUF's convert.py).
_SHAPE_KEY = "comfy.gguf.orig_shape."
# A file may claim anything; a Wan has 5 dimensions, and its text encoder 256,384 words.
_MOST_DIMS, _MOST_ALIGNMENT, _LONGEST_TEXT, _MOST_TEXTS = 8, 2**20, 2**24, 10**6
# The kinds of values of fields, by struct's codes
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# The library makes floats of so many values at once: of a whole tensor it would hold them twice.
_VALUES_AT_ONCE = 2**18


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file.

    Attributes:
        dtype: the type of its values as the format spells it, such as "Q4_K" or "BF16".
        offset, num_bytes: where its values lie in the file.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    num_bytes: int

    def with_shape(self, shape: tuple[int, ...]) -> "GgufTensor":
        """Return the same values in another shape.

        Raises:
            TeacherFileError: they are not as many.
        """
        if prod(shape) != prod(self.shape):
            raise TeacherFileError(
                f"{self.path}: {self.key} is to have shape {list(shape)}, but has the values of {list(self.shape)}"
            )
        return replace(self, shape=shape)

    def read(self) -> Tensor:
        """Read the tensor to the CPU: fp32, fp16 and bf16 as they are, any other type as float32 (gguf.quants.dequantize)."""
        gguf = _library(self.path)
        with _refusing_damage(self.path):
            # The file is mapped for each tensor, since a mapping kept would keep every page already read in memory.
            stored = np.memmap(self.path, np.uint8, mode="r", offset=self.offset, shape=(self.num_bytes,))
            if dtype := _PLAIN.get(self.dtype):
                return torch.from_numpy(np.array(stored)).view(dtype).reshape(self.shape)
            kind = gguf.GGMLQuantizationType[self.dtype]
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            num_blocks = self.num_bytes // block_bytes
            at_once = max(1, _VALUES_AT_ONCE // block)
            values = torch.empty(num_blocks * block)
            for start in range(0, num_blocks, at_once):
                blocks = stored[start * block_bytes : (start + at_once) * block_bytes]
                part = gguf.quants.dequantize(blocks[None], kind).reshape(-1)
                values[start * block :][: len(part)] = torch.from_numpy(part)
            return values.reshape(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before any tensor is read: its tensors by name, and its fields, such as general.architecture.

    Attributes:
        fields: numbers, texts, arrays of numbers as numpy has them, and lists of texts.
    """

    tensors: dict[str, GgufTensor]
    fields: dict[str, Any]

    @property
    def texts(self) -> dict[str, str]:
        return {name: value for name, value in self.fields.items() if isinstance(value, str)}


def read_gguf_header(path: Path) -> GgufHeader:
    """Read names, shapes and types of a file's tensors and its fields (github.com/ggml-org/ggml: docs/gguf.md).

    Raises:
        DamagedFileError: the file is missing or not whole.
        TeacherFileError: it holds a type that the library cannot make numbers of.
    """
    gguf = _library(path)
    with _refusing_damage(path):
        header = _Cursor(np.memmap(path, np.uint8, mode="r"))
        if header.take(4) != b"GGUF" or header.number("I") not in (2, 3):
            raise ValueError("it does not begin as one of version 2 or 3")
        num_tensors, num_fields = header.number("Q"), header.number("Q")
        fields = dict(_each_once(header.field() for _ in range(num_fields)))
        infos = dict(_each_once(header.tensor() for _ in range(num_tensors)))
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT:
            raise ValueError("general.alignment is no such number")
        start = -(-header.at // alignment) * alignment
        tensors = {name: _tensor(path, gguf, name, info, start, header.size) for name, info in infos.items()}
        shapes = {name: _original_shape(fields, name) for name in tensors}
    _refuse_types(path, gguf, tensors)
    return GgufHeader(
        {name: tensor.with_shape(shapes[name] or tensor.shape) for name, tensor in tensors.items()}, fields
    )


class _Cursor:
    """A place in the header of a file that moves on as values are taken; none is taken from behind the file's end."""

    def __init__(self, data: np.ndarray):
        self.data, self.at, self.size = data, 0, len(data)

    def take(self, count: int) -> bytes:
        return self.array(np.dtype(np.uint8), count).tobytes()

    def array(self, dtype: np.dtype, count: int) -> np.ndarray:
        end = self.at + count * dtype.itemsize
        if end > self.size:
            raise ValueError(f"it has {self.size:,} bytes and says that there are {end:,}")
        part, self.at = self.data[self.at : end], end
        return part.view(dtype)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        if (length := self.number("Q")) > _LONGEST_TEXT:
            raise ValueError(f"it holds a text of {length:,} bytes")
        return self.take(length).decode()

    def field(self) -> tuple[str, Any]:
        return self.text(), self._value(self.number("I"))

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind != _TEXT:
            return self.array(np.dtype(f"<{_NUMBERS[kind]}"), count)
        if count > _MOST_TEXTS:
            raise ValueError(f"it holds a list of {count:,} texts")
        return [self.text() for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """Take (name, (shape, number of its type, offset behind the header))."""
        name, num_dims = self.text(), self.number("I")
        if not 0 < num_dims <= _MOST_DIMS:
            raise ValueError(f"{name!r} has {num_dims} dimensions")
        shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
        return name, (shape, self.number("I"), self.number("Q"))


def _each_once(pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    seen = set()
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"it holds {name!r} twice")
        seen.add(name)
        yield name, value


def _tensor(
    path: Path, gguf: Any, name: str, info: tuple[tuple[int, ...], int, int], start: int, file_size: int
) -> GgufTensor:
    shape, kind, offset = info
    try:
        dtype = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise TeacherFileError(
            f"{path}: holds a type of values that gguf {version('gguf')} does not know ({kind}, of {name}); try a newer gguf "
            "(pip install -U gguf), or give another quantisation of this model"
        ) from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
    num_bytes = prod(shape) // block * block_bytes
    if min(shape) < 1 or shape[-1] % block or start + offset + num_bytes > file_size:
        raise ValueError(f"{name!r} of shape {list(shape)} in {dtype.name} does not end in its {file_size:,} bytes")
    return GgufTensor(path, name, shape, dtype.name, start + offset, num_bytes)


def write_gguf(
    path: str | Path, architecture: str, tensors: Mapping[str, tuple[Tensor, str]], texts: Mapping[str, str]
) -> None:
    """Write a file, whole or not at all.

    Args:
        tensors: for each name its values and the type that they are kept in, such as "F16" or "Q8_0"; the last dimension
            must be a multiple of the type's block.
        texts: fields of text.
    """
    gguf = _library(path)
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, text in texts.items():
        writer.add_string(name, text)
    for name, (tensor, dtype) in tensors.items():
        kind = gguf.GGMLQuantizationType[dtype]
        values = gguf.quants.quantize(tensor.detach().float().cpu().contiguous().numpy(), kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    with atomic_path(path) as beside:
        writer.write_header_to_file(path=beside)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def block_size(path: str | Path, dtype: str) -> int:
    """Return how many values of a row one block of this type holds."""
    gguf = _library(path)
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[dtype]][0]


def _library(path: str | Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{path}: a GGUF file needs the gguf package, which is not installed: pip install gguf"
        ) from None
    return gguf


@contextmanager
def _refusing_damage(path: str | Path) -> Iterator[None]:
    try:
        require_file(path)
        with np.errstate(all="ignore"):  # sizes that a damaged file claims may leave what an integer holds
            yield
    except FileNotFoundError:
        reason = "there is no such file"
        raise DamagedFileError(f"{path}: {reason}", reason) from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error) as error:
        reason = first_line(error)
        advice = "a download cut short looks like this, copy it again"
        raise DamagedFileError(f"{path}: is not a whole GGUF file ({reason}); {advice}", reason) from None


def _original_shape(fields: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    """Return the shape that a converter noted of a tensor which it stored in another one."""
    noted = fields.get(_SHAPE_KEY + name)
    if noted is None:
        return None
    shape = tuple(int(size) for size in noted[: _MOST_DIMS + 1])
    if not 0 < len(shape) <= _MOST_DIMS or min(shape) < 1:
        raise ValueError(f"{_SHAPE_KEY}{name} is no shape")
    return shape


def _refuse_types(path: Path, gguf: Any, tensors: Mapping[str, GgufTensor]) -> None:
    """Refuse types that the library knows by name but cannot make numbers of, before anything is read."""
    for dtype, name in {tensor.dtype: name for name, tensor in tensors.items()}.items():
        if dtype in _PLAIN:
            continue
        kind = gguf.GGMLQuantizationType[dtype]
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise TeacherFileError(
                f"{path}: {name} is stored as {dtype}, which gguf {version('gguf')} cannot make numbers of; give another "
                "quantisation of this model, such as Q8_0"
            ) from None
