"""The velocity error of a student at held-out states, which are never trained on: they lie on the teacher's own paths.

    states = draw_path_states(teacher, prompt_embeds, latent_shape, options)   # once
    PathErrors(states, prompt_embeds, options)(student)                        # {"teacher_states": 0.31}

The teacher answers the paths once; after that a measurement costs one forward pass of the student a state.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wandistiller.device import autocast, to_device
from wandistiller.evaluation.measures import relative_errors
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, StudentField, VelocityField, sample
from wandistiller.wan.prompt_embeds import PromptEmbeds

NUM_PATHS = 16
SEED = 2**31  # far from the seeds that pictures are drawn from


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, and back in its own mode at the end, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@dataclass(frozen=True)
class PathStates:
    """States of the teacher's paths with its velocities there, in host memory: S noise levels of P paths.

    Attributes:
        latents, velocity: (S, P, C, H, W).
        sigma: (S,) float64.
    """

    latents: Tensor
    sigma: Tensor
    velocity: Tensor


class _Kept:
    """A velocity field that keeps the states that it answers, and its answers."""

    def __init__(self, field: VelocityField):
        self.field = field
        self.states: list[tuple[Tensor, Tensor, Tensor]] = []

    def velocity(self, latents: Tensor, sigma: Tensor, *text: Tensor) -> Tensor:
        velocity = self.field.velocity(latents, sigma, *text)
        self.states.append((latents.cpu(), sigma[0], velocity.float().cpu()))
        return velocity


def draw_path_states(
    teacher: VelocityField,
    prompt_embeds: PromptEmbeds,
    latent_shape: tuple[int, int, int],
    options: SamplingOptions,
    batch_size: int = NUM_PATHS,
) -> PathStates:
    """Sample the teacher and return the states of its paths, from the highest noise level to the lowest.

    Path i draws prompt i, the prompts in turn where there are more paths, from a noise of its own.

    Args:
        prompt_embeds: of one prompt or more.
        options: with as many steps as noise levels are measured.
        batch_size: paths that are drawn at a time.
    """
    parts = []
    noise = seeded_noise(range(SEED, SEED + NUM_PATHS), latent_shape)
    for paths in torch.arange(NUM_PATHS).split(batch_size):
        kept = _Kept(teacher)
        text = prompt_embeds.batch(paths % len(prompt_embeds), options.device)
        sample(kept, noise[paths], *text, options)
        latents, sigma, velocity = (torch.stack(values) for values in zip(*kept.states, strict=True))
        parts.append((latents, velocity))
    latents, velocity = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
    return PathStates(latents, sigma, velocity)


@dataclass(frozen=True)
class PathErrors:
    """Measures a student's mean relative velocity error at states of the teacher's paths.

    Attributes:
        prompt_embeds: the prompts that the states were drawn with.
        options: the device and the dtype that the student answers in.
        batch_size: states that are asked at a time; the error does not depend on it.
    """

    states: PathStates
    prompt_embeds: PromptEmbeds
    options: SamplingOptions
    batch_size: int = NUM_PATHS

    @torch.no_grad()  # not inference mode, because weights that FSDP2 gathers in it could not be trained afterwards
    def __call__(self, student: WanLiteStudent) -> dict[str, float]:
        """Return the error by name; the student's modes, weights and gradients stay as they are."""
        device, errors = self.options.device, []
        ask = autocast(StudentField(student).velocity, device, self.options.compute_dtype)
        with evaluation_mode(student):
            for paths in torch.arange(NUM_PATHS).split(self.batch_size):
                text = self.prompt_embeds.batch(paths % len(self.prompt_embeds), device)
                for level, sigma in enumerate(self.states.sigma):
                    latents, expected = (
                        to_device(part[level, paths], device) for part in (self.states.latents, self.states.velocity)
                    )
                    errors.append(relative_errors(ask(latents, sigma.expand(len(paths)), *text), expected))
        return {"teacher_states": float(torch.cat(errors).mean())}
