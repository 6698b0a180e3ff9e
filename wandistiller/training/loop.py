"""The distillation loop: a batch of the teacher's answers, the student's answers, one optimizer step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wandistiller.device import peak_memory_bytes, to_device
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, full_tensor, local_part, without_averaging
from wandistiller.step_metrics import StepMetrics, Stopwatch, mean_by_sigma
from wandistiller.training.checkpoints import Checkpoints
from wandistiller.training.objective import Loss
from wandistiller.training.state import RunState, TrainingOptions
from wandistiller.training.stop import StopRequest
from wandistiller.walk.batches import Batch


class NonFiniteError(RuntimeError):
    """Loss or gradient is no longer a number; the message names the step and the likely causes."""

    exit_code = 1


FIRST_SAMPLE = 25  # the step of the first picture


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


def train(state: RunState, observer: Observer | None = None, checkpoints: Checkpoints | None = None) -> TrainingResult:
    """Train the student of `state` in place, from the step that it is at; with EMA it ends as the average of its weights.

    Args:
        observer: what is told of every step, and measures and draws with the student (its average, where there is one).
        checkpoints: where the run is saved every `save_every` steps, at the last and when it is stopped.

    Raises:
        NonFiniteError: loss or gradient is not finite (the weights are those of the step before), or the last step broke
            the weights.
        CheckpointError: a checkpoint could not be written; those before it are good.
    """
    loop = _Loop(state, observer or Observer(), checkpoints)
    with StopRequest(is_repeated=state.processes.are_many).watching() as stop:
        is_stopped = loop.run(stop)
    check_weights(state)
    state.swap()  # it ends as the average of its weights
    state.trained.student.eval()
    return TrainingResult(state.step, state.losses, is_stopped)


class _Loop:
    """The steps of a run: learn, check, update; then measure, tell, save and draw where that is due."""

    def __init__(self, state: RunState, observer: Observer, checkpoints: Checkpoints | None):
        self.state, self.observer, self.checkpoints = state, observer, checkpoints
        self.options, self.batches, self.processes = state.options, state.batches, state.processes
        # The maps of the feature loss get no gradient from a batch without hidden states.
        self.model = self.processes.averaging(state.trained, state.trained.feature_loss is not None)
        self.stopwatch = Stopwatch(self.options.num_steps, state.step)

    def run(self, stop: StopRequest) -> bool:
        """Take the steps that are left; return whether a request to stop ended them early."""
        for step in range(self.state.step + 1, self.options.num_steps + 1):
            lr, is_last = self.state.lr, step == self.options.num_steps
            found = self._take_step(step, stop)
            is_stopped = self._is_asked_to_stop(found, stop)
            held_out = None if is_stopped else self._evaluate(step, is_last)
            with stop.unless_unread():
                self.observer.step(self._metrics(step, found, lr, held_out))
            is_stopped = self._is_asked_to_stop(found, stop)
            self._save(step, is_last or is_stopped)
            if is_stopped:
                return True
            with stop.unless_unread():
                self._draw(step, is_last)
        return False

    def _take_step(self, step: int, stop: StopRequest) -> "_Measured":
        own_step, count = step - 1 - self.state.first_step, self.batches.num_micro_batches
        progress = own_step / (self.options.num_steps - self.state.first_step)
        sigmas, losses, has_features = [], [], False
        for number, batch in enumerate(self.batches.of_step(own_step), start=1):
            losses.append(self._learn(batch, progress, number == count))
            sigmas.append(batch.sigma)
            has_features = bool(batch.features)
            del batch  # its text and hidden states may be gigabytes
        parameters = self.state.trained.parameters()
        grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, self.options.optimization.max_grad_norm))
        # A checkpoint that could not be written ends the run; `_save` tells of it.
        has_failed = self.checkpoints is not None and self.checkpoints.has_failed
        found = _measure(torch.cat(sigmas), losses, grad_norm, stop.requested or has_failed, self.processes)
        try:
            check_finite(step, found.sigmas, found.loss + (found.feature_loss or 0.0), found.grad_norm, self.options)
        except NonFiniteError as error:
            if self.checkpoints is not None:
                self.checkpoints.finish()
                if (last := self.checkpoints.last_good) is not None:
                    error.args = (f"{error} The newest good checkpoint is step {last}.",)
            raise
        self.state.update(found.loss)
        return found if has_features else replace(found, feature_loss=None)

    def _learn(self, batch: Batch, progress: float, is_last: bool) -> Loss:
        """Add the gradients of a micro-batch; the last one's are averaged over the processes, with those of all before."""
        with without_averaging(self.model, not is_last):
            loss = self.model(batch, progress)
            (loss.total / self.batches.num_micro_batches).backward()
        return replace(loss, total=loss.total.detach())

    def _is_asked_to_stop(self, found: "_Measured", stop: StopRequest) -> bool:
        """Return whether to stop here; many processes agree on a request that has just come in the step after it."""
        return found.is_stopped or (stop.requested and not self.processes.are_many)

    def _evaluate(self, step: int, is_last: bool) -> dict[str, float] | None:
        if not is_due(step, self.options.eval_every, is_last):
            return None
        with self.state.averaged() as averaged:
            return self.observer.evaluate(averaged, self.options.stage)

    def _metrics(self, step: int, found: "_Measured", lr: float, held_out: dict[str, float] | None) -> StepMetrics:
        return StepMetrics(
            step,
            found.loss,
            found.grad_norm,
            lr,
            *self.stopwatch.lap(step, len(found.sigmas)),
            teacher_calls=self.state.teacher_calls,
            loss_by_sigma=mean_by_sigma(found.sigmas, found.by_sample),
            stage=self.options.stage,
            feature_loss=found.feature_loss,
            held_out=held_out,
            memory_bytes=peak_memory_bytes(self.processes.device),
        )

    def _save(self, step: int, is_last: bool) -> None:
        if self.checkpoints is None or not is_due(step, self.options.save_every, is_last):
            return
        check_weights(self.state)  # a broken state must not become a checkpoint
        self.checkpoints.save(step, self.state.tensors(), first_step=self.state.first_step)
        if is_last:
            self.checkpoints.finish()

    def _draw(self, step: int, is_last: bool) -> None:
        every = self.options.sample_every
        if is_last or not (is_due(step, every, is_last) or is_early(step, every)):
            return
        with self.state.averaged() as averaged:
            self.observer.draw(averaged, step)


@dataclass(frozen=True)
class _Measured:
    """What a step shows, the same in every process; sigmas and squared errors are those of all samples."""

    loss: float
    feature_loss: float | None
    grad_norm: float
    is_stopped: bool
    sigmas: list[float]
    by_sample: list[float]


def _measure(
    sigma: Tensor, losses: Sequence[Loss], grad_norm: Tensor, is_stopped: bool, processes: Processes
) -> _Measured:
    """Gather the losses over all micro-batches and processes; one process's request to stop is everyone's."""
    by_sample = torch.cat([loss.by_sample for loss in losses])
    sigma = to_device(sigma, by_sample.device)
    features = torch.stack([loss.features for loss in losses]).mean()
    own = torch.stack([by_sample.mean(), features, features.new_full((), float(is_stopped))])
    head = processes.gathered(own[None]).mean(dim=0)
    samples = processes.gathered(torch.stack([sigma.to(by_sample), by_sample], dim=1))
    # note: CPU-GPU sync point, the only one of a step
    loss, feature_loss, stops, norm, *rest = torch.cat([head, grad_norm.to(head)[None], samples.flatten()]).tolist()
    stops_now = is_stopped or (processes.are_many and stops > 0)
    return _Measured(loss, feature_loss, norm, stops_now, rest[0::2], rest[1::2])


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


def check_weights(state: RunState) -> None:
    """Refuse weights that are no longer numbers, which after the last step no loss would show; all processes agree on it."""
    named = state.trained.student.named_parameters()
    broken = [name for name, weight in named if not local_part(weight).isfinite().all()]
    if state.processes.any_true(bool(broken)):
        what = f"{len(broken)} of the student's weights, the first is {broken[0]}" if broken else "some weights"
        own = state.options.optimization
        raise NonFiniteError(
            f"step {state.step}: {what}, are not finite after it; lr {own.lr:g} or weight_decay {own.weight_decay:g} is too high"
        )
