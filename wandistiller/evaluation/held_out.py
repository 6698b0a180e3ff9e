"""Velocity errors at held-out states, which are never trained on: they tell whether a run still learns what counts.

`PathErrors` asks a student at states of the teacher's paths that were answered once, so that it costs a run next to nothing.
`HeldOutErrors` also follows the student's own paths, and asks the teacher there each time. `HeldOutNoise` compares what the
noise decides in the pictures that both draw.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wandistiller.device import autocast, to_device
from wandistiller.evaluation.measures import endpoint_error, relative_errors, spread
from wandistiller.evaluation.noise_parts import noise_parts, noise_sums
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import (
    SamplingOptions,
    StudentField,
    VelocityField,
    sample,
    sample_in_batches,
    wan_scheduler,
)
from wandistiller.wan.prompt_embeds import PromptEmbeds

NUM_LEVELS = 10
BATCH_SIZE = 16
SEED = 2**31  # far from the seeds that pictures are drawn from
State = tuple[Tensor, Tensor, Tensor]  # latents (B, C, H, W), sigma (B,) and the velocity (B, C, H, W) answered there
Text = tuple[Tensor, Tensor]  # prompt_embeds (B, S, text_dim) and prompt_lengths (B,)


class _RecordedField:
    """A velocity field that keeps the states it is asked at, and its answers, at some of the steps."""

    def __init__(self, field: VelocityField, steps: set[int]):
        self.field, self.steps, self.step = field, steps, 0
        self.states: list[State] = []

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor:
        velocity = self.field.velocity(latents, sigma, prompt_embeds, prompt_lengths)
        if self.step in self.steps:
            self.states.append((latents, sigma, velocity))
        self.step += 1
        return velocity


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


# ---- states that are answered once ----


@dataclass(frozen=True)
class PathStates:
    """States on the teacher's paths and what a student should answer there, in host memory: S noise levels of P paths.

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


class _Walk:
    """A velocity field that keeps the states it is asked at and its answers, in host memory.

    It asks for a few paths at a time. All paths still move on together, so that of two experts each answers its noise levels
    of all paths before the other one is needed.
    """

    def __init__(self, field: VelocityField, batch_size: int):
        self.field, self.batch_size = field, batch_size
        self.latents: list[Tensor] = []
        self.sigmas: list[Tensor] = []
        self.velocities: list[Tensor] = []

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor:
        parts = zip(
            *(part.split(self.batch_size) for part in (latents, sigma, prompt_embeds, prompt_lengths)), strict=True
        )
        velocity = torch.cat(
            [
                self.field.velocity(x, s, to_device(embeds, x.device), to_device(lengths, x.device))
                for x, s, embeds, lengths in parts
            ]
        ).float()
        self.latents.append(latents.cpu())
        self.sigmas.append(sigma[0])
        self.velocities.append(velocity.cpu())
        return velocity


def draw_path_states(
    teacher: VelocityField,
    prompt_embeds: PromptEmbeds,
    latent_shape: tuple[int, int, int],
    sampling_options: SamplingOptions,
    num_paths: int,
    segment_steps: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> PathStates:
    """Sample the teacher and return the states of its paths, from the highest noise level to the lowest.

    Path i draws prompt i, the prompts in turn where there are more paths. Its noise is that of prompt i in `HeldOutErrors`.

    Args:
        prompt_embeds: of one prompt or more.
        segment_steps: the teacher's steps in a segment of a student of few steps. The states then are the starts of segments,
            and the answers the average velocities over them; None for the teacher's own velocity at every step.
    """
    prompts = [path % len(prompt_embeds) for path in range(num_paths)]
    noise = seeded_noise(range(SEED, SEED + num_paths), latent_shape)
    walk = _Walk(teacher, batch_size)
    ends = sample(walk, noise, *prompt_embeds.batch(prompts), sampling_options)
    if segment_steps is None:
        return PathStates(torch.stack(walk.latents), torch.stack(walk.sigmas), torch.stack(walk.velocities))
    options = sampling_options
    scheduler = wan_scheduler(options.shift, options.num_inference_steps, options.sampler)
    sigma = scheduler.sigmas[::segment_steps].double()
    latents = torch.stack([*walk.latents[::segment_steps], ends.cpu()])
    velocity = latents.diff(dim=0) / sigma.diff().float().view(-1, 1, 1, 1, 1)
    return PathStates(latents[:-1], sigma[:-1], velocity)


class PathErrors:
    """Measures a student's mean relative velocity error at states of the teacher's paths, which the teacher has answered.

    Args:
        prompt_embeds: the prompts that the states were drawn with.
        sampling_options: the device and the dtype that the student answers in.
        batch_size: how many states are asked at a time; the error does not depend on it.
    """

    def __init__(
        self,
        states: PathStates,
        prompt_embeds: PromptEmbeds,
        sampling_options: SamplingOptions,
        batch_size: int = BATCH_SIZE,
    ):
        self.states, self.prompt_embeds, self.options, self.batch_size = (
            states,
            prompt_embeds,
            sampling_options,
            batch_size,
        )

    @torch.no_grad()  # not inference mode, as in HeldOutErrors
    def __call__(self, student: WanLiteStudent) -> dict[str, float]:
        """Return the error by name; the student's modes, weights and gradients stay as they are."""
        device, errors = self.options.device, []
        ask = autocast(StudentField(student).velocity, device, self.options.compute_dtype)
        with evaluation_mode(student):
            for paths in torch.arange(self.states.num_paths).split(self.batch_size):
                text = self.prompt_embeds.batch(paths % len(self.prompt_embeds), device)
                for level, sigma in enumerate(self.states.sigma):
                    latents = to_device(self.states.latents[level, paths], device)
                    expected = to_device(self.states.velocity[level, paths], device)
                    errors.append(relative_errors(ask(latents, sigma.expand(len(paths)), *text), expected))
        return {"teacher_states": float(torch.cat(errors).mean())}


# ---- states that are met on the student's own paths too ----


class HeldOutErrors:
    """Measures a student's mean relative velocity error at two kinds of states, from the same prompts and noises every time.

    "teacher_states" lie on the teacher's sampling paths, which are recorded once. "student_states" lie on the student's own
    paths, where the teacher is asked anew. How much worse the second error is tells the exposure bias: the student has not
    learnt to answer where its own mistakes lead.

    Args:
        teacher: the velocity field that is right.
        prompt_embeds: the prompts; each begins one path.
        latent_shape: (C, H, W).
        sampling_options: how both are sampled, and in which dtype they answer.
        num_levels: how many steps of a path are measured, evenly spread with both ends; all where a path has fewer.
        seed: seed of the first prompt's noise; each next prompt has one more.
        batch_size: how many paths are sampled at a time; the errors do not depend on it.
    """

    def __init__(
        self,
        teacher: VelocityField,
        prompt_embeds: PromptEmbeds,
        latent_shape: tuple[int, int, int],
        sampling_options: SamplingOptions,
        num_levels: int = NUM_LEVELS,
        seed: int = SEED,
        batch_size: int = BATCH_SIZE,
    ):
        self.teacher = teacher
        self.options = sampling_options
        last_step = sampling_options.num_inference_steps - 1
        self.steps = set(torch.linspace(0, last_step, num_levels).round().long().tolist())
        noise = seeded_noise(range(seed, seed + len(prompt_embeds)), latent_shape)
        self.noises = noise.split(batch_size)
        prompts = torch.arange(len(prompt_embeds)).split(batch_size)
        self.texts: list[Text] = [prompt_embeds.batch(part, sampling_options.device) for part in prompts]
        self.teacher_states = [self._path(teacher, *start) for start in zip(self.noises, self.texts, strict=True)]

    def _path(self, field: VelocityField, noise: Tensor, text: Text) -> list[State]:
        """Follow `field` along a batch of paths and return the states that are measured."""
        recorded = _RecordedField(field, self.steps)
        sample(recorded, noise, *text, self.options)
        return recorded.states

    @torch.no_grad()  # not inference mode, because weights that FSDP2 gathers in it could not be trained afterwards
    def __call__(self, student: WanLiteStudent) -> dict[str, float]:
        """Return both errors by name; the student's modes, weights and gradients stay as they are."""
        field = StudentField(student)
        errors: dict[str, list[Tensor]] = {"teacher_states": [], "student_states": []}
        with evaluation_mode(student):
            for noise, text, states in zip(self.noises, self.texts, self.teacher_states, strict=True):
                for latents, sigma, expected in states:
                    actual = self._answer(field, latents, sigma, text)
                    errors["teacher_states"].append(relative_errors(actual, expected))
                for latents, sigma, actual in self._path(field, noise, text):
                    expected = self._answer(self.teacher, latents, sigma, text)
                    errors["student_states"].append(relative_errors(actual, expected))
        return {name: float(torch.cat(parts).mean()) for name, parts in errors.items()}

    def _answer(self, field: VelocityField, latents: Tensor, sigma: Tensor, text: Text) -> Tensor:
        """Ask a field for its velocity (B, C, H, W), computed in the dtype that it is sampled in."""
        return autocast(field.velocity, self.options.device, self.options.compute_dtype)(latents, sigma, *text)


# ---- several image sizes ----


class MeanOverSizes:
    """Measures a student at several image sizes, and returns each measure's mean over them.

    Args:
        measures: one for each size, with what it counts for.
    """

    def __init__(self, measures: Sequence[tuple[Callable[[WanLiteStudent], Mapping[str, float | None]], int]]):
        self.measures = measures

    def __call__(self, student: WanLiteStudent) -> dict[str, float | None]:
        """Return the means by name, of the sizes that have a value; None where none has."""
        found = [(measure(student), weight) for measure, weight in self.measures]
        means: dict[str, float | None] = {}
        for name in found[0][0]:
            known = [(values[name], weight) for values, weight in found if values[name] is not None]
            total = sum(weight for _, weight in known)
            means[name] = sum(value * weight for value, weight in known) / total if known else None
        return means


# ---- what the noise decides ----


class HeldOutNoise:
    """Measures how much a student's pictures of one prompt follow the teacher's from noise to noise (noise_parts.py).

    The teacher draws once. Noises differ from those of the held-out errors.

    Args:
        prompt_embeds: the prompts; each is drawn `num_noises` times.
        batch_size: how many pictures are drawn at a time.
        scale_steps: numbers of steps that the teacher also draws in, from the first noise of each prompt: how far its pictures are
            then from its own is a scale for the student's distance.
    """

    def __init__(
        self,
        teacher: VelocityField,
        prompt_embeds: PromptEmbeds,
        latent_shape: tuple[int, int, int],
        sampling_options: SamplingOptions,
        num_noises: int,
        batch_size: int = BATCH_SIZE,
        scale_steps: Sequence[int] = (),
    ):
        self.prompt_embeds, self.options, self.batch_size = prompt_embeds, sampling_options, batch_size
        self.prompts = [prompt for prompt in range(len(prompt_embeds)) for _ in range(num_noises)]
        self.noise = seeded_noise(range(2 * SEED, 2 * SEED + len(self.prompts)), latent_shape)
        self.of_teacher = self._draw(teacher)
        self.scale = {teacher_at(steps): self._distance_in(steps, teacher) for steps in scale_steps}

    def _distance_in(self, steps: int, teacher: VelocityField) -> float | None:
        """Return how far the teacher's latents drawn in so many steps are from its own, relative, over the first noises."""
        options, prompts = replace(self.options, num_inference_steps=steps), range(len(self.prompt_embeds))
        noise = self.noise.unflatten(0, self.of_teacher.shape[:2])[:, 0]
        drawn = sample_in_batches(teacher, noise, self.prompt_embeds, prompts, options, self.batch_size)
        return distance_of(drawn, self.of_teacher[:, 0])

    def _draw(self, field: VelocityField) -> Tensor:
        """Return latents (prompts, noises, C, H, W)."""
        latents = sample_in_batches(field, self.noise, self.prompt_embeds, self.prompts, self.options, self.batch_size)
        return latents.unflatten(0, (len(self.prompt_embeds), -1))

    def __call__(self, student: WanLiteStudent) -> dict[str, float | None]:
        """Return size (norm ratio), cosine and gain of the student's noise part, and the distance of its pictures with its scale.

        The student stays as it is.
        """
        with evaluation_mode(student):
            of_student = self._draw(StudentField(student))
        parts = noise_parts(noise_sums(of_student, self.of_teacher), spread=1.0)  # none of these three has a unit
        distance = distance_of(of_student.flatten(0, 1), self.of_teacher.flatten(0, 1))
        return {**{name: parts[name] for name in ("norm_ratio", "cosine", "gain")}, "endpoint": distance, **self.scale}


def distance_of(latents: Tensor, reference: Tensor) -> float | None:
    """Return the distance of latents from others, relative; None where all of those are the same flat colour."""
    return endpoint_error(latents, reference) if spread(reference) else None


def teacher_at(steps: int) -> str:
    """Return the name of the teacher's own distance at fewer steps."""
    return f"teacher_at_{steps}_steps"
