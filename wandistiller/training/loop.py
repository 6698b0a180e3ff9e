"""The distillation loop: the teacher's answer, the student's answer, one optimiser step."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wandistiller.device import peak_memory_bytes, to_device
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, full_tensor, local_part, without_averaging
from wandistiller.reports.metrics import StepMetrics, mean_by_expert, mean_by_sigma
from wandistiller.reports.progress import Stopwatch
from wandistiller.targets.answers import Answer, Answers
from wandistiller.training.checkpoints import Checkpoint, CheckpointError, Checkpoints
from wandistiller.training.objective import Loss, Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import RunState
from wandistiller.wan.prompt_embeds import PromptEmbeds

REPEATED_S = 2.0  # signals within it are one request, where a launcher passes them on


class NonFiniteError(RuntimeError):
    """Loss or gradient stopped being a number; the message says at which step and why that happens."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long the student is trained, and how its weights move.

    Attributes:
        eval_every: steps between measurements on held-out states; 0 is none.
        sample_every: steps between sample pictures; 0 is none.
        save_every: steps between checkpoints; 0 is none, not even at the end.
        boundary: noise level between the teacher's two experts, by which losses are reported.
    """

    batch_size: int
    num_steps: int
    optimization: OptimizationOptions
    eval_every: int = 0
    sample_every: int = 0
    save_every: int = 0
    boundary: float | None = None
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class TrainingResult:
    num_steps: int
    losses: list[float]
    interrupted: bool

    @property
    def average_loss(self) -> float:
        return sum(self.losses) / len(self.losses)


def steps_of_epochs(num_epochs: int, num_prompts: int, batch_size: int) -> int:
    """An epoch is ceil(prompts / batch) optimiser steps; its last batch holds what is left."""
    return num_epochs * math.ceil(num_prompts / batch_size)


class StopRequest:
    """SIGINT or SIGTERM asks the loop to stop after the step in hand; a second one ends the process at once."""

    def __init__(self, is_repeated: bool = False):
        self.requested_s: float | None = None
        self.is_repeated = is_repeated  # whether a launcher may pass on a signal that came by itself too

    @property
    def requested(self) -> bool:
        return self.requested_s is not None

    def _on_signal(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested_s is None:
            self.requested_s = now
        elif not self.is_repeated or now - self.requested_s > REPEATED_S:
            # Not by an exception, which a library that is writing a checkpoint may take for a failure of its own:
            os._exit(130)

    @contextlib.contextmanager
    def watching(self) -> Iterator["StopRequest"]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(
    student: WanLiteStudent,
    answers: Answers,
    prompt_embeds: PromptEmbeds,
    objective: Objective,
    options: TrainingOptions,
    on_step: Callable[[StepMetrics], None],
    evaluate: Callable[[WanLiteStudent], dict[str, float]] | None = None,
    checkpoints: Checkpoints | None = None,
    resume_from: Checkpoint | None = None,
    processes: Processes | None = None,
    draw: Callable[[WanLiteStudent, int], object] | None = None,
) -> TrainingResult:
    """Train `student` in place on the teacher's guided velocity; with EMA it ends as the average of its weights.

    Args:
        evaluate: measures the student (its average, where there is one) every `options.eval_every` steps and at the last.
        checkpoints: where the run is saved every `options.save_every` steps, at the last and when it is stopped.
        resume_from: the state the run goes on from.
        processes: those that train together, each on its part of every batch; this one alone by default.
        draw: draws with the student (its average, where there is one) every `options.sample_every` steps, but not at the
            last, after which the student is there to be drawn with.

    Raises:
        NonFiniteError: loss or gradient is not finite (the weights are those of the step before), or the last step broke
            the weights.
        CheckpointError: a checkpoint could not be written; those before it are good.
    """
    processes = processes or Processes(options.device)
    trained = TrainedStudent(student, objective)
    model = processes.averaging(trained, trained.has_idle_parts)
    state = RunState(trained, answers, options.optimization, options.num_steps, processes)
    if resume_from is not None:
        state.load(resume_from)
    stopwatch = Stopwatch(options.num_steps, state.step)
    is_stopped = False
    student.train()
    with StopRequest(is_repeated=processes.are_many).watching() as stop:
        for step in range(state.step + 1, options.num_steps + 1):
            progress = (step - 1) / options.num_steps
            num_passes = answers.lanes.num_micro_batches
            passes = [_learn(model, answers, progress, number == num_passes) for number in range(1, num_passes + 1)]
            grad_norm = full_tensor(nn.utils.clip_grad_norm_(trained.parameters(), options.optimization.max_grad_norm))
            found = _measure(passes, grad_norm, stop.requested, processes)
            try:
                check_finite(step, found.sigmas, found.loss + found.feature_loss, found.grad_norm, options)
            except NonFiniteError as error:
                _save_last_good(checkpoints, state, options, error, processes)
                raise
            lr, is_last = state.lr, step == options.num_steps
            state.update(found.loss)
            for taken in passes:
                answers.advance(taken.answer, taken.loss.student_velocity, progress)

            velocity_error = None
            is_stopped = found.is_stopped or (stop.requested and not processes.are_many)
            if evaluate is not None and not is_stopped and is_due(step, options.eval_every, is_last):
                with state.averaged() as averaged:
                    velocity_error = evaluate(averaged)
            boundary = options.boundary
            on_step(
                StepMetrics(
                    step,
                    found.loss,
                    found.grad_norm,
                    lr,
                    *stopwatch.lap(step, len(found.sigmas)),
                    teacher_calls=answers.num_calls,
                    loss_by_sigma=mean_by_sigma(found.sigmas, found.by_sample),
                    loss_by_expert=None
                    if boundary is None
                    else mean_by_expert(found.sigmas, found.by_sample, boundary),
                    feature_loss=found.feature_loss if found.has_features else None,
                    velocity_error=velocity_error,
                    memory_bytes=peak_memory_bytes(processes.device),
                )
            )
            is_stopped = found.is_stopped or (stop.requested and not processes.are_many)  # many agree in the next step
            if checkpoints is not None and is_due(step, options.save_every, is_last or is_stopped):
                check_weights(student, step, options, processes)  # what is saved must be worth going on from
                checkpoints.save(step, state.tensors())
            if is_stopped:
                break
            if draw is not None and not is_last and is_due(step, options.sample_every, is_last):
                with state.averaged() as averaged:
                    draw(averaged, step)
    check_weights(student, state.step, options, processes)
    state.finish()
    student.eval()
    return TrainingResult(state.step, state.losses, is_stopped)


@dataclass(frozen=True)
class _Pass:
    """One micro-batch that has been learnt from."""

    answer: Answer
    loss: Loss
    has_features: bool


@dataclass(frozen=True)
class _Measured:
    """What a step shows, the same in every process; sigmas and squared errors are those of all samples that count."""

    loss: float
    feature_loss: float
    has_features: bool
    grad_norm: float
    is_stopped: bool
    sigmas: list[float]
    by_sample: list[float]


def _learn(model: nn.Module, answers: Answers, progress: float, is_last: bool) -> _Pass:
    """Add the gradients of a micro-batch; the last one's are averaged over the processes, with those of all before."""
    answer = answers.next()
    with without_averaging(model, not is_last):
        loss = model(answer, progress)
        (loss.total / answers.lanes.num_micro_batches).backward()
    return _Pass(answer.released(), replace(loss, total=loss.total.detach()), bool(answer.features))


def _measure(passes: list[_Pass], grad_norm: Tensor, is_stopped: bool, processes: Processes) -> _Measured:
    """Losses over all passes and processes; one process's request to stop is everyone's."""
    losses, answers = [taken.loss for taken in passes], [taken.answer for taken in passes]
    by_sample = torch.cat([loss.by_sample for loss in losses])
    sigma, weights = (torch.cat([getattr(answer, name) for answer in answers]) for name in ("sigma", "weights"))
    means = [
        sum(parts) / len(passes) for parts in ([loss.velocity for loss in losses], [loss.features for loss in losses])
    ]
    head = torch.stack([*means, means[0].new_full((), float(is_stopped))])
    samples = torch.stack([*(to_device(values, by_sample.device) for values in (sigma, weights)), by_sample], dim=1)
    everyones = processes.gathered(torch.cat([head[None], samples])[None])  # (processes, 1 + samples, 3)
    # note: CPU-GPU sync point, the only one of a step
    *table, norm = torch.cat([everyones.flatten(), grad_norm.to(everyones)[None]]).tolist()
    rows = [table[start : start + 3] for start in range(0, len(table), 3)]
    heads = rows[:: 1 + len(samples)]
    counted = [row for number, row in enumerate(rows) if number % (1 + len(samples)) and row[1] > 0]
    velocity, features, stops = (sum(column) / len(heads) for column in zip(*heads, strict=True))
    return _Measured(
        velocity,
        features,
        passes[0].has_features,
        norm,
        stops > 0,
        [row[0] for row in counted],
        [row[2] for row in counted],
    )


def _save_last_good(
    checkpoints: Checkpoints | None,
    state: RunState,
    options: TrainingOptions,
    error: NonFiniteError,
    processes: Processes,
) -> None:
    """Keep the weights that the failing step did not reach, unless they are broken themselves."""
    if checkpoints is None or not options.save_every or not state.step:
        return
    if state.step not in checkpoints.good:
        try:
            check_weights(state.trained.student, state.step, options, processes)
            # Without the training states: these have given their part to the step that failed.
            checkpoints.save(state.step, state.tensors(has_states=False), has_states=False)
        except NonFiniteError:
            return
        except CheckpointError as failure:
            error.args = (f"{error} The state before it could not be saved: {failure}",)
            return
    back = f"To go back further, remove what {checkpoints.folder} has of the newest steps."
    error.args = (f"{error} The state before it, step {state.step}, is saved. {back}",)


def is_due(step: int, every: int, is_last: bool) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens now; never where `every` is 0."""
    return every > 0 and (step % every == 0 or is_last)


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
    """The last step has no loss after it that would show a weight that is no longer a number; all processes agree on it."""
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
