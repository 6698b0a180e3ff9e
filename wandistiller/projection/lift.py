"""2D -> 3D, and what little there is between the two: a student as the Wan transformer that it is at one frame.

The patch kernel is the only weight whose shape differs: Conv2d (D, C, P, P) is the one frame of Conv3d (D, C, 1, P, P).
Every other tensor is the same in both, under the names of `wan_names`. `projection_mapper` goes the way down.
"""

import re

import torch
from torch import Tensor

from wandistiller.model.fp8 import FP8, FP8_MAX
from wandistiller.model.transformer import FP32_ISLANDS
from wandistiller.wan.names import PATCH_KERNEL, to_original

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}
# Of 2 dimensions in a block: what plain fp8 files keep in 8 bits, without a scale.
_LINEAR_OF_A_BLOCK = re.compile(r"blocks\.\d+\.(attn[12]\.to_|ffn\.net\.).*\.weight")


def with_one_frame(name: str, tensor: Tensor) -> Tensor:
    """A student's tensor in 3D, by canonical name: the inverse of `without_frames`."""
    return tensor[:, :, None] if name == PATCH_KERNEL else tensor


def lift(tensors: dict[str, Tensor], dtype: str = "fp32", *, original: bool = False) -> dict[str, Tensor]:
    """A wan student's weights as those of a 3D Wan transformer.

    Args:
        tensors: the student's state dict, by canonical name.
        dtype: "fp32", "bf16", "fp16" or "fp8"; norms, modulation and time embedding stay float32. fp8 is float8_e4m3fn
            without scales for the Linear weights of the blocks, and bf16 for the rest.
        original: with the original's names instead of diffusers'.
    """
    lifted = {name: stored(name, with_one_frame(name, tensor), dtype) for name, tensor in tensors.items()}
    return {to_original(name): tensor for name, tensor in lifted.items()} if original else lifted


def stored(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A tensor, by canonical name, in the precision that an export of `dtype` keeps it in."""
    if FP32_ISLANDS.search(name):
        return tensor.float().contiguous()
    if dtype != "fp8":
        return tensor.to(DTYPES[dtype]).contiguous()
    if _LINEAR_OF_A_BLOCK.fullmatch(name):
        return tensor.clamp(-FP8_MAX, FP8_MAX).to(FP8).contiguous()  # older torch makes nan of larger ones
    return tensor.to(torch.bfloat16).contiguous()
