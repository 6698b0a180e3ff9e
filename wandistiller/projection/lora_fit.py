"""A student's LoRA fitted to its teacher's: the cut matrices, trained for some steps on what the teacher with its LoRA answers.

The cut says what the student's projection would gain. A trained student has moved away from that projection, and has fewer layers,
so that the cut is only where a fit begins; the student's own weights stay as they are.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wandistiller.errors import UserError
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.calibrated import states_error
from wandistiller.projection.calibration import CalibrationOptions, CalibrationStates
from wandistiller.projection.lora import StudentLora
from wandistiller.sampling.flow import sigma_to_timestep
from wandistiller.wan.names import without_frames
from wandistiller.wan.prompt_embeds import PromptEmbeds

BATCH_SIZE = 64


@dataclass(frozen=True)
class FittedLora:
    """A fitted LoRA, and the student's relative velocity errors on states that it was not fitted on.

    Attributes:
        before, cut, fitted: without a LoRA, with the cut one, and with the fitted one.
    """

    lora: StudentLora
    before: float
    cut: float
    fitted: float


def fit_lora(
    student: WanLiteStudent,
    lora: StudentLora,
    states: tuple[CalibrationStates, CalibrationStates],
    embeds: PromptEmbeds,
    options: CalibrationOptions,
    *,
    num_steps: int,
    lr: float = 3e-3,
) -> FittedLora:
    """Train the products of a cut LoRA; its differences stay as they were cut.

    Args:
        student: frozen here; what the LoRA adds to it as differences, or to its patch kernel, is added in place.
        states: of the teacher with its LoRA, to fit on and to measure on.

    Raises:
        UserError: the LoRA has no product of a linear layer.
    """
    student = student.to(options.device).eval().requires_grad_(False)
    before = states_error(student, states[1], embeds, options)
    linears = {name: module for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    products = {
        name: _trainable(lora.low_rank[f"{name}.weight"], options.device)
        for name in linears
        if f"{name}.weight" in lora.low_rank
    }
    if not products:
        raise UserError("the LoRA has no lora_up and lora_down for the student, so nothing of it can be fitted")
    _add_the_rest(student, lora, products)
    with contextlib.ExitStack() as hooks:
        for name, (up, down) in products.items():
            hooks.callback(linears[name].register_forward_hook(_adding(up, down)).remove)
        cut = states_error(student, states[1], embeds, options)
        _train(student, products, states[0], embeds, options, num_steps, lr)
        fitted = states_error(student, states[1], embeds, options)
    low_rank = {f"{name}.weight": (up.detach().cpu(), down.detach().cpu()) for name, (up, down) in products.items()}
    return FittedLora(replace(lora, low_rank=lora.low_rank | low_rank), before, cut, fitted)


def _trainable(pair: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    up, down = (nn.Parameter(part.clone().to(device)) for part in pair)
    return up, down


def _adding(up: Tensor, down: Tensor):
    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs[0], down), up).to(output.dtype)

    return hook


@torch.no_grad()
def _add_the_rest(student: WanLiteStudent, lora: StudentLora, products: dict) -> None:
    """Add what is not trained to the student's weights."""
    rest = replace(
        lora,
        low_rank={name: pair for name, pair in lora.low_rank.items() if name.removesuffix(".weight") not in products},
    )
    for name, parameter in student.named_parameters():
        if name in rest.names():
            parameter.add_(without_frames(rest.delta(name)).to(parameter))


def _train(
    student: WanLiteStudent,
    products: dict[str, tuple[Tensor, Tensor]],
    states: CalibrationStates,
    embeds: PromptEmbeds,
    options: CalibrationOptions,
    num_steps: int,
    lr: float,
) -> None:
    optimizer = torch.optim.AdamW([part for pair in products.values() for part in pair], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    batches = _batches(states, options.seed)
    for _ in range(num_steps):
        levels, paths = next(batches)
        text = embeds.batch(states.prompts[paths], options.device)
        latents, expected = (part[levels, paths].to(options.device) for part in (states.latents, states.velocity))
        timestep = sigma_to_timestep(states.sigma[levels]).to(options.device)
        is_mixed = options.compute_dtype != torch.float32
        with torch.autocast(torch.device(options.device).type, options.compute_dtype, enabled=is_mixed):
            velocity = student(latents, timestep, *text)
        loss = F.mse_loss(velocity.float(), expected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _batches(states: CalibrationStates, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noise levels and paths of endless batches, every state once in each round."""
    num_levels = len(states.sigma)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(num_levels * states.num_paths, generator=generator).split(BATCH_SIZE):
            yield rows % num_levels, rows // num_levels
