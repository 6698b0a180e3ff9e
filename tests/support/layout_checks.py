"""What every layout of a teacher must pass: the same velocities as diffusers' 3D model, and one line where it is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.wan_folders import oracle_velocity, relative_error
from wandistiller.errors import UserError
from wandistiller.wan.layouts import open_wan_files

MAX_ERROR = 1e-5


def inputs(config, seed: int = 0) -> tuple[Tensor, ...]:
    """Non-square latents, timesteps between whole numbers, and prompts of no, some and all 512 tokens."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(4, config.num_channels, 4, 6, generator=generator)
    timestep = torch.tensor([0.37, 499.63, 875.5, 1000.0])
    prompt_embeds = torch.randn(4, 512, config.text_encoder_output_dim, generator=generator)
    return latents, timestep, prompt_embeds, torch.tensor([0, 1, 77, 512])


def assert_exact(model, report, expert) -> None:
    """What a teacher is projected to at its own shape equals diffusers' 3D model at one frame."""
    assert {entry["status"] for entry in report.student.values()} == {"exact"}
    given = inputs(model.config)
    with torch.no_grad():
        assert relative_error(model(*given), oracle_velocity(expert, *given)) <= MAX_ERROR


def refusal(path: Path, **arguments) -> str:
    """The one line that a checkpoint is refused with."""
    with pytest.raises(UserError) as refused:
        open_wan_files(path, **arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)
