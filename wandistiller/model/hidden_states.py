"""The hidden states of a model's blocks, collected while it answers."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from wandistiller.model.transformer import WanLiteStudent


@contextlib.contextmanager
def block_outputs(model: WanLiteStudent, layers: Sequence[int], num_rows: int | None = None) -> Iterator[list[Tensor]]:
    """Collect the output (B, L, D) of the blocks in `layers`, in their order, of the one forward pass inside.

    Args:
        num_rows: keep a copy of the first rows alone, so that the memory of the others is free; None keeps all as they are.
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
