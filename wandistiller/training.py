"""The distillation loop: the teacher's answer, the student's answer, one optimiser step."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wandistiller.answers import Answers
from wandistiller.checkpointing import Checkpoint, Checkpoints
from wandistiller.objective import Objective
from wandistiller.optimization import OptimizationOptions
from wandistiller.prompt_embeds import PromptEmbeds
from wandistiller.reporting import StepMetrics, Stopwatch, mean_by_expert, mean_by_sigma
from wandistiller.run_state import RunState
from wandistiller.student import WanLiteStudent


class NonFiniteError(RuntimeError):
    """Loss or gradient stopped being a number; the message says at which step and why that happens."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long the student is trained, and how its weights move.

    Attributes:
        eval_every: steps between measurements on held-out states; 0 is none.
        save_every: steps between checkpoints; 0 is none, not even at the end.
        boundary: noise level between the teacher's two experts, by which losses are reported.
    """

    batch_size: int
    num_steps: int
    optimization: OptimizationOptions
    eval_every: int = 0
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

    def __init__(self):
        self.requested = False

    def _on_signal(self, signum: int, frame: object) -> None:
        if self.requested:
            raise SystemExit(130)
        self.requested = True

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
) -> TrainingResult:
    """Train `student` in place on the teacher's guided velocity; with EMA it ends as the average of its weights.

    Args:
        evaluate: measures the student (its average, where there is one) every `options.eval_every` steps and at the last.
        checkpoints: where the run is saved every `options.save_every` steps, at the last and when it is stopped.
        resume_from: the state the run goes on from.

    Raises:
        NonFiniteError: loss or gradient is not finite (the weights are those of the step before), or the last step broke
            the weights.
        CheckpointError: a checkpoint could not be written; those before it are good.
    """
    state = RunState(student, answers, objective, options.optimization, options.num_steps, options.device)
    if resume_from is not None:
        state.load(resume_from.tensors)
    stopwatch = Stopwatch(options.num_steps, state.step)
    student.train()
    with StopRequest().watching() as stop:
        for step in range(state.step + 1, options.num_steps + 1):
            progress = (step - 1) / options.num_steps
            answer = answers.next()
            loss = objective(student, answer, prompt_embeds, progress)
            loss.total.backward()
            grad_norm = nn.utils.clip_grad_norm_(state.trained.parameters(), options.optimization.max_grad_norm)
            # note: CPU-GPU sync point, the only one of a step
            loss_value, feature_loss, grad_norm_value, *by_sample = torch.cat(
                [torch.stack([loss.velocity, loss.features, grad_norm]), loss.by_sample]
            ).tolist()
            check_finite(step, answer.sigma, loss_value + feature_loss, grad_norm_value, options)
            lr = state.lr
            state.update(loss_value)
            answers.advance(answer, loss.student_velocity, progress)

            is_last = step == options.num_steps
            sigmas, boundary = answer.sigma.tolist(), options.boundary
            velocity_error = None
            if evaluate is not None and not stop.requested and is_due(step, options.eval_every, is_last):
                velocity_error = evaluate(state.averaged)
            on_step(
                StepMetrics(
                    step,
                    loss_value,
                    grad_norm_value,
                    lr,
                    *stopwatch.lap(step, len(answer.prompts)),
                    teacher_calls=answers.num_calls,
                    loss_by_sigma=mean_by_sigma(sigmas, by_sample),
                    loss_by_expert=None if boundary is None else mean_by_expert(sigmas, by_sample, boundary),
                    feature_loss=feature_loss if answer.features else None,
                    velocity_error=velocity_error,
                )
            )
            if checkpoints is not None and is_due(step, options.save_every, is_last or stop.requested):
                check_weights(student, step, options)  # what is saved must be worth going on from
                checkpoints.save(step, state.tensors())
            if stop.requested:
                break
    check_weights(student, state.step, options)
    if state.ema is not None:
        student.load_state_dict(state.averaged.state_dict())
    student.eval()
    return TrainingResult(state.step, state.losses, stop.requested)


def is_due(step: int, every: int, is_last: bool) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens now; never where `every` is 0."""
    return every > 0 and (step % every == 0 or is_last)


def check_finite(step: int, sigma: Tensor, loss: float, grad_norm: float, options: TrainingOptions) -> None:
    """Stop before a broken step reaches the weights."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    lr = options.optimization.lr
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm} (loss {loss:.4g})"
    raise NonFiniteError(
        f"step {step}: {what}, at sigma {sigma.min():.3f} to {sigma.max():.3f}, lr {lr:g}. Likely causes: "
        f"the learning rate is too high (try --lr {lr / 10:g}); the teacher's weights or the prompt embeddings "
        "hold values that are not finite; --dtype bf16 overflows (try --dtype fp32). This step was not applied."
    )


def check_weights(student: WanLiteStudent, step: int, options: TrainingOptions) -> None:
    """The last step has no loss after it that would show a weight that is no longer a number."""
    broken = [name for name, parameter in student.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise NonFiniteError(
            f"step {step}: {len(broken)} of the student's weights are not finite after it, the first is {broken[0]}; "
            f"lr {options.optimization.lr:g} or weight_decay {options.optimization.weight_decay:g} is too high"
        )
