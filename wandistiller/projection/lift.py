"""2D -> 3D, and what little there is between the two: a student as the Wan transformer that it is at one frame.

The patch kernel is the only weight whose shape differs: Conv2d (D, C, P, P) is the one frame of Conv3d (D, C, 1, P, P).
Every other tensor is the same in both, under the names of `wan_names`. `projection_mapper` goes the way down.
"""

import re

import torch
from torch import Tensor

from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import FP8, FP8_MAX
from wandistiller.wan.names import to_original

PATCH_KERNEL = "patch_embedding.weight"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}

# Kept in float32 whatever the dtype of the rest (diffusers' Wan: _keep_in_fp32_modules).
FP32_ISLANDS = re.compile(r"time_embedder|time_proj|scale_shift_table|\.norm")

# Of 2 dimensions in a block: what plain fp8 files keep in 8 bits, without a scale.
_LINEAR_OF_A_BLOCK = re.compile(r"blocks\.\d+\.(attn[12]\.to_|ffn\.net\.).*\.weight")


def without_frames(tensor: Tensor) -> Tensor:
    """A Wan's tensor in 2D: the patch kernel loses its depth of 1, any other is returned as it is."""
    return tensor[:, :, 0] if tensor.ndim == 5 else tensor


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


def transformer_settings(config: StudentConfig) -> dict:
    """config.json of a diffusers WanTransformer3DModel with this shape (diffusers:models/transformers/transformer_wan.py)."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.num_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": config.num_channels,
        "patch_size": [1, config.patch_size, config.patch_size],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_encoder_output_dim,
    }


def teacher_record(config: StudentConfig) -> dict:
    """What a student says of itself to those that distil or draw it as a teacher; empty where it has no record.

    Its guidance is 1: the guided velocity is what it learnt. A student of few steps is to be asked at those steps.
    """
    record = config.distillation
    if not record:
        return {}
    kept = (
        "shift",
        "negative_prompt",
        "latents_mean",
        "latents_std",
        "vae_scale_factor",
        "sigma_range",
        "student_steps",
        "world",
    )
    return {
        "guidance_scale": 1.0,
        "num_inference_steps": record.get("student_steps") or record.get("num_inference_steps"),
        **{name: record[name] for name in kept if record.get(name) is not None},
        "image_size": config.image_size,
        "text_max_length": config.text_max_length,
    }
