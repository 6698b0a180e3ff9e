"""A LoRA that is trained on a student (arXiv 2106.09685): W x + alpha / rank * up (down x), the student's own weights frozen.

The layers of the blocks get one each. The weights of a student with it are told apart by name: `state_dict` holds both, and
`merged_state` the student that draws what the two do together.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wandistiller.model.transformer import WanLiteStudent

DOWN, UP = "lora_down", "lora_up"


class LoraLinear(nn.Linear):
    """A frozen linear layer with a product of two matrices beside it, up (out, rank) and down (rank, in)."""

    lora_down: nn.Parameter
    lora_up: nn.Parameter
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_scale * F.linear(F.linear(x, self.lora_down), self.lora_up)


def add_lora(
    student: WanLiteStudent,
    rank: int,
    alpha: float,
    *,
    seed: int = 0,
    start: Mapping[str, Tensor | tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Freeze a student and give each linear layer of its blocks a LoRA, in place.

    Args:
        start: what the LoRA begins with: changes of weights by their names, whole (out, in) or as up (out, R) and down (R, in).
            The largest `rank` singular values of each are kept. Other layers begin with no change, as PEFT's do.
    """
    student.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in student.blocks.named_modules(prefix="blocks"):
        if not isinstance(layer, nn.Linear):
            continue
        scale = alpha / rank
        down, up = torch.empty(rank, layer.in_features), torch.zeros(layer.out_features, rank)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        if start and (change := start.get(f"{name}.weight")) is not None:
            found_up, found_down = truncated(change, rank)
            up[:, : found_up.shape[1]] = found_up / scale
            down[: len(found_down)] = found_down
        layer.__class__ = LoraLinear  # its weights keep their names, and so do the files and checkpoints
        layer.lora_scale = scale  # type: ignore[assignment]
        layer.lora_down, layer.lora_up = (nn.Parameter(part.to(layer.weight)) for part in (down, up))


def truncated(change: Tensor | tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return up (out, r) and down (r, in) of the nearest matrix of rank `r` <= `rank`, both of one size."""
    if isinstance(change, Tensor):
        u, s, vh = torch.linalg.svd(change.float(), full_matrices=False)
    else:  # the singular values of a product are those of a small matrix
        (q_up, r_up), (q_down, r_down) = (torch.linalg.qr(part.float()) for part in (change[0], change[1].T))
        u, s, vh = torch.linalg.svd(r_up @ r_down.T)
        u, vh = q_up @ u, vh @ q_down.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def lora_changes(student: WanLiteStudent, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return up, with the scale, and down of each weight that the LoRA changes, from a student's state of whole tensors."""
    return {
        f"{name}.weight": (layer.lora_scale * state[f"{name}.{UP}"], state[f"{name}.{DOWN}"])
        for name, layer in student.named_modules()
        if isinstance(layer, LoraLinear)
    }


def merged_state(student: WanLiteStudent, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a student without a LoRA that draws the same, from its state of whole tensors."""
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((f".{UP}", f".{DOWN}"))}
    for name, (up, down) in lora_changes(student, state).items():
        merged[name] = merged[name] + up @ down
    return merged
