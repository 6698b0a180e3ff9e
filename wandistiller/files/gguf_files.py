"""GGUF files: opened in this module alone, so that a missing or damaged file is refused the same way everywhere.

The header is read here, since the gguf library reads an array a number at a time and past a file's end; the library makes numbers
of one tensor at a time, and is needed for such files alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError, first_line, shown
from wandistiller.files.atomic import atomic_path
from wandistiller.files.tensor_files import Header, StoredTensor, refusing_damage

NO_GGUF = "is not a whole GGUF file"
# Tensors of these types are kept as they are; those of all others become float32 as they are read.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Converters store some tensors as rows of another length, and note here the shape that these have (ComfyUI-GGUF's convert.py).
_SHAPE_KEY = "comfy.gguf.orig_shape."
# A file may claim anything; a Wan has 5 dimensions, and its text encoder 256,384 words.
_MOST_ENTRIES, _MOST_DIMS, _LONGEST_TEXT, _MOST_TEXTS = 2**16, 8, 2**24, 10**6
# The kinds of values of fields, by numpy's codes
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_BLOCKS = 2**13  # that are made numbers of at a time


@dataclass(frozen=True, slots=True)
class GgufTensor(StoredTensor):
    """A tensor in a GGUF file, whose `dtype` is as the format spells it, such as "Q4_K" or "BF16"."""

    def read(self) -> Tensor:
        """Read the tensor to the CPU: fp32, fp16 and bf16 as they are, any other type as float32."""
        gguf = _library(self.path)
        with refusing_damage(self.path, NO_GGUF):
            stored = self.read_bytes()
            if dtype := _PLAIN.get(self.dtype):
                return stored.view(dtype).reshape(self.shape)
            kind = gguf.GGMLQuantizationType[self.dtype]
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            values = torch.empty(self.num_bytes // block_bytes * block)
            # Of a whole tensor the library would hold several copies.
            parts = zip(stored.split(_BLOCKS * block_bytes), values.split(_BLOCKS * block), strict=True)
            for part, place in parts:
                place.copy_(torch.from_numpy(gguf.quants.dequantize(part.numpy()[None], kind)[0]))
            return values.reshape(self.shape)


def read_gguf_header(path: Path) -> Header:
    """Read names, shapes and types of a file's tensors and its fields (github.com/ggml-org/ggml: docs/gguf.md)."""
    with refusing_damage(path, NO_GGUF):
        stat = path.stat()
        return _read_header(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)  # the 256,384 words of a text encoder take a second
def _read_header(path: Path, *state: int) -> Header:
    """Read a header; `state` is what changes with the file."""
    header = _Cursor(np.asarray(np.memmap(path, np.uint8, mode="r")))
    if header.array("B", 4).tobytes() != b"GGUF" or header.number("I") not in (2, 3):
        raise ValueError("it does not begin as one of version 2 or 3")
    num_tensors, num_fields = header.array("Q", 2).tolist()
    if max(num_tensors, num_fields) > _MOST_ENTRIES:
        raise ValueError(f"it says that it has {num_tensors:,} tensors and {num_fields:,} fields")
    fields = dict(header.field() for _ in range(num_fields))
    infos = [header.tensor() for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", 32)
    if alignment < 1:
        raise ValueError("general.alignment is 0 or less")
    start = -(-header.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in infos:
        dtype, num_bytes = _stored_as(path, name, shape, kind)
        noted = tuple(map(int, fields.get(_SHAPE_KEY + name, shape)[: _MOST_DIMS + 1]))
        if start + offset + num_bytes > len(header.data) or min(noted, default=0) < 1:
            raise ValueError(
                f"{name!r} of shape {list(noted)} in {dtype} does not end in its {len(header.data):,} bytes"
            )
        tensors[name] = GgufTensor(path, name, shape, dtype, start + offset, num_bytes).with_shape(noted)
    if len(fields) < num_fields or len(tensors) < num_tensors:
        raise ValueError("it holds a name twice")
    return Header(tensors, fields)


class _Cursor:
    """A place in the header of a file that moves on as values are taken; none is taken from behind the file's end."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def array(self, code: str, count: int) -> np.ndarray:
        start, self.at = self.at, self.at + count * np.dtype(code).itemsize
        if self.at > len(self.data):
            raise ValueError(f"it has {len(self.data):,} bytes and says that there are {self.at:,}")
        return self.data[start : self.at].view(f"<{code}")

    def number(self, code: str) -> Any:
        return self.array(code, 1).item()

    def text(self) -> str:
        if (length := self.number("Q")) > _LONGEST_TEXT:
            raise ValueError(f"it holds a text of {length:,} bytes")
        return self.array("B", length).tobytes().decode()

    def field(self) -> tuple[str, Any]:
        name, kind = self.text(), self.number("I")
        if kind != _ARRAY:
            return name, self.text() if kind == _TEXT else self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind != _TEXT:
            return name, self.array(_NUMBERS[kind], count)
        if count > _MOST_TEXTS:
            raise ValueError(f"it holds a list of {count:,} texts")
        return name, [self.text() for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Take the name, the shape, the number of its type and the offset behind the header."""
        name, num_dims = self.text(), self.number("I")
        shape = tuple(self.array("Q", num_dims)[: _MOST_DIMS + 1].tolist())[::-1]
        return name, shape, self.number("I"), self.number("Q")


def _stored_as(path: Path, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """Return the type of a tensor's values and their bytes; a type that the library makes no numbers of is refused."""
    gguf = _library(path)
    try:
        dtype = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
        if dtype.name not in _PLAIN:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), dtype)
    except (ValueError, NotImplementedError) as error:  # which name the type
        raise UserError(
            f"{path}: {name} is of a type that gguf {version('gguf')} cannot make numbers of ({first_line(error)}); try a newer gguf "
            "(pip install -U gguf), or give another quantisation of this model, such as Q8_0"
        ) from None
    if len(shape) > _MOST_DIMS or min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"{name!r} of shape {list(shape)} is not made of blocks of {dtype.name}")
    return dtype.name, prod(shape) // block * block_bytes


def require_architecture(path: Path, allowed: Sequence[str], what: str) -> None:
    """Refuse a GGUF file that says it is no such model's, which is `what`; one that says nothing is judged by its tensors."""
    architecture = read_gguf_header(path).metadata.get("general.architecture")
    if architecture not in (None, *allowed):
        raise UserError(
            f'{path}: is a GGUF of architecture {shown(architecture)}; allowed: that of {what}, architecture "{allowed[0]}"'
        )


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
