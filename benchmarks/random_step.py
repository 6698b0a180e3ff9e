"""A training step of any shape on random weights, for benchmarks of memory and time; no file is read."""

import torch
from torch import nn

from wandistiller.budget.workload import Workload
from wandistiller.device import DTYPES, autocast
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.sizes import sides, unfilled_model
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.training.optimizer import OptimizationOptions, WeightAverage, make_optimizers

WEIGHT_STD = 0.02  # random weights of this size overflow nowhere


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
        self._optimizers = make_optimizers(self.student, options, device, dtype)
        self._average = WeightAverage(self.student, 0.999) if workload.ema else None
        self._inputs, self._negative = random_inputs(workload, device), None
        if workload.is_guided:
            self._negative = torch.randn(workload.negative_text_tokens, config.text_encoder_output_dim, device=device)

    @torch.no_grad()
    def answer(self) -> torch.Tensor:
        return self._ask(*self._inputs, self._negative)

    def learn(self) -> None:
        self.student.zero_grad()
        self._predict(*self._inputs).float().square().mean().backward()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        if self._average is not None:
            self._average.update()


def random_model(config: StudentConfig, device: str, dtype: torch.dtype) -> WanLiteStudent:
    """Return a model of this shape with small random weights, kept as `project_teacher` keeps a teacher's."""
    model = unfilled_model(config, dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, WEIGHT_STD)
    return model


def random_inputs(workload: Workload, device: str) -> tuple[torch.Tensor, ...]:
    """Return latents, timesteps, text of a batch and its lengths."""
    count, config = workload.batch_size, workload.student
    text = min(workload.text_tokens - 1, config.text_max_length)  # the model adds the token that stands for the padding
    return (
        torch.randn(count, config.num_channels, *sides(workload.latent_size), device=device),
        torch.linspace(100.0, 1000.0, count, device=device),
        torch.randn(count, text, config.text_encoder_output_dim, device=device),
        torch.full((count,), text, device=device),
    )
