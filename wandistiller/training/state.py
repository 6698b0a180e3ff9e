"""The state of a run as tensors, and back: weights, their EMA, optimizer, walks and stores, losses.

No generator's state is among them: all random numbers of a run depend on their keys alone (walk/draws.py).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from wandistiller.device import is_out_of_memory
from wandistiller.errors import UserError
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, error_reason, local_part, reshard
from wandistiller.training.checkpoints import Checkpoint, DamagedCheckpointError
from wandistiller.training.objective import TrainedStudent
from wandistiller.training.optimizer import (
    OptimizationOptions,
    WeightAverage,
    learning_rate,
    make_optimizer,
)
from wandistiller.walk.batches import Batches


class RunState:
    """A student in training. One that loads the tensors of another continues bit for bit (on the CPU) as that would have.

    Args:
        num_steps: the last step of this stage of the run.
        first_step: steps of stages before.
        frozen: a model that this stage learns from and that is a part of its state.

    Attributes:
        losses: the loss of every step so far, with those of stages before.
    """

    def __init__(
        self,
        trained: TrainedStudent,
        batches: Batches,
        options: OptimizationOptions,
        num_steps: int,
        processes: Processes,
        *,
        first_step: int = 0,
        frozen: WanLiteStudent | None = None,
    ):
        self.first_step, self.frozen = first_step, frozen
        self.trained, self.batches, self.processes = trained, batches, processes
        self.optimizer = make_optimizer(trained, options, processes.device, trained.objective.compute_dtype)
        self.options, self.num_steps = options, num_steps
        self.average = WeightAverage(trained.student, options.ema_decay) if options.ema_decay > 0 else None
        self.losses: list[float] = []
        self.calls_before = 0  # of the teacher in stages before

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def teacher_calls(self) -> int:
        """Global batches that the teacher has answered; a frozen student is no teacher."""
        return self.batches.num_calls if self.frozen is None else self.calls_before

    def follow(self, before: "RunState") -> None:
        """Begin where the stage before has ended: with its weights, also in the frozen copy, and the segments it has gathered."""
        self.losses, self.calls_before = list(before.losses), before.teacher_calls
        self.frozen.load_state_dict(self.trained.student.state_dict())
        self.batches.segments = before.batches.segments

    @property
    def lr(self) -> float:
        """Learning rate of the next step. It follows from the step alone, so a longer run may have another schedule."""
        return learning_rate(self.step - self.first_step, self.num_steps - self.first_step, self.options)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[WanLiteStudent]:
        """Give the student with the average of its weights, if there is one, to be measured or drawn with."""
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            yield self.trained.student

    def update(self, loss: float) -> None:
        """Take one optimiser step on the gradients that were added up."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.losses.append(loss)

    def finish(self) -> None:
        """Leave the student with the average of its weights, if there is one."""
        if self.average is not None:
            self.average.copy_to_model()

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it by name, for `load` to read back. What is sharded in the run is sharded here too."""
        reshard(self.trained)
        parts = {
            "trained": self.trained.state_dict(),
            "ema": {} if self.average is None else self.average.state_dict(),
            "optimizer": _optimizer_tensors(self.optimizer),
            "batches": {
                name: self.processes.rows(value)
                if value.ndim
                else value  # by slots; what has no dimension is a counter
                for name, value in self.batches.state_dict().items()
            },
            "frozen": {} if self.frozen is None else self.frozen.state_dict(),
            "run": {
                "losses": torch.tensor(self.losses, dtype=torch.float64),
                "calls_before": torch.tensor(self.calls_before),
            },
        }
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint, with any number of processes.

        If its run had another global batch, the training states start anew and all else resumes.

        Raises:
            DamagedCheckpointError: it does not hold the state of this run, in any process. Another one can be loaded instead.
        """
        reason = None
        try:
            tensors = checkpoint.read(self._room_for if checkpoint.has_same_batch else self._room_without_batches)
            self._check(tensors, checkpoint)
            self._take_over(tensors, checkpoint)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            reason = (
                f"{type(error).__name__}: {error_reason(error)}" if isinstance(error, KeyError) else error_reason(error)
            )
        if not self.processes.all_true(reason is None):
            raise DamagedCheckpointError(reason or "another process found so")

    def _check(self, tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
        """Refuse tensors that are not the state of a run such as this one, before any of them is taken over."""
        own = self.tensors()
        if not checkpoint.has_same_batch:
            own = {name: value for name, value in own.items() if not name.startswith("batches.")}
        if lacking := sorted(own.keys() - tensors.keys()):
            raise ValueError(f"it lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else ""))
        for name, like in own.items():
            found = tensors[name]
            # The losses grow, and so does a store.
            has_shape = name == "run.losses" or name.startswith("batches.") or found.shape == like.shape
            if found.dtype != like.dtype or not has_shape:
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, not {like.dtype} {tuple(like.shape)}")
        for name, value in tensors.items():
            is_weight = name.startswith(("trained.", "ema.", "frozen.", "optimizer.", "run."))
            if is_weight and value.is_floating_point() and not local_part(value).isfinite().all():
                raise ValueError(f"{name} is not finite")
        if tensors["run.losses"].shape != (checkpoint.step,):
            raise ValueError(f"it has {tuple(tensors['run.losses'].shape)} losses after {checkpoint.step} steps")

    def _take_over(self, tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
        if checkpoint.has_same_batch:
            batches = part_of(tensors, "batches.")
            self.batches.load_state_dict({name: local_part(value) for name, value in batches.items()})
        self.trained.load_state_dict(part_of(tensors, "trained."))
        if self.average is not None:
            self.average.load_state_dict(part_of(tensors, "ema."))
        _load_optimizer_tensors(self.optimizer, part_of(tensors, "optimizer."))
        if self.frozen is not None:
            self.frozen.load_state_dict(part_of(tensors, "frozen."))
        self.losses = tensors["run.losses"].tolist()
        self.calls_before = int(tensors["run.calls_before"])

    def _room_without_batches(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        return None if name.startswith("batches.") else self._room_for(name, shape, dtype)

    def _room_for(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Allocate memory for a saved tensor, sharded as the tensor is that it will be loaded into."""
        part, rest = name.split(".", 1)
        like: Tensor | None = None
        if part == "trained":
            like = dict(self.trained.named_parameters()).get(rest)
        elif part == "ema" and self.average is not None:
            like = self.average.weights.get(rest)
        elif part == "frozen" and self.frozen is not None:
            like = dict(self.frozen.named_parameters()).get(rest)
        elif part == "optimizer":
            like = _parameters_of(self.optimizer)[int(rest.split(".", 1)[0])]
        if like is not None and like.shape == shape:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
        if part == "batches" and len(shape):
            return self.processes.empty_rows(shape, dtype)
        return torch.empty(shape, dtype=dtype)


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state by parameter number and name; its settings come from the flags.

    This reads `optimizer.state` and not `state_dict`, to which bitsandbytes gives a form of its own. There the step is a plain
    number, and one table tensor serves all parameters, which a safetensors file cannot hold twice.
    """
    tensors, seen = {}, set()
    for number, parameter in enumerate(_parameters_of(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            value = torch.as_tensor(value)
            tensors[f"{number}.{name}"] = value.clone() if id(value) in seen else value
            seen.add(id(value))
    return tensors


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = _parameters_of(optimizer)
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        is_number = value.ndim == 0 and not value.is_floating_point()
        optimizer.state[parameter][name] = int(value) if is_number else value.to(parameter.device)
