"""Is the loss right, and still falling where it counts: velocity errors on prompts and noises that never train."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wandistiller.device import autocast
from wandistiller.evaluation.measures import relative_errors
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import seeded_noise, sigma_to_timestep
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample
from wandistiller.wan.prompt_embeds import PromptEmbeds

NUM_LEVELS = 10
BATCH_SIZE = 16
SEED = 2**31  # of the first prompt's noise, far from those that pictures are drawn from
State = tuple[Tensor, Tensor, Tensor]  # latents (B, C, H, W), sigma (B,) and the velocity (B, C, H, W) answered there
Text = tuple[Tensor, Tensor]  # prompt_embeds (B, S, text_dim) and prompt_lengths (B,)


class StudentField:
    """A student as a velocity field that leaves it trainable, as `sampling.student_field` does not: it freezes experts."""

    def __init__(self, student: WanLiteStudent):
        self.student = student

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor:
        return self.student(latents, sigma_to_timestep(sigma).to(latents.device), prompt_embeds, prompt_lengths)


class _Recorded:
    """A velocity field that keeps what it was asked and answered at some of the steps."""

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
    """Every module in evaluation mode inside, and in its own again after, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


class HeldOutErrors:
    """Mean relative velocity error of a student at two kinds of states, of the same prompts and noises every time.

    "teacher_states" lie on the teacher's sampling paths, recorded once; "student_states" on the student's own, where the
    teacher is asked anew. How much worse the second is, is the exposure bias: the student has not learnt to answer where its
    own mistakes lead.

    Args:
        teacher: the velocity field that is right.
        prompt_embeds: one path each.
        latent_shape: (C, H, W).
        sampling_options: how both are sampled, and in which dtype they answer.
        num_levels: steps of it that are measured, evenly spread with both ends; all of them where it has fewer.
        seed: of the first prompt's noise; the others follow.
        batch_size: paths at a time; the errors do not depend on it.
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
        """The measured states of a batch of paths that follow `field`."""
        recorded = _Recorded(field, self.steps)
        sample(recorded, noise, *text, self.options)
        return recorded.states

    @torch.no_grad()  # not inference mode: weights that FSDP2 puts together in it could not be trained after
    def __call__(self, student: WanLiteStudent) -> dict[str, float]:
        """{"teacher_states": error, "student_states": error}; the student's modes, weights and gradients stay as they are."""
        field, errors = StudentField(student), {"teacher_states": [], "student_states": []}
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
        """The field's velocity (B, C, H, W) in the dtype of the sampler's matrix products."""
        return autocast(field.velocity, self.options.device, self.options.compute_dtype)(latents, sigma, *text)
