"""What the transformer's blocks are built of: rotary and sin-cos positions, timestep features, and linear layers.

Positions are pure functions of shapes. L image tokens, N heads, E head dim, B batch. A linear layer's large products in float32 on
a CPU are oneDNN's instead of MKL's: on an AMD processor that was 1.06 to 1.38 times as fast forward (benchmarks/bench_linear.py,
docs/benchmarks.md); no other was tried.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_THETA = 10000.0


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """[cos | sin] features of a float timestep (B,) -> (B, dim), in float32 as diffusers computes Wan's."""
    exponent = -math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=timestep.device) / (dim // 2)
    angles = timestep.float()[:, None] * torch.exp(exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _axis_angles(dim: int, length: int) -> Tensor:
    """Angles (length, dim / 2) of one axis: position x theta^(-2i / dim), in float64 as the original does."""
    inverse = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(length, dtype=torch.float64), inverse)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table first made for sampling may serve training later
def rope_table(head_dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """cos and sin, (L, 1, E / 2, 2), of Wan's RoPE at frame 0: the temporal channels come first and stay unrotated."""
    axis_dim = 2 * (head_dim // 6)
    temporal = torch.zeros(height, width, (head_dim - 2 * axis_dim) // 2, dtype=torch.float64)
    rows = _axis_angles(axis_dim, height)[:, None].expand(height, width, -1)
    columns = _axis_angles(axis_dim, width)[None].expand(height, width, -1)
    angles = torch.cat([temporal, rows, columns], dim=-1).flatten(0, 1)[:, None]
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float().to(device)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the interleaved channel pairs (2i, 2i + 1) of x (B, L, N, E), in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses real arithmetic, and has no kernels for complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:  # one pass over memory, and the same bits
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def sincos_positions(dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """Parameter-free 2D positions (L, dim): half the channels for the row, the rest for the column."""
    rows_dim = 2 * (dim // 4)
    rows, columns = _axis_angles(rows_dim, height), _axis_angles(dim - rows_dim, width)
    rows = torch.cat([rows.sin(), rows.cos()], dim=-1)[:, None].expand(height, width, -1)
    columns = torch.cat([columns.sin(), columns.cos()], dim=-1)[None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float().to(device)


# Of the weight: with fewer, what a call costs beside the product eats up what the product saves.
LARGE = 2**20


def _has_both() -> bool:
    """Whether torch would take MKL, and oneDNN is there too (torch's compiler takes its linear layers from the same place)."""
    is_there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return is_there and hasattr(torch.ops.mkldnn, "_linear_pointwise")


HAS_ONEDNN = _has_both()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight.T (in, out) + bias by oneDNN, in float32 on a CPU; no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if needs_x else None,
            product(grad_rows.t(), rows.t()) if needs_weight else None,
            grad_rows.sum(dim=0) if needs_bias else None,
        )


class Linear(nn.Linear):
    """nn.Linear, with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        if self._is_for_onednn(x):
            return _OneDnnLinear.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def _is_for_onednn(self, x: Tensor) -> bool:
        return (
            HAS_ONEDNN
            and x.device.type == "cpu"
            and self.weight.numel() >= LARGE
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()  # which makes a choice of its own
        )
