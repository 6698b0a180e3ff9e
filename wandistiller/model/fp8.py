"""A frozen teacher in half the memory of bf16: its blocks' Linear layers keep their weights as 8-bit floats with one scale each.

Matrix products stay in the compute dtype: a layer's weight is widened when it is used and dropped after, so that no more
than one layer is ever there in the larger dtype. The rest keeps its precision. Patch embedding, text embedder and proj_out
are less than a hundredth of a released model, and an error there reaches every token at every layer or the answer itself;
time embedder, modulation tables and norms are the float32 islands of Wan; biases are vectors.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from wandistiller.model.transformer import WanLiteStudent

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class Fp8Linear(nn.Module):
    """A frozen Linear with its weight (out, in) in float8_e4m3fn: y = scale * (x @ weight.T) + bias.

    `scale` is a number instead of a buffer: the matrix product takes it as its factor without waiting for the device and without a
    rounding of its own.
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter, device: torch.device | None = None):
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=FP8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.scale = 1.0

    def store(self, weight: Tensor) -> None:
        """Round a weight (out, in) of any precision and device; one that already is fp8 times a scale keeps its values."""
        rounded, self.scale = quantise(weight.detach().to(self.weight.device))
        self.weight.data.copy_(rounded)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., N, in) to (..., N, out), in the dtype of autocast or else that of x."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight = self.weight.to(dtype)  # exact: bf16 and fp32 hold every fp8 value
        rows = x.flatten(0, -2).to(dtype)
        return torch.addmm(self.bias.to(dtype), rows, weight.t(), alpha=self.scale).unflatten(0, x.shape[:-1])


def quantise(weight: Tensor) -> tuple[Tensor, float]:
    """Return a weight as float8_e4m3fn, and the scale (a float32 number) that it is to be multiplied by.

    A weight whose every value is an fp8 value, as a Wan stored in plain fp8 has it, is kept with scale 1.
    """
    weight = weight.float()
    if _is_plain(weight[:1]) and _is_plain(weight):  # the first row rules most weights out at no cost
        return weight.to(FP8), 1.0
    low, high = weight.aminmax()
    scale = torch.maximum(-low, high) / FP8_MAX
    return (weight / scale).to(FP8), float(scale)


def _is_plain(weight: Tensor) -> bool:
    return torch.equal(weight.to(FP8).float(), weight)


def to_fp8(model: "WanLiteStudent") -> "WanLiteStudent":
    """Store the Linear weights of a wan model's blocks as fp8, in place and one layer at a time.

    A model on the meta device gets layers of the same shapes, to be filled later.
    """
    for name, linear in list(model.blocks.named_modules()):
        if isinstance(linear, nn.Linear):
            stored = Fp8Linear(linear.in_features, linear.out_features, linear.bias, linear.weight.device)
            if not linear.weight.is_meta:
                stored.store(linear.weight)
            model.blocks.set_submodule(name, stored)
    return model


def fp8_linears(model: nn.Module) -> dict[str, Fp8Linear]:
    """Return the layers that are kept as fp8, by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
