"""How weights move: AdamW, its learning rate over the run, and their moving average."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """`lr_scheduler` is "constant", "linear" or "cosine", each after `lr_warmup_steps`; `ema_decay` is the moving average's memory a step; 0 keeps none."""

    lr: float
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0


def make_optimizer(model: nn.Module, options: OptimizationOptions, device: str) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=torch.device(device).type == "cuda",
    )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, options: OptimizationOptions, num_steps: int) -> LambdaLR:
    """Warm-up, then constant, or down to zero at `num_steps` along a line or half a cosine."""
    from transformers.optimization import get_scheduler

    name = "constant_with_warmup" if options.lr_scheduler == "constant" else options.lr_scheduler
    return get_scheduler(name, optimizer, options.lr_warmup_steps, num_steps)


def make_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """The moving average of a model's weights, or None where `decay` is 0.

    Its memory grows with the run, min(decay, (1 + n) / (10 + n)) after n updates (diffusers:src/diffusers/training_utils.py,
    EMAModel), so that the average of a short run does not remember the start.
    """

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        n = float(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=average) if decay > 0 else None
