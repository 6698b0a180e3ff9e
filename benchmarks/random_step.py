"""How long a step takes on a device: measured with random weights at the true widths, before any weight is read.

All blocks are alike, so models of a few blocks are measured, and their times scaled by FLOPs (updates by parameters).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.benchmark import Timer

from wandistiller.budget.workload import Workload, flops_per_sample, step_flops
from wandistiller.device import DTYPES, autocast
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.sizes import sides, unfilled_model
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.training.optimizer import OptimizationOptions, WeightAverage, make_optimizer

ASSUMED_UTILISATION = 0.4  # of the rate of plain matrix products, for a step that is not measured
MEASURED_DEPTH = 4  # blocks
MOST_S, LEAST_S = 10.0, 0.2  # the longest step that is measured, and the time that short work is repeated for
WEIGHT_STD = 0.02  # random weights of this size overflow nowhere


@dataclass(frozen=True)
class StepTime:
    """Seconds of one process: for a batch that the teacher answers, one that the student learns from, and an update."""

    answer_s: float
    learn_s: float
    update_s: float
    total_s: float  # of an optimizer step


def measure_step(workload: Workload, device: str, flops_per_s: float) -> StepTime | None:
    """Measure a step without traffic between processes or swaps of experts; None where that would take long.

    Args:
        flops_per_s: the rate of plain matrix products on the device.

    Raises:
        torch.OutOfMemoryError: the device has no room for it.
    """
    shallow = [
        model.replace(depth=min(MEASURED_DEPTH, model.depth), distillation=None)
        for model in (workload.teacher, workload.student)
    ]
    few = replace(workload, teacher=shallow[0], student=shallow[1], grad_accum_steps=1, calls_per_step=1.0)
    few = replace(few, guided_fraction=float(few.guided_fraction > 0))
    # Six steps: one to warm up, one to choose how often to repeat, four that count.
    if 6 * step_flops(few).total > MOST_S * ASSUMED_UTILISATION * flops_per_s:
        return None
    step, whole, measured = RandomStep(few, device), flops_per_sample(workload), flops_per_sample(few)
    answer = seconds_of(step.answer) * whole[0] / measured[0]
    learn = seconds_of(step.learn) * whole[1] / measured[1]
    update = seconds_of(step.update) * workload.student.num_parameters / few.student.num_parameters
    total = workload.grad_accum_steps * (workload.calls_per_step * answer + learn) + update
    return StepTime(answer, learn, update, total)


class RandomStep:
    """The parts of a training step of this shape, on random weights and inputs; no hidden states, no training states."""

    def __init__(self, workload: Workload, device: str):
        dtype, config = DTYPES[workload.dtype], workload.teacher
        teacher = random_model(config, device, DTYPES.get(workload.teacher_dtype, dtype)).requires_grad_(False).eval()
        self.teacher = to_fp8(teacher) if workload.teacher_dtype == "fp8" else teacher
        self.student = random_model(workload.student, device, torch.float32).train()
        self.student.gradient_checkpointing = workload.gradient_checkpointing
        self._ask, self._predict = (autocast(model, device, dtype) for model in (self.teacher, self.student))
        options = OptimizationOptions(lr=1e-6, optimizer=workload.optimizer)
        self._optimizer = make_optimizer(self.student, options, device, dtype)
        self._average = WeightAverage(self.student, 0.999) if workload.ema else None
        self._inputs, self._negative = _random_inputs(workload, device), None
        if workload.guided_fraction:
            self._negative = torch.randn(workload.negative_text_tokens, config.text_encoder_output_dim, device=device)

    @torch.no_grad()
    def answer(self) -> torch.Tensor:
        return self._ask(*self._inputs, self._negative)

    def learn(self) -> None:
        self.student.zero_grad()
        self._predict(*self._inputs).float().square().mean().backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self._optimizer.step()
        if self._average is not None:
            self._average.update()


def random_model(config: StudentConfig, device: str, dtype: torch.dtype) -> WanLiteStudent:
    """Return a model of this shape with small random weights, kept as `project_teacher` keeps a teacher's."""
    model = unfilled_model(config, dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, WEIGHT_STD)
    return model


def _random_inputs(workload: Workload, device: str) -> tuple[torch.Tensor, ...]:
    """Return latents, timesteps, text of a batch and its lengths."""
    count, config = workload.batch_size, workload.student
    text = min(workload.text_tokens - 1, config.text_max_length)  # the model adds the token that stands for the padding
    return (
        torch.randn(count, config.num_channels, *sides(workload.latent_size), device=device),
        torch.linspace(100.0, 1000.0, count, device=device),
        torch.randn(count, text, config.text_encoder_output_dim, device=device),
        torch.full((count,), text, device=device),
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Return the median time of a call, after one that pays for libraries and memory."""
    work()
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())  # it waits for a GPU
    return timer.adaptive_autorange(min_run_time=LEAST_S, max_run_time=MOST_S / 4).median
