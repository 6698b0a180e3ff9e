"""The state of a run as tensors, and back: weights, their EMA, optimizer, walks and stores, losses.

No generator's state is among them: all random numbers of a run depend on their keys alone (walk/draws.py).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wandistiller.device import is_out_of_memory
from wandistiller.errors import UserError, first_line
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, local_part, reshard
from wandistiller.training.checkpoints import Checkpoint
from wandistiller.training.objective import TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions, WeightAverage, learning_rate, make_optimizers
from wandistiller.walk.batches import Batches, part_of


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long the student is trained, how its weights move, and what happens between steps.

    Attributes:
        num_steps: the last step; steps are counted from 1.
        eval_every: steps between measurements on held-out states; 0 is none.
        sample_every: steps between sample pictures, the first of which come earlier (`loop.is_early`); 0 is none.
        save_every: steps between checkpoints; 0 is none, not even at the end.
        stage: 1 learns the velocity, 2 few steps.
    """

    num_steps: int
    optimization: OptimizationOptions
    eval_every: int = 0
    sample_every: int = 0
    save_every: int = 0
    stage: int = 1


class RunState:
    """A student in training. One that loads the tensors of another continues bit for bit (on the CPU) as that would have.

    Args:
        options: of this stage of the run.
        first_step: steps of stages before.
        frozen: a model that this stage learns from and that is a part of its state.

    Attributes:
        losses: the loss of every step so far, with those of stages before.
    """

    def __init__(
        self,
        trained: TrainedStudent,
        batches: Batches,
        options: TrainingOptions,
        processes: Processes | None = None,
        *,
        first_step: int = 0,
        frozen: WanLiteStudent | None = None,
    ):
        self.trained, self.batches, self.options = trained, batches, options
        self.processes = processes or Processes(trained.objective.device)
        self.first_step, self.frozen = first_step, frozen
        own = options.optimization
        self.optimizers = make_optimizers(trained, own, self.processes.device, trained.objective.compute_dtype)
        self.average = WeightAverage(trained.student, own.ema_decay) if own.ema_decay > 0 else None
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
        num_steps = self.options.num_steps - self.first_step
        return learning_rate(self.step - self.first_step, num_steps, self.options.optimization)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[WanLiteStudent]:
        """Give the student with the average of its weights, if there is one, to be measured or drawn with."""
        self.swap()
        try:
            yield self.trained.student
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchange the student's weights and their average, if there is one."""
        if self.average is not None:
            self.average.swap()

    def update(self, loss: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.losses.append(loss)

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it by name, for `load` to read back. What is sharded in the run is sharded here too."""
        reshard(self.trained)
        parts = {
            "trained": self.trained.state_dict(),
            "ema": {} if self.average is None else self.average.state_dict(),
            "optimizer": self._moments(),
            "batches": {  # by slots; what has no dimension is a counter
                name: self.processes.rows(value) if value.ndim else value
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

        Raises:
            UserError: it does not hold the state of this run, in any process.
        """
        reason, own = None, self.tensors()
        try:
            self._take_over(checkpoint.read(lambda *stored: self._room_for(own, *stored)))
            if self.step != checkpoint.step:
                raise ValueError(f"it has the losses of {self.step} steps")
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
        if not self.processes.all_true(reason is None):
            raise UserError(
                f"{checkpoint.folder}: does not hold the state of this run ({reason or 'another process found so'}); it may be of "
                "another version. Remove it to resume from the one before, or add --overwrite to start anew"
            )

    def _room_for(self, own: dict[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Allocate memory for a saved tensor, sharded as the tensor is that it will be loaded into."""
        if name.startswith("batches.") and len(shape):
            return self.processes.rows(torch.empty(shape[0] // self.processes.count, *shape[1:], dtype=dtype))
        if own[name].shape == shape:
            return torch.empty_like(own[name], dtype=dtype)
        return torch.empty(shape, dtype=dtype)

    def _take_over(self, tensors: dict[str, Tensor]) -> None:
        batches = part_of(tensors, "batches.")
        self.batches.load_state_dict({name: local_part(value) for name, value in batches.items()})
        self.trained.load_state_dict(part_of(tensors, "trained."))
        if self.average is not None:
            self.average.load_state_dict(part_of(tensors, "ema."))
        for name, own in self._moments().items():
            local_part(own).copy_(local_part(tensors[f"optimizer.{name}"]))
        if self.frozen is not None:
            self.frozen.load_state_dict(part_of(tensors, "frozen."))
        self.losses = tensors["run.losses"].tolist()
        self.calls_before = int(tensors["run.calls_before"])

    def _moments(self) -> dict[str, Tensor]:
        """Return the optimisers' state by parameter number and name; their settings come from the flags."""
        groups = [(optimizer.state, group) for optimizer in self.optimizers for group in optimizer.param_groups]
        states = enumerate(state[parameter] for state, group in groups for parameter in group["params"])
        return {f"{number}.{name}": value for number, state in states for name, value in state.items()}
