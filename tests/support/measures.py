"""Oracles for the arithmetic of budgets: FLOPs, saved tensors and live memory as torch itself shows them."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from wandistiller import StudentConfig, WanLiteStudent


def count_flops(call: Callable[[], object]) -> int:
    """Of matrix products, attention and convolutions in `call`, by torch's own counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Fused attention would hide its products from the counter: nn.MultiheadAttention's fast path, and CPU kernels.
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
    return counter.get_total_flops()


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of `call`."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


class LiveBytes(TorchDispatchMode):
    """The largest sum of bytes of the tensors made inside, and not yet dropped: what a caching allocator would need.

    Args:
        known: tensors that were there before; views of them count as nothing.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0
        self._watched: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._watched and key not in self._known:
            self._watched[key] = (weakref.ref(storage, lambda _: self._drop(key)), storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._watched.pop(key)[1]


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        yield


def inputs_of(config: StudentConfig, batch: int, num_tokens: int) -> tuple[Tensor, ...]:
    latents = torch.randn(batch, config.num_channels, config.latent_size, config.latent_size)
    text = torch.randn(batch, num_tokens, config.text_encoder_output_dim)
    return latents, torch.full((batch,), 500.0), text, torch.full((batch,), num_tokens)


def with_checkpointing(model: WanLiteStudent) -> WanLiteStudent:
    """Every block computed again in the backward pass."""
    for block in model.blocks:
        block.forward = lambda *args, forward=block.forward: checkpoint(forward, *args, use_reentrant=False)
    return model


def per_sample(measure: Callable[[int], int], low: int = 2, high: int = 4) -> float:
    """What a sample more costs: what does not grow with the batch (weights, their copies, gradients) falls out."""
    return (measure(high) - measure(low)) / (high - low)


def training_peak(model: WanLiteStudent, batch: int, num_tokens: int, dtype: torch.dtype) -> int:
    """Live bytes of one forward and backward pass, whose gradients were there before."""
    inputs = inputs_of(model.config, batch, num_tokens)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes([*model.parameters(), *(parameter.grad for parameter in model.parameters())]) as live:
        with computing_in(dtype):
            velocity = model(*inputs)
        velocity.square().mean().backward()
    return live.peak


@torch.no_grad()
def inference_peak(model: WanLiteStudent, batch: int, num_tokens: int, dtype: torch.dtype) -> int:
    inputs = inputs_of(model.config, batch, num_tokens)
    with LiveBytes(model.parameters()) as live, computing_in(dtype):
        model(*inputs)
    return live.peak
