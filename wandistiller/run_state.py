"""Everything of a run that moves: weights, their average, optimiser, answers, random numbers; as tensors and back."""

import torch
from torch import Tensor, nn

from wandistiller.answers import Answers
from wandistiller.objective import Objective
from wandistiller.optimization import OptimizationOptions, make_ema, make_lr_scheduler, make_optimizer
from wandistiller.states import part_of
from wandistiller.student import WanLiteStudent


class RunState:
    """A student in training. Loaded from another one's tensors it goes on bit for bit (on the CPU) as that would have.

    Attributes:
        trained: the student, and with it what is learnt beside it and thrown away.
        losses: of every step so far.
    """

    def __init__(
        self,
        student: WanLiteStudent,
        answers: Answers,
        objective: Objective,
        options: OptimizationOptions,
        num_steps: int,
        device: str,
    ):
        self.student, self.answers = student, answers
        beside = [] if objective.feature_loss is None else [objective.feature_loss]
        self.trained = nn.ModuleList([student, *beside])
        self.optimizer = make_optimizer(self.trained, options, device)
        self.lr_scheduler = make_lr_scheduler(self.optimizer, options, num_steps)
        self.ema = make_ema(student, options.ema_decay)
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def lr(self) -> float:
        return self.lr_scheduler.get_last_lr()[0]

    @property
    def averaged(self) -> WanLiteStudent:
        """What is measured and saved: the average of the student's weights where there is one."""
        return self.student if self.ema is None else self.ema.module

    def update(self, loss: float) -> None:
        """One optimiser step on the gradients at hand."""
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.student)
        self.losses.append(loss)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, flat, to be read back by `load`."""
        parts = {
            "trained": self.trained.state_dict(),
            "ema": {} if self.ema is None else self.ema.state_dict(),
            "optimizer": _optimizer_tensors(self.optimizer),
            "answers": self.answers.state_dict(),
            "random": _random_tensors(),
            "run": {"losses": torch.tensor(self.losses, dtype=torch.float64)},
        }
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.trained.load_state_dict(part_of(tensors, "trained."))
        if self.ema is not None:
            self.ema.load_state_dict(part_of(tensors, "ema."))
        _load_optimizer_tensors(self.optimizer, part_of(tensors, "optimizer."))
        self.answers.load_state_dict(part_of(tensors, "answers."))
        self.losses = part_of(tensors, "run.")["losses"].tolist()
        self._set_lr()
        _load_random_tensors(part_of(tensors, "random."))

    def _set_lr(self) -> None:
        """The learning rate of this step; it follows from the step alone, so a longer run may have another schedule."""
        scheduler = self.lr_scheduler
        lrs = [base * factor(self.step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict(
            scheduler.state_dict() | {"last_epoch": self.step, "_step_count": self.step + 1, "_last_lr": lrs}
        )
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter number and name; its settings come from the flags."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_tensors() -> dict[str, Tensor]:
    """States of the global generators of the CPU and of every GPU."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state()} | {f"cuda{number}": state for number, state in enumerate(gpus)}


def _load_random_tensors(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for number in range(torch.cuda.device_count()):
        if f"cuda{number}" in states:
            torch.cuda.set_rng_state(states[f"cuda{number}"], number)
