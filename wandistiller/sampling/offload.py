"""Two experts where the device has memory for one: both stay in host memory, the one in use is also on the device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from pinned memory the copy is queued there and the host goes on."""
    return tensor.to(device, non_blocking=True)


class OffloadedExperts:
    """Brings the weights of one expert at a time to the device; the experts are changed in place.

    Weights never change, so nothing is ever copied back: an expert that leaves the device takes up its host copy again. On a
    device that is the host itself no byte moves.

    Args:
        experts: frozen models in host memory; for a GPU that memory is pinned. (torch rounds each pinned tensor up to
            a power of two: the experts of A14B take about half as much host memory again.)
    """

    def __init__(self, experts: Mapping[str, nn.Module], device: str | torch.device):
        self.device = torch.device(device)
        self.on_device: str | None = None
        self._tensors = {name: [*expert.parameters(), *expert.buffers()] for name, expert in experts.items()}
        if self.device.type == "cuda":
            for tensors in self._tensors.values():
                for tensor in tensors:
                    tensor.data = tensor.data.pin_memory()  # one at a time: no expert is there twice
        self._host = {name: [tensor.data for tensor in tensors] for name, tensors in self._tensors.items()}

    @torch.inference_mode(False)  # an expert brought in while a picture is drawn serves training later
    def use(self, name: str) -> None:
        """Have this expert on the device, and no other; the other leaves first, so that both never need to fit."""
        if name == self.on_device:
            return
        if self.on_device is not None:
            for tensor, host in zip(self._tensors[self.on_device], self._host[self.on_device], strict=True):
                tensor.data = host
        for tensor, host in zip(self._tensors[name], self._host[name], strict=True):
            tensor.data = to_device(host, self.device)
        self.on_device = name
