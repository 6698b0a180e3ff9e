"""The distillation loop: states, the teacher's answer, the student's answer, one optimiser step."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wandistiller.flow import sigma_to_timestep
from wandistiller.prompt_embeds import PromptEmbeds
from wandistiller.reporting import StepMetrics, Stopwatch
from wandistiller.states import StateBatch
from wandistiller.student import WanLiteStudent
from wandistiller.teacher import Teacher


class NonFiniteError(RuntimeError):
    """Loss or gradient stopped being a number; the message says at which step and why that happens."""

    exit_code = 1


class States(Protocol):
    def draw(self) -> StateBatch: ...
    def advance(self, batch: StateBatch, velocity: Tensor) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How the student is trained; `compute_dtype` is that of the student's matrix products, its weights stay float32."""

    batch_size: int
    num_steps: int
    lr: float
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
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
    teacher: Teacher,
    states: States,
    prompt_embeds: PromptEmbeds,
    options: TrainingOptions,
    on_step: Callable[[StepMetrics], None],
) -> TrainingResult:
    """Train `student` in place on the teacher's guided velocity.

    Raises:
        NonFiniteError: loss or gradient is not finite (the weights are those of the step before), or the last step broke
            the weights.
    """
    optimizer = make_optimizer(student, options)
    stopwatch = Stopwatch(options.num_steps)
    losses: list[float] = []
    student.train()
    with StopRequest().watching() as stop:
        for step in range(1, options.num_steps + 1):
            batch = states.draw()
            loss, velocity_teacher = distillation_loss(student, teacher, batch, prompt_embeds, options)
            states.advance(batch, velocity_teacher)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), options.max_grad_norm)
            # note: CPU-GPU sync point, the only one of a step
            loss_value, grad_norm_value = torch.stack([loss.detach(), grad_norm]).tolist()
            check_finite(step, batch.sigma, loss_value, grad_norm_value, options)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            losses.append(loss_value)
            on_step(
                StepMetrics(step, loss_value, grad_norm_value, options.lr, *stopwatch.lap(step, len(batch.prompts)))
            )
            if stop.requested:
                break
    check_weights(student, len(losses), options)
    student.eval()
    return TrainingResult(len(losses), losses, stop.requested)


def make_optimizer(student: WanLiteStudent, options: TrainingOptions) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        student.parameters(),
        lr=options.lr,
        betas=options.betas,
        weight_decay=options.weight_decay,
        fused=torch.device(options.device).type == "cuda",
    )


def distillation_loss(
    student: WanLiteStudent, teacher: Teacher, batch: StateBatch, prompt_embeds: PromptEmbeds, options: TrainingOptions
) -> tuple[Tensor, Tensor]:
    """Mean squared error between the two velocities at a batch of states, and the teacher's velocity (B, C, H, W)."""
    noisy_latents = batch.latents.to(options.device, non_blocking=True)
    embeds, lengths = prompt_embeds.batch(batch.prompts, options.device, torch.float32)
    velocity_teacher = _autocast(teacher.velocity, options)(noisy_latents, batch.sigma, embeds, lengths)
    timestep = sigma_to_timestep(batch.sigma).to(options.device)
    velocity_student = _autocast(student, options)(noisy_latents, timestep, embeds, lengths)
    return F.mse_loss(velocity_student.float(), velocity_teacher.float()), velocity_teacher


def _autocast(function: Callable[..., Tensor], options: TrainingOptions) -> Callable[..., Tensor]:
    """Matrix products in the compute dtype over float32 weights; a no-op in float32."""
    device_type = torch.device(options.device).type
    return torch.autocast(device_type, options.compute_dtype, enabled=options.compute_dtype != torch.float32)(function)


def check_finite(step: int, sigma: Tensor, loss: float, grad_norm: float, options: TrainingOptions) -> None:
    """Stop before a broken step reaches the weights."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm} (loss {loss:.4g})"
    raise NonFiniteError(
        f"step {step}: {what}, at sigma {sigma.min():.3f} to {sigma.max():.3f}, lr {options.lr:g}. Likely causes: "
        f"the learning rate is too high (try --lr {options.lr / 10:g}); the teacher's weights or the prompt embeddings "
        "hold values that are not finite; --dtype bf16 overflows (try --dtype fp32). This step was not applied."
    )


def check_weights(student: WanLiteStudent, step: int, options: TrainingOptions) -> None:
    """The last step has no loss after it that would show a weight that is no longer a number."""
    broken = [name for name, parameter in student.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise NonFiniteError(
            f"step {step}: {len(broken)} of the student's weights are not finite after it, the first is {broken[0]}; "
            f"lr {options.lr:g} or weight_decay {options.weight_decay:g} is too high"
        )
