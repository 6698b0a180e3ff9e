"""One comparison of a student with its teacher: both draw from the same noise, and what they drew is measured."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wandistiller.device import autocast
from wandistiller.evaluation import measures
from wandistiller.evaluation.judges import Judge, Verdict, accuracy
from wandistiller.evaluation.scorers import Scorer, compare_scores
from wandistiller.model.sizes import count_parameters, num_image_tokens, transformer_flops
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample_in_batches
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings

if TYPE_CHECKING:
    from wandistiller.wan.vae_2d import WanVae2D

NOISE_MEANING = (
    "Over several noises of a prompt, the mean of its pictures is what the prompt decides and the rest is what the noise "
    "decides. A student that draws the mean of all it could draw has a gain of 0, one that follows its teacher has cosine and "
    "size 1. A noise error above the size of the teacher's noise part is worse than drawing the mean."
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Student and teacher as velocity fields, and all that both draw with.

    Attributes:
        embeds: text tokens of the prompts, each prompt once.
        prompts: the prompt of each sample.
        prompt_indices: where the prompt of each sample is in `embeds`.
        noise: (samples, C, H, W); the seeds of a prompt lie one after another.
        seeds: of the noise of each sample.
        settings: how the teacher is guided, and the statistics of the latents.
        judge: of --judge; None without.
        scorers: of --scorer.
    """

    student: Teacher
    teacher: Teacher
    embeds: PromptEmbeds
    prompts: list[str]
    prompt_indices: list[int]
    noise: Tensor
    seeds: list[int]
    teacher_options: SamplingOptions
    student_options: SamplingOptions
    settings: TeacherSettings
    vae: "WanVae2D"
    judge: Judge | None
    scorers: Sequence[Scorer]
    num_seeds: int
    batch_size: int

    @property
    def num_tokens(self) -> int:
        """Text tokens of the first prompt, for which costs are counted."""
        return len(self.embeds.read(0))

    def first(self, num_prompts: int) -> "Experiment":
        """Return the same with its first prompts alone."""
        count = num_prompts * self.num_seeds
        return replace(
            self,
            embeds=self.embeds.part(0, num_prompts),
            prompts=self.prompts[:count],
            prompt_indices=self.prompt_indices[:count],
            noise=self.noise[:count],
            seeds=self.seeds[:count],
        )

    def sample(
        self, field: VelocityField, options: SamplingOptions, progress: Callable[[int], object] | None = None
    ) -> Tensor:
        """Return the latents (samples, C, H, W) that a field draws, on the CPU."""
        return sample_in_batches(
            field, self.noise, self.embeds, self.prompt_indices, options, self.batch_size, progress
        )

    def draw(self, name: str, field: VelocityField, options: SamplingOptions) -> "Drawn":
        """Draw every sample, decode it and judge it; a bar shows the progress, and a line tells the time it took."""
        name, start = f"{name}, {options.num_inference_steps} steps", time.perf_counter()
        with tqdm(total=len(self.noise), desc=name, disable=None, leave=False) as bar:
            latents = self.sample(field, options, bar.update)
        print(f"{name}: {len(latents)} pictures, {time.perf_counter() - start:.1f} s", flush=True)
        return self.drawn(latents)

    def drawn(self, latents: Tensor) -> "Drawn":
        """Decode latents and judge the pictures."""
        mean, std = self.settings.latents_mean, self.settings.latents_std
        pictures = np.concatenate([self.vae.pictures(part, mean, std) for part in latents.split(self.batch_size)])
        return Drawn(latents, pictures, self.judge(pictures, self.prompts) if self.judge else None)


@dataclass(frozen=True)
class Drawn:
    """Latents (samples, C, H, W) that one of the two drew, their pictures (samples, H, W, 3) uint8, and the judge's verdicts."""

    latents: Tensor
    pictures: np.ndarray
    verdicts: list[Verdict] | None = None

    def part(self, samples: slice) -> "Drawn":
        return Drawn(self.latents[samples], self.pictures[samples], self.verdicts and self.verdicts[samples])

    @property
    def right(self) -> float | None:
        """Share of the pictures that the judge holds for right."""
        return accuracy(self.verdicts)["correct"] if self.verdicts else None


class ComparedTeacher:
    """The teacher as a velocity field; the student is asked at each state too, and its relative error noted."""

    def __init__(self, teacher: VelocityField, student: VelocityField):
        self.teacher, self.student = teacher, student
        self._sigmas: list[Tensor] = []
        self._errors: list[Tensor] = []

    def velocity(self, latents: Tensor, sigma: Tensor, *text: Tensor) -> Tensor:
        expected = self.teacher.velocity(latents, sigma, *text)
        errors = measures.relative_errors(self.student.velocity(latents, sigma, *text), expected)
        self._sigmas.append(sigma.cpu())
        self._errors.append(errors.cpu())
        return expected

    def results(self) -> dict:
        """Return the mean error over all states, and by noise level."""
        sigmas, errors = torch.cat(self._sigmas), torch.cat(self._errors)
        return {"mean": float(errors.mean()), "by_sigma": measures.bucket_means(sigmas, errors)}


def measure(experiment: Experiment) -> tuple[dict, Drawn, Drawn]:
    """Return all measures but the cost as JSON values, what the teacher drew and what the student drew."""
    # A student of few steps answers with the average velocity of a whole step, which is not the teacher's answer:
    has_velocity = experiment.student_options.sampler == experiment.teacher_options.sampler
    asked = ComparedTeacher(experiment.teacher, experiment.student) if has_velocity else experiment.teacher
    teacher = experiment.draw("teacher", asked, experiment.teacher_options)
    student = experiment.draw("student", experiment.student, experiment.student_options)
    unit = measures.spread(teacher.latents)
    noise = measures.noise_parts(student.latents, teacher.latents, experiment.num_seeds, unit)
    sharpness = [measures.high_frequency_energy(drawn.pictures) for drawn in (student, teacher)]
    results = {
        "endpoint": {
            "latent_relative_error": measures.endpoint_error(student.latents, teacher.latents),
            "psnr_db": measures.psnr(student.pictures, teacher.pictures),
        },
        "noise": {"num_noises": experiment.num_seeds, **noise, "meaning": NOISE_MEANING},
        "high_frequency_energy": compared(*sharpness),
    }
    if student.verdicts and teacher.verdicts:
        facts = {"student": accuracy(student.verdicts), "teacher": accuracy(teacher.verdicts)}
        ratio = measures.ratio(student.right, teacher.right)
        results["accuracy"] = {**facts, "ratio": ratio, "num_pictures": len(student.verdicts)}
    if isinstance(asked, ComparedTeacher):
        results["velocity_error"] = asked.results()
    if experiment.scorers:
        prompts, options = experiment.prompts[:: experiment.num_seeds], experiment.teacher_options
        pictures = {"student": student.pictures, "teacher": teacher.pictures}
        results |= compare_scores(experiment.scorers, prompts, pictures, experiment.batch_size, options.device)
    return results, teacher, student


# ---- cost ----


def measure_cost(experiment: Experiment) -> dict[str, dict]:
    """Return parameters, and seconds and FLOPs of one sampling step, for a single picture; guidance takes two passes."""
    options = experiment.teacher_options
    latents, sigma = experiment.noise[:1].to(options.device), torch.ones(1)
    text = experiment.embeds.batch([0], options.device)
    fields = {"student": experiment.student, "teacher": experiment.teacher}
    asked = {
        name: partial(autocast(field.velocity, options.device, options.compute_dtype), latents, sigma, *text)
        for name, field in fields.items()
    }
    parameters = {
        name: sum(count_parameters(expert.config).total for expert in field.experts.values())
        for name, field in fields.items()
    }
    height, width = latents.shape[2:]
    flops = {name: step_flops(field, (height, width), experiment.num_tokens) for name, field in fields.items()}
    seconds = measures.median_seconds(asked, options.device)
    rows: dict[str, dict] = {"parameters": parameters, "step_seconds": seconds, "step_flops": flops}
    return {name: compared(**row) for name, row in rows.items()}


def compared(student: float, teacher: float) -> dict[str, float | None]:
    return {"student": student, "teacher": teacher, "ratio": measures.ratio(student, teacher)}


def step_flops(field: Teacher, latent_size: tuple[int, int], num_tokens: int, sigma: float = 1.0) -> int:
    """Return the FLOPs of one sampling step, for one picture.

    Args:
        latent_size: height and width of the picture's latents.
        num_tokens: text tokens of the prompt.
    """
    config = field.experts["high"].config
    asked = config, num_image_tokens(config, latent_size), num_tokens + 1  # and the token that stands for the padding
    if field.scale_at(sigma) == 1.0:
        return transformer_flops(*asked)
    return transformer_flops(*asked, len(field.negative_prompt_embeds) + 1)


# ---- each prompt ----


@dataclass(frozen=True, kw_only=True)
class PromptMeasures:
    """The measures of one prompt over all of its noises; None where something was not measured.

    Attributes:
        latent_distance: how far the student's latents are from the teacher's, in the unit of `measures.endpoint_error`, whose
            square is the mean of these squares.
        psnr_db: mean over the pictures.
        sharpness: high-frequency energy of the student's pictures, as a share of the teacher's.
        right_student, right_teacher: share of the pictures that the judge holds for right.
    """

    latent_distance: float | None
    psnr_db: float
    sharpness: float | None
    right_student: float | None
    right_teacher: float | None


def measure_prompts(student: Drawn, teacher: Drawn, num_seeds: int) -> list[PromptMeasures]:
    """Return the measures of every prompt; its `num_seeds` noises follow one another."""
    unit = measures.spread(teacher.latents)
    parts = [slice(start, start + num_seeds) for start in range(0, len(student.latents), num_seeds)]
    return [_measure_prompt(student.part(samples), teacher.part(samples), unit) for samples in parts]


def _measure_prompt(student: Drawn, teacher: Drawn, unit: float) -> PromptMeasures:
    return PromptMeasures(
        latent_distance=measures.endpoint_error(student.latents, teacher.latents, unit) if unit else None,
        psnr_db=measures.psnr(student.pictures, teacher.pictures),
        sharpness=measures.ratio(*(measures.high_frequency_energy(drawn.pictures) for drawn in (student, teacher))),
        right_student=student.right,
        right_teacher=teacher.right,
    )
