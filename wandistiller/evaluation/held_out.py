"""Held-out measurements of a student while it trains: the velocity error at states of the teacher's paths, and the noise part.

    states = [draw_path_states(teacher, prompts, shape, options) for shape in latent_shapes]   # once, one for each image size
    PathErrors(states, prompts, options)(student)                                             # {"teacher_states": 0.31}

The teacher answers NUM_PATHS paths of NUM_LEVELS noise levels once; after that a measurement costs 64 forward passes of the student.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wandistiller.device import autocast, to_device
from wandistiller.evaluation.measures import Recorded, relative_errors, spread
from wandistiller.evaluation.noise_parts import add_up, noise_parts, noise_sums
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


# ---- velocity errors at states that the teacher has answered ----


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


# ---- the noise part ----


class HeldOutNoise:
    """Measures how much a student's pictures of one prompt follow the teacher's from noise to noise (noise_parts.py).

    The teacher draws once. Noises differ from those of the held-out states.

    Args:
        prompts_by_size: prompts and latent shape of each image size; each prompt is drawn `num_noises` times.
        batch_size: pictures that are drawn at a time.
        scale_steps: numbers of steps that the teacher also draws in, from the first noise of each prompt: how far its pictures are
            then from its own is a scale for the student's distance.
    """

    def __init__(
        self,
        teacher: VelocityField,
        prompts_by_size: Sequence[tuple[PromptEmbeds, LatentShape]],
        sampling_options: SamplingOptions,
        num_noises: int,
        batch_size: int = BATCH_SIZE,
        scale_steps: Sequence[int] = (),
    ):
        self.options, self.batch_size, self.num_noises = sampling_options, batch_size, num_noises
        self.prompts_by_size = prompts_by_size
        self.of_teacher = self._draw(teacher)
        self.scale = {teacher_at(steps): self._distance_in(steps, teacher) for steps in scale_steps}

    def _draw(self, field: VelocityField, num_noises: int | None = None, steps: int | None = None) -> list[Tensor]:
        """Return latents (prompts, noises, C, H, W) of each image size, from the first `num_noises` noises of each prompt."""
        options = replace(self.options, num_inference_steps=steps or self.options.num_inference_steps)
        drawn = []
        for embeds, shape in self.prompts_by_size:
            noise = seeded_noise(range(2 * SEED, 2 * SEED + len(embeds) * self.num_noises), shape)
            noise = noise.unflatten(0, (len(embeds), -1))[:, :num_noises]  # (prompts, noises, C, H, W)
            prompts = [prompt for prompt in range(len(embeds)) for _ in range(noise.shape[1])]
            latents = sample_in_batches(field, noise.flatten(0, 1), embeds, prompts, options, self.batch_size)
            drawn.append(latents.unflatten(0, noise.shape[:2]))
        return drawn

    def _distance_in(self, steps: int, teacher: VelocityField) -> float | None:
        """Return the relative distance of the teacher's latents drawn in `steps` steps from its own, over the first noises."""
        return distance_of(self._draw(teacher, 1, steps), [latents[:, :1] for latents in self.of_teacher])

    def __call__(self, student: WanLiteStudent) -> dict[str, float | None]:
        """Return size (norm ratio), cosine and gain of the student's noise part, and the distance of its pictures with its scale.

        The student stays as it is.
        """
        with evaluation_mode(student):
            of_student = self._draw(StudentField(student))
        sums = add_up(noise_sums(*both) for both in zip(of_student, self.of_teacher, strict=True))
        parts = noise_parts(sums, spread=1.0)  # none of these three has a unit
        distance = distance_of(of_student, self.of_teacher)
        return {**{name: parts[name] for name in ("norm_ratio", "cosine", "gain")}, "endpoint": distance, **self.scale}


def distance_of(latents: Sequence[Tensor], references: Sequence[Tensor]) -> float | None:
    """Return `measures.endpoint_error` of latents (prompts, noises, C, H, W) over all image sizes; None if all references are flat."""
    squares, spreads = 0.0, 0.0
    for drawn, reference in zip(latents, references, strict=True):
        squares += float((drawn.double() - reference.double()).square().sum())
        spreads += len(reference.flatten(0, 1)) * spread(reference.flatten(0, 1)) ** 2
    return (squares / spreads) ** 0.5 if spreads else None


def teacher_at(steps: int) -> str:
    """Return the name of the teacher's own distance at fewer steps."""
    return f"teacher_at_{steps}_steps"


# ---- to leave with run/held_out.py ----

NUM_LEVELS = 10
State = tuple[Tensor, Tensor, Tensor]
Text = tuple[Tensor, Tensor]


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
