"""The hidden states of a model's blocks, collected while it answers."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from wandistiller.model.transformer import WanLiteStudent


@contextlib.contextmanager
def block_outputs(model: WanLiteStudent, layers: Sequence[int], num_rows: int | None = None) -> Iterator[list[Tensor]]:
    """Collect the outputs (B, L, D) of the blocks in `layers` during the one forward pass inside the context.

    Args:
        num_rows: number of first rows to copy, so that the memory of the others is free; None keeps the outputs themselves.
    """
    outputs: list[Tensor] = []

    def keep(block: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs.append(output if num_rows is None else output[:num_rows].clone())

    hooks = [model.blocks[layer].register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
