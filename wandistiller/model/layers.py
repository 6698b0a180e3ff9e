"""Positions and timestep features: pure functions. B batch, L image tokens, N heads, E head dim."""

import math
from functools import lru_cache

import torch
from torch import Tensor

ROPE_THETA = 10000.0


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return [cos | sin] features (B, dim) of a float timestep (B,), in float32 as diffusers computes Wan's."""
    exponent = -math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=timestep.device) / (dim // 2)
    angles = timestep.float()[:, None] * torch.exp(exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _axis_angles(dim: int, length: int) -> Tensor:
    """Return the angles (length, dim / 2) of one axis, position x theta^(-2i / dim), in float64 as the original does."""
    inverse = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(length, dtype=torch.float64), inverse)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table first made for sampling may serve training later
def rope_table(head_dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return cos and sin (L, 1, E / 2, 2) of Wan's RoPE at frame 0: the temporal channels come first and stay unrotated."""
    axis_dim = 2 * (head_dim // 6)
    temporal = torch.zeros(height, width, (head_dim - 2 * axis_dim) // 2, dtype=torch.float64)
    rows = _axis_angles(axis_dim, height)[:, None].expand(height, width, -1)
    columns = _axis_angles(axis_dim, width)[None].expand(height, width, -1)
    angles = torch.cat([temporal, rows, columns], dim=-1).flatten(0, 1)[:, None]
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float().to(device)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the interleaved channel pairs (2i, 2i + 1) of x (B, L, N, E), in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, and has no kernels for complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:  # this is one pass over memory, and gives the same bits
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def sincos_positions(dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return parameter-free 2D positions (L, dim): half the channels tell the row, the rest the column."""
    rows_dim = 2 * (dim // 4)
    rows, columns = _axis_angles(rows_dim, height), _axis_angles(dim - rows_dim, width)
    rows = torch.cat([rows.sin(), rows.cos()], dim=-1)[:, None].expand(height, width, -1)
    columns = torch.cat([columns.sin(), columns.cos()], dim=-1)[None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float().to(device)
