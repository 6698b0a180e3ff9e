"""How weights move: AdamW, its learning rate over the run, and their moving average."""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from wandistiller.errors import UserError
from wandistiller.processes import local_part, reshard


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """How weights move.

    Attributes:
        optimizer: "adamw" or "adamw8bit".
        lr_scheduler: "constant", "linear" or "cosine", which follows `lr_warmup_steps` of rising learning rate.
        ema_decay: share of the moving average that a step keeps; 0 keeps no average.
    """

    lr: float
    optimizer: str = "adamw"
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0


def check_optimizer(name: str) -> None:
    """Refuse an optimiser if its library is not installed."""
    if name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--optimizer adamw8bit: needs bitsandbytes, which is not installed; pip install bitsandbytes")


def make_optimizer(model: nn.Module, options: OptimizationOptions, device: str) -> torch.optim.Optimizer:
    """Return torch's AdamW, or bitsandbytes' with moments in 8 bits (blockwise quantisation, arXiv 2110.02861)."""
    settings: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(model.parameters(), **settings)
    return torch.optim.AdamW(model.parameters(), **settings, fused=torch.device(device).type in ("cuda", "cpu"))


def make_lr_scheduler(optimizer: torch.optim.Optimizer, options: OptimizationOptions, num_steps: int) -> LambdaLR:
    """Return a schedule that warms up and then stays, or falls to zero at `num_steps` along a line or half a cosine."""
    from transformers.optimization import get_scheduler

    name = "constant_with_warmup" if options.lr_scheduler == "constant" else options.lr_scheduler
    return get_scheduler(name, optimizer, options.lr_warmup_steps, num_steps)


class WeightAverage:
    """The moving average of a model's weights, on the device of each weight and sharded as FSDP2 shards it.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in diffusers' EMAModel, so that the average of a short run
    does not remember the start. EMAModel itself rounds otherwise in the first updates, keeps its weights without names for the
    checkpoint, and takes a copy of the model to the CPU for every evaluation.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's weights. The first update moves all the way."""
        n = self.num_updates
        share = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        current = [local_part(weight) for weight in self.model.parameters()]
        torch._foreach_lerp_([local_part(weight) for weight in self.weights.values()], current, share)
        self.num_updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the average for its weights inside, and its own weights back after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        reshard(self.model)
        for name, weight in self.model.named_parameters():
            ours, theirs = local_part(self.weights[name]), local_part(weight)
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the model's weights by the average, for good."""
        reshard(self.model)
        for name, weight in self.model.named_parameters():
            local_part(weight).copy_(local_part(self.weights[name]))

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights | {"num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.num_updates = int(state["num_updates"])
        for name, weight in self.weights.items():
            local_part(weight).copy_(local_part(state[name]))
