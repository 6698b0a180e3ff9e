"""Write a wan student as a GGUF file that ComfyUI-GGUF loads: original names, and the matrices of the blocks quantised.

This was held against city96/ComfyUI-GGUF of December 2025: loader.py (gguf_sd_loader), ops.py (GGMLOps), tools/convert.py
(ModelWan) and tools/lcpp.patch.
"""

from pathlib import Path

from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.gguf_files import block_size, write_gguf
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import FP32_ISLANDS
from wandistiller.projection.comfyui import comfyui_metadata, taken_as_given
from wandistiller.projection.lift import LINEAR_OF_A_BLOCK, with_one_frame
from wandistiller.wan.gguf_weights import ARCHITECTURE
from wandistiller.wan.names import PATCH_KERNEL, to_original

# The gguf library quantises to these; the types of K are llama.cpp's alone to write.
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0"}


def refuse_what_gguf_drops(config: StudentConfig) -> None:
    """Refuse a student that ComfyUI would misread from a GGUF, since its loader passes no metadata on.

    The number of heads is the trap: it is in no tensor, and a wrong one draws without an error.
    """
    for name, (given, value) in taken_as_given(config).items():
        what = f"heads have {value} channels" if name == "head_dim" else f"{name} is {value:g}"
        raise UserError(
            f"--format gguf: this student's {what}. No tensor of a GGUF tells that, and ComfyUI takes {given:g} as given there, "
            "so it would draw wrongly without a word; give --format original, whose metadata ComfyUI reads from 0.19 on"
        )


def write_gguf_file(tensors: dict[str, Tensor], config: StudentConfig, path: Path, dtype: str = "fp32") -> None:
    """Write one GGUF file of original Wan names, whole or not at all.

    Args:
        tensors: the student's state dict, by canonical name.
        dtype: a key of `DTYPES`. Norms, modulation, time embedding, biases and the patch kernel stay F32, which ComfyUI-GGUF
            needs of all that is no Linear weight; of a quantised file only the matrices of the blocks are, and others are F16.
    """
    stored = {
        to_original(name): (with_one_frame(name, tensor), _stored_as(name, tensor, DTYPES[dtype], path))
        for name, tensor in tensors.items()
    }
    write_gguf(path, ARCHITECTURE, stored, {"student_config": config.to_json(), **comfyui_metadata(config)})


def _stored_as(name: str, tensor: Tensor, dtype: str, path: Path) -> str:
    if tensor.ndim == 1 or name == PATCH_KERNEL or FP32_ISLANDS.search(name):
        return "F32"
    block = block_size(path, dtype)
    if block == 1:
        return dtype
    fits = LINEAR_OF_A_BLOCK.fullmatch(name) and tensor.shape[-1] % block == 0
    return dtype if fits else "F16"
