"""How weights move: AdamW or Muon, the learning rate over the run, and the weights' moving average."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wandistiller.processes import each_in_one_process, fill, local_part, num_processes, reshard

NEWTON_SCHULZ_STEPS = 5  # torch's default, of which a budget has to know
_IN_BLOCK = re.compile(r"(?:^|\.)blocks\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """How weights move.

    Attributes:
        optimizer: "adamw", or "muon", which moves the matrices of the blocks and leaves the rest to AdamW.
        betas: of AdamW.
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


def make_optimizers(
    model: nn.Module, options: OptimizationOptions, device: str, compute_dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """Return the optimisers of a student, or of a student with what is learnt beside it, each of some of the weights.

    Args:
        compute_dtype: precision of matrix products, of which only Muon has any.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    settings: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "weight_decay": options.weight_decay}
    settings["fused"] = torch.device(device).type in ("cuda", "cpu")
    if options.optimizer == "adamw":
        return [_adamw(trained.values(), settings)]
    # Muon is for hidden layers: embedders, the output layer and the maps of the feature loss are matrices too, and AdamW's.
    matrices = {name: weight for name, weight in trained.items() if weight.ndim == 2 and _IN_BLOCK.search(name)}
    muon = Muon(matrices.values(), options.lr, options.weight_decay, compute_dtype)
    others = [weight for name, weight in trained.items() if name not in matrices]  # a LoRA has none
    return [muon, *([_adamw(others, settings)] if others else [])]


def _adamw(parameters: Iterable[nn.Parameter], settings: dict[str, Any]) -> torch.optim.AdamW:
    """Return torch's AdamW with the moments that its first step would make, so that a checkpoint can be compared with them."""
    optimizer = torch.optim.AdamW(parameters, **settings)
    for weight in optimizer.param_groups[0]["params"]:
        moments = {name: torch.zeros_like(weight, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.zeros((), device=weight.device)} | moments
    return optimizer


class Muon(torch.optim.Muon):
    """torch's Muon with its matrix products in the run's precision, and for matrices that FSDP2 shards.

    torch has them in bfloat16 whatever the weights are. There the last bit of a gradient changes an update by half a percent,
    so that two processes would not take the steps of one; and a CPU without instructions for it takes 20 times as long as in
    float32. Of a sharded matrix torch multiplies the shards, and rounds and sends each product. Here matrices of one shape are
    shared out: each process orthogonalises one, whole, and they exchange the updates, which are those of one process.

    The update of a matrix (A, B) is scaled by 0.2 sqrt(max(A, B)) to the size of AdamW's, so that both go by one learning rate
    (arXiv 2502.16982, torch's "match_rms_adamw").
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, compute_dtype: torch.dtype):
        super().__init__(matrices, lr, weight_decay, ns_steps=NEWTON_SCHULZ_STEPS, adjust_lr_fn="match_rms_adamw")
        self.compute_dtype = compute_dtype
        for weight in self.param_groups[0]["params"]:
            self.state[weight] = {"momentum_buffer": torch.zeros_like(weight, requires_grad=False)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without the closure, which nobody here has
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            for weights in _rounds([weight for weight in group["params"] if weight.grad is not None]):
                self._move(weights, group)

    def _move(self, weights: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Move matrices of one shape, one for each process at most."""
        means = (self._mean(weight, group["momentum"]) for weight in weights)
        found = each_in_one_process(lambda mean: self._orthogonalized(mean, group), means)
        scale = 0.2 * math.sqrt(max(weights[0].shape))
        for weight, wide in zip(weights, found, strict=True):
            update = torch.empty_like(weight)
            fill(update, wide.T if weight.shape[0] > weight.shape[1] else wide)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

    def _mean(self, weight: Tensor, momentum: float) -> Tensor:
        mean = self.state[weight]["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum)

    def _orthogonalized(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """Return a matrix, laid on its longer side, with its singular values brought near 1, by Newton and Schulz's iteration.

        A step of it takes each singular value s to a s + b s^3 + c s^5.
        """
        a, b, c = group["ns_coefficients"]
        x = matrix.to(self.compute_dtype)
        x = x.T if x.shape[0] > x.shape[1] else x
        x = x / x.norm().clamp(min=group["eps"])
        for _ in range(group["ns_steps"]):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x


def _rounds(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield matrices of one shape, wide or tall, as many at a time as there are processes."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
    for same in by_shape.values():
        yield from (same[start : start + num_processes()] for start in range(0, len(same), num_processes()))


def learning_rate(step: int, num_steps: int, options: OptimizationOptions) -> float:
    """Return the rate of a step (from 0): it warms up, and then stays, or falls to zero at `num_steps` along a line or half a cosine."""
    warmup = options.lr_warmup_steps
    if step < warmup:
        return options.lr * step / warmup
    left = max(0.0, (num_steps - step) / max(1, num_steps - warmup))
    shares = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return options.lr * shares[options.lr_scheduler]


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

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the average."""
        reshard(self.model)
        for name, weight in self.model.named_parameters():
            ours, theirs = local_part(self.weights[name]), local_part(weight)
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights | {"num_updates": torch.tensor(self.num_updates)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.num_updates = int(state["num_updates"])
        for name, weight in self.weights.items():
            local_part(weight).copy_(local_part(state[name]))
