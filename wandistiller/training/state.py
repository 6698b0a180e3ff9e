"""The state of a run as tensors, and back: weights, their EMA, optimizer, walks and stores, random numbers, losses."""

import contextlib
from collections import defaultdict
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
    CombinedOptimizer,
    OptimizationOptions,
    WeightAverage,
    make_lr_scheduler,
    make_optimizer,
)
from wandistiller.walk.batches import Batches

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # as torch's AdamW and Muon name them
_STATE_OF = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}


class RunState:
    """A student in training. One that loads the tensors of another continues bit for bit (on the CPU) as that would have.

    Attributes:
        losses: the loss of every step so far.
    """

    def __init__(
        self,
        trained: TrainedStudent,
        batches: Batches,
        options: OptimizationOptions,
        num_steps: int,
        processes: Processes,
    ):
        self.trained, self.batches, self.processes = trained, batches, processes
        self.optimizer = make_optimizer(trained, options, processes.device, trained.objective.compute_dtype)
        self.lr_scheduler = make_lr_scheduler(self.optimizer, options, num_steps)
        self.average = WeightAverage(trained.student, options.ema_decay) if options.ema_decay > 0 else None
        self.losses: list[float] = []
        self._random: dict[str, Tensor] = {}

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def lr(self) -> float:
        return float(self.lr_scheduler.get_last_lr()[0])

    @contextlib.contextmanager
    def averaged(self) -> Iterator[WanLiteStudent]:
        """Give the student with the average of its weights, if there is one, to be measured or drawn with."""
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            yield self.trained.student

    def update(self, loss: float) -> None:
        """Take one optimiser step on the gradients that were added up."""
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.losses.append(loss)

    def finish(self) -> None:
        """Leave the student with the average of its weights, if there is one."""
        if self.average is not None:
            self.average.copy_to_model()

    def tensors(self, has_states: bool = True) -> dict[str, Tensor]:
        """Return all of it by name, for `load` to read back. What is sharded in the run is sharded here too.

        Args:
            has_states: whether to include the training states, which are complete between steps only.
        """
        reshard(self.trained)
        parts = {
            "trained": self.trained.state_dict(),
            "ema": {} if self.average is None else self.average.state_dict(),
            "optimizer": _optimizer_tensors(self.optimizer),
            "batches": {
                name: self.processes.rows(value)
                if value.ndim
                else value  # by slots; what has no dimension is a counter
                for name, value in (self.batches.state_dict() if has_states else {}).items()
            },
            "random": _random_tensors(),
            "run": {"losses": torch.tensor(self.losses, dtype=torch.float64)},
        }
        return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint, with any number of processes; `restore_random` completes it when the loop begins.

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
        own = self.tensors(has_states=checkpoint.has_same_batch)
        own.pop("random.cuda", None)  # a checkpoint of a machine without a GPU has none
        if lacking := sorted(own.keys() - tensors.keys()):
            raise ValueError(f"it lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else ""))
        for name, like in own.items():
            found = tensors[name]
            # The losses grow, and so does a store.
            has_shape = name == "run.losses" or name.startswith("batches.") or found.shape == like.shape
            if found.dtype != like.dtype or not has_shape:
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, not {like.dtype} {tuple(like.shape)}")
        for name, value in tensors.items():
            is_weight = name.startswith(("trained.", "ema.", "optimizer.", "run."))
            if is_weight and value.is_floating_point() and not local_part(value).isfinite().all():
                raise ValueError(f"{name} is not finite")
        if tensors["run.losses"].shape != (checkpoint.step,):
            raise ValueError(f"it has {tuple(tensors['run.losses'].shape)} losses after {checkpoint.step} steps")
        _check_optimizer_tensors(self.optimizer, part_of(tensors, "optimizer."))
        torch.Generator().set_state(tensors["random.cpu"])

    def _take_over(self, tensors: dict[str, Tensor], checkpoint: Checkpoint) -> None:
        if checkpoint.has_same_batch:
            batches = part_of(tensors, "batches.")
            self.batches.load_state_dict({name: local_part(value) for name, value in batches.items()})
        self.trained.load_state_dict(part_of(tensors, "trained."))
        if self.average is not None:
            self.average.load_state_dict(part_of(tensors, "ema."))
        _load_optimizer_tensors(self.optimizer, part_of(tensors, "optimizer."))
        self.losses = part_of(tensors, "run.")["losses"].tolist()
        self._set_lr()
        self._random = part_of(tensors, "random.")

    def restore_random(self) -> None:
        """Set the global generators as the checkpoint has them, where one was loaded; what draws before that is not the run's."""
        if self._random:
            _load_random_tensors(self._random)
            self._random = {}

    def _room_without_batches(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        return None if name.startswith("batches.") else self._room_for(name, shape, dtype)

    def _room_for(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Allocate memory for a saved tensor, sharded as the tensor is that it will be loaded into."""
        part, rest = name.split(".", 1)
        like = None
        if part in ("trained", "ema"):
            weights = dict(self.trained.named_parameters()) if part == "trained" else self.average.weights
            like = weights.get(rest)
        elif part == "optimizer":
            like = _parameters_of(self.optimizer)[int(rest.split(".", 1)[0])]
        if like is not None and like.shape == shape:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
        if part == "batches" and len(shape):
            return self.processes.empty_rows(shape, dtype)
        return torch.empty(shape, dtype=dtype)

    def _set_lr(self) -> None:
        """Set the learning rate of this step. It follows from the step alone, so a longer run may have another schedule."""
        scheduler = self.lr_scheduler
        lrs = [base * factor(self.step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict(
            scheduler.state_dict() | {"last_epoch": self.step, "_step_count": self.step + 1, "_last_lr": lrs}
        )
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr


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


def _check_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Refuse a state that the optimiser's next step could not do with: every parameter that has one has all of it."""
    parameters, names = _parameters_of(optimizer), defaultdict(set)
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        if not number.isdecimal():
            raise ValueError(f"optimizer.{key} is of no parameter")
        names[int(number)].add(name)
        if name in _MOMENTS and value.shape != parameters[int(number)].shape:
            raise ValueError(f"optimizer.{key} has the shape {tuple(value.shape)}")
    first = 0
    for part in optimizer.parts if isinstance(optimizer, CombinedOptimizer) else [optimizer]:
        numbers = range(first, first + len(_parameters_of(part)))
        of_part = [names[number] for number in numbers if number in names]
        # bitsandbytes keeps more of large parameters than of small ones; torch's own optimisers have one form.
        needed = next((tensors for kind, tensors in _STATE_OF.items() if isinstance(part, kind)), None)
        # A block's matrix, of which Muon has one tensor, gets a gradient at every step.
        is_whole = len(of_part) == len(numbers) or not isinstance(part, torch.optim.Muon)
        if not of_part or not is_whole or (needed and any(found != needed for found in of_part)):
            raise ValueError("the optimiser's state lacks tensors, or has others")
        first += len(numbers)


def _load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = _parameters_of(optimizer)
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        is_number = value.ndim == 0 and not value.is_floating_point()
        optimizer.state[parameter][name] = int(value) if is_number else value.to(parameter.device)


def _random_tensors() -> dict[str, Tensor]:
    """Return the states of the global generators. A step draws from none of them (walk/draws.py)."""
    gpu = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | gpu


def _load_random_tensors(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
