"""What models are asked in a run: torch's own hook sees every forward pass of a student or of a teacher in 2D."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wandistiller.model.transformer import WanLiteStudent


@contextlib.contextmanager
def questions(width: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect latents and timesteps of the forward passes of models of a width; those that only count FLOPs are left out."""
    found: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, WanLiteStudent) and module.config.hidden_size == width and not inputs[0].is_meta:
            found.append((inputs[0], inputs[1]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        hook.remove()
