"""Checkpoints of torch.save (.pth): their tensors by name and place. Nothing but `torch.load(weights_only=True)` unpickles.

Loaded onto the meta device, a checkpoint tells where each storage lies in its file and reads none of it.
"""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import first_line, shown
from wandistiller.files.json_files import TeacherFileError
from wandistiller.files.paths import require_file
from wandistiller.files.safetensors_files import DTYPES, Header, StoredTensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_PICKLE_BYTES = 2**26  # of names and shapes; the values lie in records of their own


def read_torch_header(path: Path) -> Header:
    """Return every tensor of a checkpoint; no value is read.

    Raises:
        TeacherFileError: it is missing or damaged, holds more than tensors, or is in torch's format before 1.6.
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
        raise TeacherFileError(
            f"{path}: is no whole checkpoint of torch.save ({reason}); copy it again, or get the safetensors version"
        ) from None
    tensors = _tensors_in(path, values)
    return Header(
        {str(name): _stored(path, str(name), value, path.stat().st_size) for name, value in tensors.items()}, {}
    )


def _tensors_in(path: Path, values: object) -> dict:
    """Return the tensors by name, which trainers keep among other things, such as {"state_dict": ..., "epoch": 3}."""
    if not isinstance(values, dict) or not values:
        raise TeacherFileError(f"{path}: holds no tensors by name")
    inner = {name: value for name, value in values.items() if isinstance(value, dict)}
    models = [name for name, value in inner.items() if any(isinstance(part, Tensor) for part in value.values())]
    if len(models) > 1:
        names = ", ".join(map(shown, models))
        raise TeacherFileError(f"{path}: holds several models ({names}); save one of them as a file of its own")
    if models:
        return inner[models[0]]
    return _tensors_in(path, next(iter(inner.values()))) if len(inner) == len(values) == 1 else values


def _stored(path: Path, name: str, value: object, size: int) -> StoredTensor:
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_contiguous():
        raise TeacherFileError(f"{path}: {name} is no plain tensor; get the safetensors version")
    storage = value.untyped_storage()
    start = int(storage._checkpoint_offset or 0) + int(value.storage_offset()) * value.element_size()
    if start + value.nbytes > size or value.storage_offset() * value.element_size() + value.nbytes > storage.nbytes():
        raise TeacherFileError(f"{path}: {name} ends behind the file; copy it again")
    dtype = _NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return StoredTensor(path, name, tuple(value.shape), dtype, start, value.nbytes)
