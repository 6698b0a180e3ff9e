"""The distillation loop: the teacher's answer, the student's answer, one optimiser step."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wandistiller.answers import Answer, autocast
from wandistiller.flow import sigma_to_timestep
from wandistiller.optimization import OptimizationOptions, make_ema, make_lr_scheduler, make_optimizer
from wandistiller.prompt_embeds import PromptEmbeds
from wandistiller.reporting import StepMetrics, Stopwatch
from wandistiller.student import WanLiteStudent


class NonFiniteError(RuntimeError):
    """Loss or gradient stopped being a number; the message says at which step and why that happens."""

    exit_code = 1


class Answers(Protocol):
    def next(self) -> Answer: ...


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the student is trained; `compute_dtype` is that of the student's matrix products, its weights stay float32."""

    batch_size: int
    num_steps: int
    optimization: OptimizationOptions
    compute_dtype: torch.dtype = torch.float32
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
    options: TrainingOptions,
    on_step: Callable[[StepMetrics], None],
) -> TrainingResult:
    """Train `student` in place on the teacher's guided velocity; with EMA it ends as the average of its weights.

    Raises:
        NonFiniteError: loss or gradient is not finite (the weights are those of the step before), or the last step broke
            the weights.
    """
    optimizer = make_optimizer(student, options.optimization, options.device)
    lr_scheduler = make_lr_scheduler(optimizer, options.optimization, options.num_steps)
    ema = make_ema(student, options.optimization.ema_decay)
    stopwatch = Stopwatch(options.num_steps)
    losses: list[float] = []
    student.train()
    with StopRequest().watching() as stop:
        for step in range(1, options.num_steps + 1):
            answer = answers.next()
            loss = distillation_loss(student, answer, prompt_embeds, options)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), options.optimization.max_grad_norm)
            # note: CPU-GPU sync point, the only one of a step
            loss_value, grad_norm_value = torch.stack([loss.detach(), grad_norm]).tolist()
            check_finite(step, answer.sigma, loss_value, grad_norm_value, options)
            lr = lr_scheduler.get_last_lr()[0]
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.update_parameters(student)

            losses.append(loss_value)
            on_step(StepMetrics(step, loss_value, grad_norm_value, lr, *stopwatch.lap(step, len(answer.prompts))))
            if stop.requested:
                break
    check_weights(student, len(losses), options)
    if ema is not None:
        student.load_state_dict(ema.module.state_dict())
    student.eval()
    return TrainingResult(len(losses), losses, stop.requested)


def distillation_loss(
    student: WanLiteStudent, answer: Answer, prompt_embeds: PromptEmbeds, options: TrainingOptions
) -> Tensor:
    """Mean squared error between the two velocities at a batch of states."""
    embeds, lengths = prompt_embeds.batch(answer.prompts, options.device, torch.float32)
    timestep = sigma_to_timestep(answer.sigma).to(options.device)
    velocity = autocast(student, options.device, options.compute_dtype)(answer.latents, timestep, embeds, lengths)
    return F.mse_loss(velocity.float(), answer.velocity.float())


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
