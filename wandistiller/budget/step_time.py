"""How long a step takes on a device: measured with random weights at the true widths, before any weight is read.

Models of as many blocks as there is patience for do what the run's own would: the teacher answers a guided batch, the student
learns from it. Blocks are all alike: what is missing is worth the difference to a model of one block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.benchmark import Timer

from wandistiller.budget.workload import Workload, step_flops
from wandistiller.device import DTYPES, autocast
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.sizes import sides, unfilled_model
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.training.optimizer import OptimizationOptions, WeightAverage, make_optimizer

# A budget should come in seconds, so all measurements together may take about this long.
PATIENCE_S = 10.0
# Until a step is measured, it is assumed to reach this share of the rate of plain matrix products.
ASSUMED_UTILISATION = 0.4
# The timer takes about this many slow steps of each kind: one to warm up, one to choose how often to repeat, four that count.
LEAST_STEPS = 6
# Short steps are repeated until a measurement has taken this long.
LEAST_S = 0.15
# Random weights of this size overflow nowhere.
WEIGHT_STD = 0.02


@dataclass(frozen=True)
class StepTime:
    """What a process takes: for a batch that the teacher answers, for one that the student learns from, for an update.

    Attributes:
        depths: blocks of the teacher and of the student that were measured.
    """

    depths: tuple[int, int]
    answer_s: float
    learn_s: float
    update_s: float
    batches_per_step: int
    calls_per_step: float

    @property
    def total_s(self) -> float:
        """Seconds of an optimiser step."""
        return self.batches_per_step * (self.calls_per_step * self.answer_s + self.learn_s) + self.update_s


def measure_step(workload: Workload, device: str, flops_per_s: float) -> StepTime | None:
    """Measure a step of this workload, without what processes send each other and without moving experts.

    Return None where even two blocks would take longer than PATIENCE_S.

    Args:
        flops_per_s: the rate of plain matrix products on the device.

    Raises:
        torch.OutOfMemoryError: the device has no room for it.
    """
    affordable = PATIENCE_S * ASSUMED_UTILISATION * flops_per_s / LEAST_STEPS
    once = replace(workload, grad_accum_steps=1, calls_per_step=1.0)
    share = min(1.0, affordable / step_flops(once).total)
    teacher, student = (
        max(min(2, depth), int(share * depth)) for depth in (workload.teacher.depth, workload.student.depth)
    )
    shallow = (workload.teacher.replace(depth=teacher), workload.student.replace(depth=student))
    if step_flops(replace(once, teacher=shallow[0], student=shallow[1])).total > affordable:
        return None
    dtype = DTYPES[workload.dtype]
    (answer_s,) = _at_depth(
        lambda depth: _seconds_of_average_answers(workload, depth, device, dtype), teacher, workload.teacher.depth
    )
    learn_s, update_s = _at_depth(
        lambda depth: _seconds_of_learning(workload, depth, device, dtype), student, workload.student.depth
    )
    depths = teacher, student
    return StepTime(depths, answer_s, learn_s, update_s, workload.grad_accum_steps, workload.calls_per_step)


def _at_depth(measure: Callable[[int], tuple[float, ...]], measured: int, depth: int) -> list[float]:
    """Return what `measure` gives at `depth`, from `measured` blocks and, where these are not all, from one."""
    many = measure(measured)
    if measured == depth:
        return list(many)
    # A block never takes less than nothing, as noise may have it.
    blocks = [max(0.0, most - least) / (measured - 1) for least, most in zip(measure(1), many, strict=True)]
    return [most + (depth - measured) * block for most, block in zip(many, blocks, strict=True)]


def _seconds_of_average_answers(workload: Workload, depth: int, device: str, dtype: torch.dtype) -> tuple[float]:
    """Measure an answer with guidance and, where not all have it, one without, each by its share."""
    share = workload.guided_share if workload.uses_guidance else 1.0
    (seconds,) = _seconds_of_answers(workload, depth, device, dtype)
    if share == 1:
        return (seconds,)
    (without,) = _seconds_of_answers(replace(workload, uses_guidance=False), depth, device, dtype)
    return (share * seconds + (1 - share) * without,)


def _seconds_of_answers(workload: Workload, depth: int, device: str, dtype: torch.dtype) -> tuple[float]:
    model = random_model(workload.teacher.replace(depth=depth), device, DTYPES.get(workload.teacher_dtype, dtype))
    if workload.teacher_dtype == "fp8":
        to_fp8(model)
    inputs = _random_inputs(workload, device)
    text_dim = workload.teacher.text_encoder_output_dim
    negative = torch.randn(workload.negative_text_tokens, text_dim, device=device) if workload.uses_guidance else None
    ask = autocast(model.requires_grad_(False).eval(), device, dtype)
    with torch.no_grad():
        return (_seconds_of(lambda: ask(*inputs, negative)),)


def _seconds_of_learning(workload: Workload, depth: int, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measure a forward and backward pass; and clipping, optimiser and average."""
    student = random_model(workload.student.replace(depth=depth), device, torch.float32).train()
    student.gradient_checkpointing = workload.gradient_checkpointing
    inputs = _random_inputs(workload, device)
    answer = autocast(student, device, dtype)
    optimizer = make_optimizer(student, OptimizationOptions(lr=1e-6, optimizer=workload.optimizer), device, dtype)
    average = WeightAverage(student, 0.999) if workload.ema else None

    def learn() -> None:
        student.zero_grad()
        answer(*inputs).float().square().mean().backward()

    def update() -> None:
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if average is not None:
            average.update()

    return _seconds_of(learn), _seconds_of(update)


def random_model(config: StudentConfig, device: str, dtype: torch.dtype) -> WanLiteStudent:
    """Return a model of this shape whose weights are kept as `project_teacher` keeps a teacher's, of small random values."""
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


def _seconds_of(work: Callable[[], object]) -> float:
    """Return the median time of a call, which pays for libraries and memory once before."""
    work()
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())  # it waits for a GPU by itself
    return timer.adaptive_autorange(min_run_time=LEAST_S, max_run_time=PATIENCE_S / 4).median
