"""What a run measures of its student, on prompts and noises that are never trained on, which the teacher answers once.

    states = draw_path_states(teacher, prompt_embeds, latent_shape, options, full_steps=20)   # once
    PathErrors(states, prompt_embeds, options)(student)    # {"velocity_error": 0.31, "endpoint": 0.2, "steps": 20, "teacher_steps": 3.7}

The velocity error is relative, at states of the teacher's own paths. The endpoint is the distance to what the teacher draws in all of
its steps, and the teacher's own distance in fewer steps says what that is worth. A measurement costs passes of the student alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wandistiller.device import autocast, to_device
from wandistiller.evaluation.measures import endpoint_error, equal_steps, relative_errors
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, StudentField, VelocityField, sample, sample_in_batches
from wandistiller.wan.prompt_embeds import PromptEmbeds

NUM_PATHS = 16
NUM_DRAWN = 8  # paths that are drawn to the end, by the teacher in all of its steps, in fewer, and in those of a path
FEWER_STEPS = (1, 2, 8)
SEED = 2**31  # far from the seeds that pictures are drawn from


@dataclass(frozen=True)
class PathStates:
    """States of the teacher's paths with its velocities there, in host memory: S noise levels of P paths.

    Attributes:
        latents, velocity: (S, P, C, H, W).
        sigma: (S,) float64.
        full: (D, C, H, W) latents that the teacher draws from the first D noises in all of its steps; D may be 0.
        fewer: (K, 2) float64, numbers of fewer steps, and the teacher's endpoint error in each of them.
    """

    latents: Tensor
    sigma: Tensor
    velocity: Tensor
    full: Tensor
    fewer: Tensor


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
    full_steps: int | None = None,
) -> PathStates:
    """Sample the teacher and return the states of its paths, from the highest noise level to the lowest.

    Path i draws prompt i, the prompts in turn where there are more paths, from a noise of its own.

    Args:
        prompt_embeds: of one prompt or more.
        options: with as many steps as noise levels are measured.
        batch_size: paths that are drawn at a time.
        full_steps: all of the teacher's steps, in which it draws too; None: nothing is drawn.
    """
    parts = []
    noise = seeded_noise(range(SEED, SEED + NUM_PATHS), latent_shape)
    for paths in torch.arange(NUM_PATHS).split(batch_size):
        kept = _Kept(teacher)
        text = prompt_embeds.batch(paths % len(prompt_embeds), options.device)
        ends = sample(kept, noise[paths], *text, options).cpu()
        latents, sigma, velocity = (torch.stack(values) for values in zip(*kept.states, strict=True))
        parts.append((latents, velocity, ends[None]))
    latents, velocity, ends = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
    if full_steps is None:
        return PathStates(latents, sigma, velocity, torch.empty(0, *latent_shape), torch.empty(0, 2))
    few = {options.num_inference_steps: ends[0, :NUM_DRAWN]}
    for steps in drawn_steps(full_steps):
        few[steps] = _draw(teacher, prompt_embeds, noise, replace(options, num_inference_steps=steps), batch_size)
    full = few[full_steps]
    errors = [[steps, endpoint_error(few[steps], full)] for steps in sorted(few) if steps < full_steps]
    return PathStates(latents, sigma, velocity, full, torch.tensor(errors, dtype=torch.float64))


def drawn_steps(full_steps: int) -> list[int]:
    """Return the numbers of steps that a teacher of so many draws in: fewer ones, and all."""
    return [*(steps for steps in FEWER_STEPS if steps < full_steps), full_steps]


def _draw(
    field: VelocityField, prompt_embeds: PromptEmbeds, noise: Tensor, options: SamplingOptions, batch_size: int
) -> Tensor:
    """Draw the first NUM_DRAWN prompts, in turn where there are fewer."""
    indices = [index % len(prompt_embeds) for index in range(NUM_DRAWN)]
    return sample_in_batches(field, noise[:NUM_DRAWN], prompt_embeds, indices, options, batch_size)


@dataclass(frozen=True)
class PathErrors:
    """Measures a student at states of the teacher's paths, and by what it draws.

    Attributes:
        prompt_embeds: the prompts that the states were drawn with.
        options: how the teacher draws, and the device and the dtype that the student answers in.
        batch_size: states that are asked at a time; the errors do not depend on it.
    """

    states: PathStates
    prompt_embeds: PromptEmbeds
    options: SamplingOptions
    batch_size: int = NUM_PATHS

    @torch.no_grad()  # not inference mode, because weights that FSDP2 gathers in it could not be trained afterwards
    def __call__(self, student: WanLiteStudent, few: SamplingOptions | None = None) -> dict[str, float]:
        """Return what was measured by name; the student's modes, weights and gradients stay as they are.

        Args:
            few: how a student draws that learns whole steps; None for one that learns the velocity and draws as its teacher does.
        """
        errors = {"velocity_error": self._velocity_error(student)} if few is None else {}
        return errors | (self._endpoint(student, few or self.options) if len(self.states.full) else {})

    def _velocity_error(self, student: WanLiteStudent) -> float:
        device, errors = self.options.device, []
        ask = autocast(StudentField(student).velocity, device, self.options.compute_dtype)
        for paths in torch.arange(NUM_PATHS).split(self.batch_size):
            text = self.prompt_embeds.batch(paths % len(self.prompt_embeds), device)
            for level, sigma in enumerate(self.states.sigma):
                latents, expected = (
                    to_device(part[level, paths], device) for part in (self.states.latents, self.states.velocity)
                )
                errors.append(relative_errors(ask(latents, sigma.expand(len(paths)), *text), expected))
        return float(torch.cat(errors).mean())

    def _endpoint(self, student: WanLiteStudent, options: SamplingOptions) -> dict[str, float]:
        """Return a point of the frontier: the distance to the teacher's latents, and in how many steps the teacher is as near."""
        full = self.states.full
        channels, height, width = full.shape[1:]
        noise = seeded_noise(range(SEED, SEED + NUM_DRAWN), (channels, height, width))
        drawn = _draw(StudentField(student), self.prompt_embeds, noise, options, self.batch_size)
        error = endpoint_error(drawn, full)
        steps, _ = equal_steps(error, {int(steps): own for steps, own in self.states.fewer.tolist()})
        return {
            "endpoint": error,
            "steps": options.num_inference_steps,
            **({} if steps is None else {"teacher_steps": steps}),
        }
