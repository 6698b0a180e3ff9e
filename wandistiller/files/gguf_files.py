"""GGUF files: opened in this module alone, through the gguf library, so that a missing or damaged file is refused the same way everywhere.

A file is mapped into memory, and one tensor of it at a time becomes numbers. The library is needed for such files alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError, first_line
from wandistiller.files.atomic import atomic_path
from wandistiller.files.checked_json import TeacherFileError
from wandistiller.files.paths import require_file
from wandistiller.files.safetensors_files import DamagedFileError

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"
# Tensors of these types are kept as they are; those of all others become float32 as they are read.
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Converters store some tensors as rows of another length, and note here the shape that these have (ComfyUI-GGUF's convert.py).
_SHAPE_KEY = "comfy.gguf.orig_shape."
_MOST_DIMS = 8  # a file may claim more, and a Wan has 5
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

    def read_row(self) -> Tensor:
        """Read the first row as `read` does, without the others where rows are stored apart."""
        if prod(self.shape[1:]) % block_size(self.path, self.dtype):
            return self.read()[:1]
        return replace(self, shape=(1, *self.shape[1:]), num_bytes=self.num_bytes // self.shape[0]).read()


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before any tensor is read: its tensors by name, and its fields of text, such as general.architecture."""

    tensors: dict[str, GgufTensor]
    texts: dict[str, str]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read names, shapes and types of a file's tensors and its fields of text.

    Raises:
        DamagedFileError: the file is missing or not whole.
        TeacherFileError: it holds a type that the library cannot make numbers of.
    """
    gguf = _library(path)
    with _refusing_damage(path):
        reader = _open(path)
        if reader.byte_order != "I":
            raise ValueError("its numbers are in the other byte order")
        texts = {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types == [gguf.GGUFValueType.STRING]
        }
        tensors = {}
        for stored in reader.tensors:
            shape = tuple(int(size) for size in reversed(stored.shape))
            if not 0 < len(shape) <= _MOST_DIMS or min(shape) < 1:
                raise ValueError(f"{stored.name!r} has shape {list(shape)}")
            place = int(stored.data_offset), int(stored.n_bytes)
            tensors[stored.name] = GgufTensor(path, stored.name, shape, stored.tensor_type.name, *place)
        shapes = {name: _original_shape(reader, name) for name in tensors}
    _refuse_types(path, gguf, tensors)
    return GgufHeader(
        {name: tensor.with_shape(shapes[name] or tensor.shape) for name, tensor in tensors.items()}, texts
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
    except (OSError, ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        reason = first_line(error)
        advice = "a download cut short looks like this, copy it again"
        raise DamagedFileError(f"{path}: is not a whole GGUF file ({reason}); {advice}", reason) from None


def _open(path: Path) -> "GGUFReader":
    """Open a file with the library's reader, which takes an unknown type of values for damage and does not look for the file's end."""
    import gguf

    class Reader(gguf.GGUFReader):
        """The library's reader, made to stop at the end of the file, where it would read nothing as often as a file claims."""

        def _get(self, offset, dtype, count=1, override_order=None):
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it has {len(self.data):,} bytes and says that there are {end:,}")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(path)
    except ValueError as error:
        if "GGMLQuantizationType" not in str(error):
            raise
        raise TeacherFileError(
            f"{path}: holds a type of values that gguf {version('gguf')} does not know ({error}); try a newer gguf "
            "(pip install -U gguf), or give another quantisation of this model"
        ) from None


def _original_shape(reader: "GGUFReader", name: str) -> tuple[int, ...] | None:
    """Return the shape that a converter noted of a tensor which it stored in another one."""
    field = reader.get_field(_SHAPE_KEY + name)
    if field is None:
        return None
    shape = field.contents()
    is_shape = isinstance(shape, list) and 0 < len(shape) <= _MOST_DIMS
    if not is_shape or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{_SHAPE_KEY}{name} is no shape")
    return tuple(shape)


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
