"""A Wan transformer in a GGUF file: which files hold one, and the shapes that converters leave out of their tensors.

The files of city96 and QuantStack hold the original names, `general.architecture` "wan", and all that a safetensors file with
original names holds but its metadata: no tensor tells how wide a head is.
"""

from collections.abc import Mapping
from pathlib import Path

from wandistiller.errors import shown
from wandistiller.files.checked_json import TeacherFileError
from wandistiller.files.gguf_files import GgufTensor, read_gguf_header
from wandistiller.files.weights import Stored
from wandistiller.wan.names import PATCH_KERNEL

ARCHITECTURE = "wan"
_ARCHITECTURE_KEY = "general.architecture"
# Some converters name themselves instead, or nothing; ComfyUI-GGUF goes by the tensors there, as is done here.
_OF_CONVERTERS = (None, "pig", "cow")


def refuse_architecture(path: Path) -> None:
    """Refuse a GGUF file that says it is another model's."""
    architecture = read_gguf_header(path).fields.get(_ARCHITECTURE_KEY)
    if architecture not in (ARCHITECTURE, *_OF_CONVERTERS):
        raise TeacherFileError(
            f"{path}: is a GGUF of architecture {shown(architecture)}; allowed: that of a Wan text-to-video transformer, "
            f'architecture "{ARCHITECTURE}"'
        )


def as_wan_tensors(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return tensors in the shape that a Wan's has."""
    return {
        name: _with_all_dims(name, tensor, found) if isinstance(tensor, GgufTensor) else tensor
        for name, tensor in found.items()
    }


def _with_all_dims(name: str, tensor: GgufTensor, tensors: Mapping[str, Stored]) -> GgufTensor:
    """Return a tensor with the dimensions that a converter dropped: programs of ggml keep four at most, and none of 1 in front."""
    shape = tensor.shape
    if name.endswith(("modulation", "scale_shift_table")) and len(shape) == 2:
        return tensor.with_shape((1, *shape))
    if name.endswith(PATCH_KERNEL) and len(shape) == 4 and shape[2] == shape[3]:
        # Either the one frame of the kernel is gone, or the first two dimensions are one.
        bias = tensors.get(name.removesuffix(".weight") + ".bias")
        if bias is not None and shape[0] * shape[1] % bias.shape[0] == 0:
            return tensor.with_shape((bias.shape[0], shape[0] * shape[1] // bias.shape[0], 1, shape[2], shape[3]))
    return tensor
