"""Linear layers whose large products in float32 on a CPU are oneDNN's instead of MKL's.

torch gives such products to MKL. On an AMD processor oneDNN was 1.06 to 1.38 times as fast forward (benchmarks/bench_linear.py,
docs/benchmarks.md); no other was tried. Everything else is nn.Linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
