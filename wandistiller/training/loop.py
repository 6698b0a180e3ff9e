"""The distillation loop: a batch of the teacher's answers, the student's answers, one optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wandistiller.device import peak_memory_bytes, to_device
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, full_tensor, local_part, without_averaging
from wandistiller.step_metrics import StepMetrics, Stopwatch, mean_by_sigma
from wandistiller.training.checkpoints import Checkpoints
from wandistiller.training.objective import Loss, Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import RunState
from wandistiller.training.stop import StopRequest
from wandistiller.walk.batches import Batch, Batches


class NonFiniteError(RuntimeError):
    """Loss or gradient is no longer a number; the message names the step and the likely causes."""

    exit_code = 1


FIRST_SAMPLE = 25  # the step of the first picture


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long the student is trained, and how its weights move.

    Attributes:
        num_steps: the last step; steps are counted from 1.
        eval_every: steps between measurements on held-out states; 0 is none.
        sample_every: steps between sample pictures, the first of which come earlier (`is_early`); 0 is none.
        save_every: steps between checkpoints; 0 is none, not even at the end.
    """

    batch_size: int
    num_steps: int
    optimization: OptimizationOptions
    eval_every: int = 0
    sample_every: int = 0
    save_every: int = 0
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class TrainingResult:
    num_steps: int
    losses: list[float]
    interrupted: bool


def steps_of_epochs(num_epochs: int, num_prompts: int, batch_size: int) -> int:
    """Count optimiser steps: an epoch is ceil(prompts / batch) of them, and its last batch holds what is left."""
    return num_epochs * math.ceil(num_prompts / batch_size)


class Observer:
    """Whoever watches a run. This one asks for nothing; a subclass overrides what it wants to be told of."""

    def step(self, metrics: StepMetrics) -> None:
        """Take note of a step that was taken."""

    def evaluate(self, student: WanLiteStudent, stage: int) -> dict[str, float] | None:
        """Measure the student, every `options.eval_every` steps and at the last of a stage; return what was found by name."""
        return None

    def draw(self, student: WanLiteStudent, step: int) -> None:
        """Draw with the student, every `options.sample_every` steps and at early ones, but not at the last, after which it is there to be drawn with."""


@dataclass(frozen=True)
class Saving:
    """Where a run is saved, and the state of the same student and batches that it resumes from; without either neither is done."""

    checkpoints: Checkpoints | None = None
    state: RunState | None = None


def train(
    student: WanLiteStudent,
    batches: Batches,
    objective: Objective,
    options: TrainingOptions,
    observer: Observer | None = None,
    saving: Saving | None = None,
    processes: Processes | None = None,
) -> TrainingResult:
    """Train `student` in place on the teacher's guided velocity; with EMA it ends as the average of its weights.

    Args:
        observer: what is told of every step, and measures and draws with the student (its average, where there is one).
        saving: where the run is saved every `options.save_every` steps, at the last and when it is stopped, and the state it
            resumes from.
        processes: those that train together, each on its part of every batch; this one alone by default.

    Raises:
        NonFiniteError: loss or gradient is not finite (the weights are those of the step before), or the last step broke
            the weights.
        CheckpointError: a checkpoint could not be written; those before it are good.
    """
    processes, saving = processes or Processes(options.device), saving or Saving()
    trained = TrainedStudent(student, objective) if saving.state is None else saving.state.trained
    loop = _Loop(trained, batches, options, observer or Observer(), saving, processes)
    student.train()
    with StopRequest(is_repeated=processes.are_many).watching() as stop:
        is_stopped = loop.run(stop)
    check_weights(student, loop.state.step, options, processes)
    loop.state.finish()
    student.eval()
    return TrainingResult(loop.state.step, loop.state.losses, is_stopped)


class _Loop:
    """The steps of a run: learn, check, update; then measure, tell, save and draw where that is due."""

    def __init__(
        self,
        trained: TrainedStudent,
        batches: Batches,
        options: TrainingOptions,
        observer: Observer,
        saving: Saving,
        processes: Processes,
    ):
        self.student, self.batches, self.options = trained.student, batches, options
        self.observer, self.checkpoints, self.processes = observer, saving.checkpoints, processes
        self.model = processes.averaging(trained, trained.has_idle_parts)
        self.state = saving.state or RunState(trained, batches, options.optimization, options.num_steps, processes)
        self.stopwatch = Stopwatch(options.num_steps, self.state.step)

    def run(self, stop: StopRequest) -> bool:
        """Take the steps that are left; return whether a request to stop ended them early."""
        for step in range(self.state.step + 1, self.options.num_steps + 1):
            lr, is_last = self.state.lr, step == self.options.num_steps
            found = self._take_step(step, stop)
            is_stopped = self._is_asked_to_stop(found, stop)
            measured = {} if is_stopped else self._evaluate(step, is_last)
            with stop.unless_unread():
                self.observer.step(self._metrics(step, found, lr, measured))
            is_stopped = self._is_asked_to_stop(found, stop)
            self._save(step, is_last or is_stopped)
            if is_stopped:
                return True
            with stop.unless_unread():
                self._draw(step, is_last)
        return False

    def _take_step(self, step: int, stop: StopRequest) -> "_Measured":
        """Take one optimizer step on a global batch."""
        own_step, count = step - 1 - self.state.first_step, self.batches.num_micro_batches
        progress = own_step / (self.options.num_steps - self.state.first_step)
        passes = [
            self._learn(batch, progress, number == count)
            for number, batch in enumerate(self.batches.of_step(own_step), start=1)
        ]
        parameters = self.state.trained.parameters()
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, self.options.optimization.max_grad_norm))
        found = _measure(passes, grad_norm, stop.requested, self.processes)
        try:
            check_finite(step, found.sigmas, found.loss + found.feature_loss, found.grad_norm, self.options)
        except NonFiniteError as error:
            if self.checkpoints is not None and self.checkpoints.good:
                error.args = (f"{error} The newest good checkpoint is step {max(self.checkpoints.good)}.",)
            raise
        self.state.update(found.loss)
        return found

    def _learn(self, batch: Batch, progress: float, is_last: bool) -> "_Pass":
        """Add the gradients of a micro-batch; the last one's are averaged over the processes, with those of all before."""
        with without_averaging(self.model, not is_last):
            loss = self.model(batch, progress)
            (loss.total / self.batches.num_micro_batches).backward()
        return _Pass(batch.sigma, replace(loss, total=loss.total.detach()), bool(batch.features))

    def _is_asked_to_stop(self, found: "_Measured", stop: StopRequest) -> bool:
        """Return whether to stop here; many processes agree on a request that has just come in the step after it."""
        return found.is_stopped or (stop.requested and not self.processes.are_many)

    def _evaluate(self, step: int, is_last: bool) -> dict[str, Any]:
        """Return what was measured of the student, by its name in `StepMetrics`."""
        if not is_due(step, self.options.eval_every, is_last):
            return {}
        with self.state.averaged() as averaged:
            return {"held_out": self.observer.evaluate(averaged, self._stage)}

    @property
    def _stage(self) -> int:
        return 1 if self.state.frozen is None else 2

    def _metrics(self, step: int, found: "_Measured", lr: float, measured: dict[str, Any]) -> StepMetrics:
        return StepMetrics(
            step,
            found.loss,
            found.grad_norm,
            lr,
            *self.stopwatch.lap(step, len(found.sigmas)),
            teacher_calls=self.state.teacher_calls,
            loss_by_sigma=mean_by_sigma(found.sigmas, found.by_sample),
            stage=self._stage,
            feature_loss=found.feature_loss if found.has_features else None,
            memory_bytes=peak_memory_bytes(self.processes.device),
            **measured,
        )

    def _save(self, step: int, is_last: bool) -> None:
        if self.checkpoints is None or not is_due(step, self.options.save_every, is_last):
            return
        check_weights(self.student, step, self.options, self.processes)  # a broken state must not become a checkpoint
        self.checkpoints.save(step, self.state.tensors(), first_step=self.state.first_step)

    def _draw(self, step: int, is_last: bool) -> None:
        every = self.options.sample_every
        if is_last or not (is_due(step, every, is_last) or is_early(step, every)):
            return
        with self.state.averaged() as averaged:
            self.observer.draw(averaged, step)


@dataclass(frozen=True)
class _Pass:
    """One micro-batch that has been learnt from, without its text and hidden states, which may be gigabytes."""

    sigma: Tensor
    loss: Loss
    has_features: bool


@dataclass(frozen=True)
class _Measured:
    """What a step shows, the same in every process; sigmas and squared errors are those of all samples."""

    loss: float
    feature_loss: float
    has_features: bool
    grad_norm: float
    is_stopped: bool
    sigmas: list[float]
    by_sample: list[float]


def _measure(passes: list[_Pass], grad_norm: Tensor, is_stopped: bool, processes: Processes) -> _Measured:
    """Gather the losses over all passes and processes; one process's request to stop is everyone's."""
    losses = [taken.loss for taken in passes]
    by_sample = torch.cat([loss.by_sample for loss in losses])
    sigma = to_device(torch.cat([taken.sigma for taken in passes]), by_sample.device)
    means = [
        torch.stack(values).mean()
        for values in ([loss.velocity for loss in losses], [loss.features for loss in losses])
    ]
    own = torch.stack([*means, means[0].new_full((), float(is_stopped))])
    head = processes.gathered(own[None]).mean(dim=0)
    samples = processes.gathered(torch.stack([sigma.to(by_sample), by_sample], dim=1))
    # note: CPU-GPU sync point, the only one of a step
    velocity, features, stops, norm, *rest = torch.cat([head, grad_norm.to(head)[None], samples.flatten()]).tolist()
    stops_now = is_stopped or (processes.are_many and stops > 0)
    return _Measured(velocity, features, passes[0].has_features, norm, stops_now, rest[0::2], rest[1::2])


def is_due(step: int, every: int, is_last: bool) -> bool:
    """Return whether something that happens every so many steps, and at the last one, happens now; never where `every` is 0."""
    return every > 0 and (step % every == 0 or is_last)


def is_early(step: int, every: int) -> bool:
    """Return whether this is step 25, 50, 100, 200 and so on below `every`, where most can be seen of learning."""
    return step < every and step % FIRST_SAMPLE == 0 and (step // FIRST_SAMPLE).bit_count() == 1


def check_finite(step: int, sigmas: Sequence[float], loss: float, grad_norm: float, options: TrainingOptions) -> None:
    """Stop before a broken step reaches the weights."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    lr = options.optimization.lr
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm} (loss {loss:.4g})"
    raise NonFiniteError(
        f"step {step}: {what}, at sigma {min(sigmas):.3f} to {max(sigmas):.3f}, lr {lr:g}. Likely causes: "
        f"the learning rate is too high (try --lr {lr / 10:g}); the teacher's weights or the prompt embeddings "
        "hold values that are not finite; --dtype bf16 overflows (try --dtype fp32). This step was not applied."
    )


def check_weights(
    student: WanLiteStudent, step: int, options: TrainingOptions, processes: Processes | None = None
) -> None:
    """Refuse weights that are no longer numbers, which after the last step no loss would show; all processes agree on it."""
    broken = [name for name, parameter in student.named_parameters() if not local_part(parameter).isfinite().all()]
    if (processes or Processes(options.device)).any_true(bool(broken)):
        which = (
            f"{len(broken)} of the student's weights are not finite after it, the first is {broken[0]}"
            if broken
            else "some of the student's weights are not finite after it"
        )
        raise NonFiniteError(
            f"step {step}: {which}; "
            f"lr {options.optimization.lr:g} or weight_decay {options.optimization.weight_decay:g} is too high"
        )
