"""The velocity error of a student at held-out states, which are never trained on: they lie on the teacher's own paths.

    states = [draw_path_states(teacher, prompts, shape, options) for shape in latent_shapes]   # once, one for each image size
    PathErrors(states, prompts, options)(student)                                             # {"teacher_states": 0.31}

The teacher answers the paths once; after that a measurement costs one forward pass of the student a state.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wandistiller.device import autocast, to_device
from wandistiller.evaluation.measures import Recorded, relative_errors
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import (
    SamplingOptions,
    StudentField,
    VelocityField,
    sample,
    wan_scheduler,
)
from wandistiller.wan.prompt_embeds import PromptEmbeds

NUM_PATHS = 16
BATCH_SIZE = 16
SEED = 2**31  # far from the seeds that pictures are drawn from
LatentShape = tuple[int, int, int]  # (C, H, W)


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

    @property
    def num_paths(self) -> int:
        return self.latents.shape[1]

    def within(self, low: float, high: float) -> "PathStates":
        """Return the noise levels from `low` to `high`."""
        kept = (self.sigma >= low) & (self.sigma <= high)
        return PathStates(self.latents[kept], self.sigma[kept], self.velocity[kept])


@dataclass(frozen=True)
class _InParts:
    """A velocity field that is asked for a few samples at a time.

    All paths still move on together, so that each of two experts answers its noise levels of all paths before the other one.
    """

    field: VelocityField
    batch_size: int

    def velocity(self, latents: Tensor, sigma: Tensor, *text: Tensor) -> Tensor:
        device, parts = (
            latents.device,
            zip(*(part.split(self.batch_size) for part in (latents, sigma, *text)), strict=True),
        )
        answers = [
            self.field.velocity(
                x, level, *(to_device(part, device) for part in text_of_part)
            )  # sigma stays on the host
            for x, level, *text_of_part in parts
        ]
        return torch.cat(answers).float()


def draw_path_states(
    teacher: VelocityField,
    prompt_embeds: PromptEmbeds,
    latent_shape: LatentShape,
    sampling_options: SamplingOptions,
    num_paths: int = NUM_PATHS,
    segment_steps: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> PathStates:
    """Sample the teacher and return the states of its paths, from the highest noise level to the lowest.

    Path i draws prompt i, the prompts in turn where there are more paths, from a noise of its own.

    Args:
        prompt_embeds: of one prompt or more.
        sampling_options: with as many steps as noise levels are measured.
        segment_steps: the teacher's steps in a segment of a student of few steps. The states then are the starts of segments,
            and the answers the average velocities over them; None for the teacher's own velocity at every step.
    """
    states: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(velocity: Tensor, latents: Tensor, sigma: Tensor, *text: Tensor) -> None:
        states.append((latents.cpu(), sigma[0], velocity.cpu()))

    prompts = [path % len(prompt_embeds) for path in range(num_paths)]
    noise = seeded_noise(range(SEED, SEED + num_paths), latent_shape)
    field = Recorded(_InParts(teacher, batch_size), keep)
    ends = sample(field, noise, *prompt_embeds.batch(prompts), sampling_options)
    latents, sigma, velocity = (torch.stack(values) for values in zip(*states, strict=True))
    if segment_steps is None:
        return PathStates(latents, sigma, velocity)
    options = sampling_options
    sigma = wan_scheduler(options.shift, options.num_inference_steps, options.sampler).sigmas[::segment_steps].double()
    bounds = torch.cat([latents[::segment_steps], ends.cpu()[None]])
    return PathStates(bounds[:-1], sigma[:-1], bounds.diff(dim=0) / sigma.diff().float().view(-1, 1, 1, 1, 1))


class PathErrors:
    """Measures a student's mean relative velocity error at states of the teacher's paths.

    Args:
        states: those of each image size.
        prompt_embeds: the prompts that the states were drawn with.
        sampling_options: the device and the dtype that the student answers in.
        batch_size: states that are asked at a time; the error does not depend on it.
    """

    def __init__(
        self,
        states: Sequence[PathStates],
        prompt_embeds: PromptEmbeds,
        sampling_options: SamplingOptions,
        batch_size: int = BATCH_SIZE,
    ):
        self.states, self.prompt_embeds = states, prompt_embeds
        self.options, self.batch_size = sampling_options, batch_size

    @torch.no_grad()  # not inference mode, because weights that FSDP2 gathers in it could not be trained afterwards
    def __call__(self, student: WanLiteStudent) -> dict[str, float]:
        """Return the error by name; the student's modes, weights and gradients stay as they are."""
        with evaluation_mode(student):
            errors = [error for states in self.states for error in self._errors(student, states)]
        return {"teacher_states": float(torch.cat(errors).mean())}

    def _errors(self, student: WanLiteStudent, states: PathStates) -> Iterator[Tensor]:
        device = self.options.device
        ask = autocast(StudentField(student).velocity, device, self.options.compute_dtype)
        for paths in torch.arange(states.num_paths).split(self.batch_size):
            text = self.prompt_embeds.batch(paths % len(self.prompt_embeds), device)
            for level, sigma in enumerate(states.sigma):
                latents = to_device(states.latents[level, paths], device)
                expected = to_device(states.velocity[level, paths], device)
                yield relative_errors(ask(latents, sigma.expand(len(paths)), *text), expected)
