"""Muon (https://kellerjordan.github.io/posts/muon/) for matrices, Adam for the rest: a CPU can pay for few steps."""

import math

import torch
from torch import Tensor


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the learning-rate factor: a linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def warmup_constant_decay(step: int, steps: int, warmup: int, decay: float = 0.3) -> float:
    """Return the learning-rate factor: warm-up, constant, then linear to zero at the end, so that `steps` may change."""
    return min((step + 1) / warmup, 1.0, (steps - step) / max(1.0, decay * steps))


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return semi-orthogonal matrices (K, rows, columns) near the given ones, by a quintic Newton-Schulz iteration."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


class MuonWithAdam(torch.optim.Optimizer):
    """An optimiser that updates each group by Muon (`muon=True`; convolutions are flattened) or Adam, at its own `lr`."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {"momentum": 0.95, "betas": (0.9, 0.98)})
        self.base_lr = [group["lr"] for group in self.param_groups]

    def set_lr_factor(self, factor: float) -> None:
        """Scale every group's learning rate from its start value."""
        for group, base in zip(self.param_groups, self.base_lr, strict=True):
            group["lr"] = base * factor

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._muon(params, group)
            else:
                for p in params:
                    self._adam(p, group)

    def _muon(self, params: list[Tensor], group: dict) -> None:
        by_shape: dict[tuple[int, int], list[Tensor]] = {}  # matrices of one shape go through the iteration together
        for p in params:
            by_shape.setdefault(tuple(p.flatten(1).shape), []).append(p)
        for shape, same in by_shape.items():
            updates = orthogonalised(torch.stack([self._momentum(p, group["momentum"]).flatten(1) for p in same]))
            # The factor gives every matrix an update of the same root mean square, that of Adam (arXiv:2502.16982).
            scale = 0.2 * math.sqrt(max(shape))
            for p, update in zip(same, updates, strict=True):
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)

    def _momentum(self, p: Tensor, beta: float) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["momentum"], beta)  # Nesterov's look ahead

    def _adam(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(p.grad, 1 - beta1)
        state["square"].lerp_(p.grad.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        root = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-10)
        p.addcdiv_(mean, root, value=-group["lr"])
