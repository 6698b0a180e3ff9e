"""2D -> 3D: a wan student's weights as those of a Wan transformer, which answers the same at one frame.

The patch kernel is the only weight whose shape differs: Conv2d (D, C, P, P) is the one frame of Conv3d (D, C, 1, P, P).
Every other tensor is the same in both, under the names of `wandistiller.wan.names`. `project.py` goes from 3D to 2D.
"""

import re

import torch
from torch import Tensor

from wandistiller.model.fp8 import FP8, FP8_MAX
from wandistiller.model.transformer import FP32_ISLANDS
from wandistiller.wan.names import PATCH_KERNEL, to_original

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}
# Quantised files keep these weights in few bits, plain fp8 ones without a scale: the matrices of the blocks.
LINEAR_OF_A_BLOCK = re.compile(r"blocks\.\d+\.(attn[12]\.to_|ffn\.net\.).*\.weight")


def with_one_frame(name: str, tensor: Tensor) -> Tensor:
    """Return a student's tensor in 3D, given its canonical name: the inverse of `wan.names.without_frames`."""
    return tensor[:, :, None] if name == PATCH_KERNEL else tensor


def lift(tensors: dict[str, Tensor], dtype: str = "fp32", *, original: bool = False) -> dict[str, Tensor]:
    """Return a wan student's weights as those of a 3D Wan transformer.

    Args:
        tensors: the student's state dict, by canonical name.
        dtype: "fp32", "bf16", "fp16" or "fp8"; norms, modulation and time embedding stay float32. fp8 means float8_e4m3fn
            without scales for the Linear weights of the blocks, and bf16 for the rest.
        original: use the names of the original Wan instead of diffusers'.
    """
    lifted = {name: in_dtype(name, with_one_frame(name, tensor), dtype) for name, tensor in tensors.items()}
    return {to_original(name): tensor for name, tensor in lifted.items()} if original else lifted


def in_dtype(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """Return a tensor in its precision in an export of `dtype`, given its canonical name."""
    if FP32_ISLANDS.search(name):
        return tensor.float().contiguous()
    if dtype != "fp8":
        return tensor.to(DTYPES[dtype]).contiguous()
    if LINEAR_OF_A_BLOCK.fullmatch(name):
        return tensor.clamp(-FP8_MAX, FP8_MAX).to(FP8).contiguous()  # older torch turns larger values into nan
    return tensor.to(torch.bfloat16).contiguous()
