"""One comparison of a student with its teacher: both draw from the same noise, and what they drew is measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wandistiller.evaluation import measures
from wandistiller.evaluation.judges import Judge, Verdict, mean_verdict
from wandistiller.evaluation.pair import Artist
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample_in_batches
from wandistiller.wan.prompt_embeds import PromptEmbeds


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Student and teacher, and all that both draw with.

    Attributes:
        prompts: each once, of which `embeds` are the text tokens.
        noise: (samples, C, H, W); the `num_seeds` samples of a prompt lie one after another.
        seeds: of the noise of each sample.
        judge: of --judge; None without.
    """

    student: Artist
    teacher: Artist
    prompts: list[str]
    embeds: PromptEmbeds
    noise: Tensor
    seeds: list[int]
    judge: Judge | None
    num_seeds: int
    batch_size: int

    @property
    def num_tokens(self) -> int:
        """Text tokens of the first prompt, for which costs are counted."""
        return len(self.embeds.read(0))

    @property
    def latent_size(self) -> tuple[int, int]:
        height, width = self.noise.shape[2:]
        return height, width

    def first(self, num_prompts: int) -> "Experiment":
        """Return the same with its first prompts alone."""
        count = num_prompts * self.num_seeds
        return replace(
            self,
            prompts=self.prompts[:num_prompts],
            embeds=self.embeds.part(0, num_prompts),
            noise=self.noise[:count],
            seeds=self.seeds[:count],
        )

    def sample(
        self, field: VelocityField, options: SamplingOptions, progress: Callable[[int], object] | None = None
    ) -> Tensor:
        """Return the latents (samples, C, H, W) that a field draws, on the CPU."""
        indices = [sample // self.num_seeds for sample in range(len(self.noise))]
        return sample_in_batches(field, self.noise, self.embeds, indices, options, self.batch_size, progress)

    def draw(self, name: str, field: VelocityField, options: SamplingOptions) -> "Drawn":
        """Draw every sample, decode it and judge it; a bar shows the progress, and a line tells the time it took."""
        name, start = f"{name}, {options.num_inference_steps} steps", time.perf_counter()
        with tqdm(total=len(self.noise), desc=name, disable=None, leave=False) as bar:
            latents = self.sample(field, options, bar.update)
        print(f"{name}: {len(latents)} pictures, {time.perf_counter() - start:.1f} s", flush=True)
        return self.drawn(latents)

    def drawn(self, latents: Tensor) -> "Drawn":
        own = self.teacher
        statistics = own.settings.latents_mean, own.settings.latents_std
        pictures = np.concatenate([own.vae.pictures(part, *statistics) for part in latents.split(self.batch_size)])
        prompts = [prompt for prompt in self.prompts for _ in range(self.num_seeds)]
        return Drawn(latents, pictures, self.judge(pictures, prompts) if self.judge else None)


@dataclass(frozen=True)
class Drawn:
    """Latents (samples, C, H, W) that one of the two drew, their pictures (samples, H, W, 3) uint8, and the judge's verdicts."""

    latents: Tensor
    pictures: np.ndarray
    verdicts: list[Verdict] | None = None

    @property
    def right(self) -> float | None:
        """Share of the pictures that the judge holds for right; None where it does not say that."""
        return mean_verdict(self.verdicts).get("correct") if self.verdicts else None


class ComparedTeacher:
    """The teacher as a velocity field; the student is asked at each state too, and its relative error noted in `errors`."""

    def __init__(self, teacher: VelocityField, student: VelocityField):
        self.teacher, self.student = teacher, student
        self.errors: list[Tensor] = []

    def velocity(self, latents: Tensor, sigma: Tensor, *text: Tensor) -> Tensor:
        expected = self.teacher.velocity(latents, sigma, *text)
        found = self.student.velocity(latents, sigma, *text)
        self.errors.append(measures.relative_errors(found, expected).cpu())
        return expected


def measure(experiment: Experiment) -> tuple[dict, Drawn, Drawn]:
    """Return all measures but the cost as JSON values, what the teacher drew and what the student drew."""
    own, theirs = experiment.student, experiment.teacher
    # A student of few steps answers with the average velocity of a whole step: the teacher's answer only if that takes the same steps.
    has_velocity = own.options.sampler == theirs.options.sampler and (
        own.options.sampler != "euler" or own.options.num_inference_steps == theirs.options.num_inference_steps
    )
    asked = ComparedTeacher(theirs.field, own.field) if has_velocity else theirs.field
    teacher = experiment.draw("teacher", asked, theirs.options)
    student = experiment.draw("student", own.field, own.options)
    results: dict = {
        "endpoint": {"latent_relative_error": measures.endpoint_error(student.latents, teacher.latents)},
        "noise": {
            "num_noises": experiment.num_seeds,
            **measures.noise_parts(student.latents, teacher.latents, experiment.num_seeds),
        },
    }
    if student.verdicts and teacher.verdicts:
        facts = {"student": mean_verdict(student.verdicts), "teacher": mean_verdict(teacher.verdicts)}
        results["accuracy"] = {**facts, "num_pictures": len(student.verdicts)}
    if isinstance(asked, ComparedTeacher):
        results["velocity_error"] = {"mean": float(torch.cat(asked.errors).mean())}
    return results, teacher, student


# ---- each prompt ----


@dataclass(frozen=True)
class PromptMeasures:
    """The measures of one prompt over all of its noises.

    Attributes:
        distance: how far the student's latents are from the teacher's, in the unit of `measures.endpoint_error`, whose square is
            the mean of these squares; nan where the teacher's latents are all alike.
        right: share of the pictures that the judge holds for right, of student and teacher; None without a judge.
    """

    distance: float
    right: tuple[float, float] | None


def measure_prompts(student: Drawn, teacher: Drawn, num_seeds: int) -> list[PromptMeasures]:
    """Return the measures of every prompt; its `num_seeds` noises follow one another."""
    unit, found = measures.spread(teacher.latents) or float("nan"), []
    for start in range(0, len(student.latents), num_seeds):
        own, theirs = (
            Drawn(one.latents[part], one.pictures[part], one.verdicts and one.verdicts[part])
            for one in (student, teacher)
            for part in [slice(start, start + num_seeds)]
        )
        right = None if own.right is None or theirs.right is None else (own.right, theirs.right)
        found.append(PromptMeasures(measures.endpoint_error(own.latents, theirs.latents, unit), right))
    return found
