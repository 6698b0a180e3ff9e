"""One comparison of a student with its teacher: both draw from the same noise, and what they drew is measured."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wandistiller.evaluation import measures, noise_parts
from wandistiller.evaluation.judges import Judge, Verdict, accuracy
from wandistiller.model.sizes import count_parameters
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample_in_batches
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.vae import decode

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


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
    vae: "AutoencoderKLWan"
    judge: Judge | None
    num_seeds: int
    batch_size: int

    @property
    def can_compare_velocities(self) -> bool:
        """A student of few steps answers with the average velocity of a whole step, which is not the teacher's answer."""
        return self.student_options.sampler == self.teacher_options.sampler

    def summary(self) -> str:
        """Return one line for the screen."""
        options = self.teacher_options
        return (
            f"{len(self.embeds)} prompts x {self.num_seeds} seeds, teacher {options.num_inference_steps} steps, student "
            f"{self.student_options.num_inference_steps}, shift {options.shift:g}, "
            f"teacher's guidance_scale {self.settings.guidance_scale:g}"
        )

    def draw(self, name: str, field: VelocityField, options: SamplingOptions) -> Tensor:
        """Return the latents of every sample; a bar shows the progress, and a line tells the time it took."""
        name, start = f"{name}, {options.num_inference_steps} steps", time.perf_counter()
        with tqdm(total=len(self.noise), desc=name, disable=None, leave=False) as bar:
            latents = sample_in_batches(
                field, self.noise, self.embeds, self.prompt_indices, options, self.batch_size, bar.update
            )
        print(f"{name}: {len(latents)} pictures, {time.perf_counter() - start:.1f} s", flush=True)
        return latents

    def decode(self, latents: Tensor) -> np.ndarray:
        """Return the pictures (samples, H, W, 3) uint8 of latents."""
        mean, std = self.settings.latents_mean, self.settings.latents_std
        return np.concatenate([decode(self.vae, part, mean, std) for part in latents.split(self.batch_size)])

    def drawn(self, latents: Tensor) -> "Drawn":
        """Decode latents and judge the pictures."""
        pictures = self.decode(latents)
        return Drawn(latents, pictures, self.judge(pictures, self.prompts) if self.judge else None)


@dataclass(frozen=True)
class Drawn:
    """Latents (samples, C, H, W) that one of the two drew, their pictures (samples, H, W, 3) uint8, and the judge's verdicts."""

    latents: Tensor
    pictures: np.ndarray
    verdicts: list[Verdict] | None = None


def measure(experiment: Experiment) -> tuple[dict, Drawn, Drawn]:
    """Return all measures but the cost as JSON values, what the teacher drew and what the student drew."""
    comparison = measures.VelocityComparison(experiment.student, experiment.num_seeds)
    if experiment.can_compare_velocities:
        recorded = measures.Recorded(experiment.teacher, comparison.note)
        latents_teacher = experiment.draw("teacher and student's velocity", recorded, experiment.teacher_options)
    else:
        latents_teacher = experiment.draw("teacher", experiment.teacher, experiment.teacher_options)
    latents_student = experiment.draw("student", experiment.student, experiment.student_options)
    student, teacher = experiment.drawn(latents_student), experiment.drawn(latents_teacher)

    results = size_results(experiment, student, teacher)
    results |= {
        "teacher_at_fewer_steps": measure_fewer_steps(
            experiment, teacher, results["endpoint"]["latent_relative_error"]
        ),
        **compare_variety(student, teacher, experiment.num_seeds),
    }
    if experiment.can_compare_velocities:
        results["velocity_error"] = comparison.results()
        unit = measures.spread(teacher.latents)
        results["noise"]["by_sigma"] = comparison.noise.by_sigma(unit, measures.NUM_BUCKETS)
    return results, teacher, student


def measure_size(experiment: Experiment) -> tuple[dict, Drawn, Drawn]:
    """Return what tells of one more image size, without what `measure` adds to it; what the teacher and the student drew."""
    student = experiment.drawn(experiment.draw("student", experiment.student, experiment.student_options))
    teacher = experiment.drawn(experiment.draw("teacher", experiment.teacher, experiment.teacher_options))
    return size_results(experiment, student, teacher), teacher, student


def size_results(experiment: Experiment, student: Drawn, teacher: Drawn) -> dict:
    """Return the measures that every image size has."""
    results = {
        "endpoint": compare_endpoints(student, teacher),
        "noise": compare_noise(student, teacher, experiment.num_seeds),
    }
    if student.verdicts and teacher.verdicts:
        results["accuracy"] = compare_accuracy(student.verdicts, teacher.verdicts)
    return results


def compare_endpoints(student: Drawn, teacher: Drawn) -> dict:
    """Return how far what the student drew is from what the teacher drew from the same noise."""
    return {
        "latent_relative_error": measures.endpoint_error(student.latents, teacher.latents),
        "psnr_db": statistics.fmean(measures.psnr(student.pictures, teacher.pictures)),
        "ssim": statistics.fmean(measures.ssim(student.pictures, teacher.pictures)),
    }


def compare_noise(student: Drawn, teacher: Drawn, num_seeds: int) -> dict:
    """Return how the two agree in what the prompt decides and in what the noise decides; of one seed nothing is known."""
    by_prompt = [drawn.latents.unflatten(0, (-1, num_seeds)) for drawn in (student, teacher)]
    sums = noise_parts.noise_sums(*by_prompt) if num_seeds > 1 else noise_parts.NOTHING
    parts = noise_parts.noise_parts(sums, measures.spread(teacher.latents))
    return {"num_noises": num_seeds, **parts, "meaning": noise_parts.MEANING}


def compare_variety(student: Drawn, teacher: Drawn, num_seeds: int) -> dict:
    """Return what averages over pixels hide: blur, too little diversity, and prompts that are not listened to."""
    both = {"student": student, "teacher": teacher}
    by_prompt = {name: drawn.latents.unflatten(0, (-1, num_seeds)) for name, drawn in both.items()}
    measured = {
        "high_frequency_energy": {name: measures.high_frequency_energy(drawn.pictures) for name, drawn in both.items()},
        "diversity": {name: measures.diversity(latents) for name, latents in by_prompt.items()},
        "prompt_sensitivity": {name: measures.prompt_sensitivity(latents) for name, latents in by_prompt.items()},
    }
    return {name: row | {"ratio": measures.ratio(row["student"], row["teacher"])} for name, row in measured.items()}


def compare_accuracy(student: list[Verdict], teacher: list[Verdict]) -> dict:
    """Return the share of pictures that the judge holds for right, fact by fact."""
    of_student, of_teacher = accuracy(student), accuracy(teacher)
    return {
        "student": of_student,
        "teacher": of_teacher,
        "ratio": measures.ratio(of_student["correct"], of_teacher["correct"]),
        "num_pictures": len(student),
    }


def measure_fewer_steps(experiment: Experiment, teacher: Drawn, student_error: float) -> dict:
    """Return the teacher's own endpoint error (and accuracy) at fewer steps, and between which the student's error lies."""
    errors, accuracies = {}, {}
    full, own = experiment.teacher_options.num_inference_steps, experiment.student_options.num_inference_steps
    for steps in measures.fewer_steps(full, own):
        options = replace(experiment.teacher_options, num_inference_steps=steps)
        latents = experiment.draw("teacher", experiment.teacher, options)
        errors[steps] = measures.endpoint_error(latents, teacher.latents)
        if experiment.judge is not None and (verdicts := experiment.drawn(latents).verdicts):
            accuracies[steps] = accuracy(verdicts)["correct"]
    low, high = measures.steps_of_equal_error(student_error, errors)
    return {
        "latent_relative_error": errors,
        **({"accuracy": accuracies} if accuracies else {}),
        "student_equals": {"at_least_steps": low, "fewer_than_steps": high},
    }


def measure_cost(experiment: Experiment) -> dict:
    """Return parameters, and seconds and FLOPs of one forward pass and of one sampling step, for a single picture.

    A sampling step of a guided teacher takes two passes.
    """
    options = experiment.teacher_options
    device, dtype = options.device, options.compute_dtype
    latents, sigma, timestep = experiment.noise[:1].to(device), torch.ones(1), torch.tensor([1000.0], device=device)
    text = experiment.embeds.batch([0], device)
    fields = {"student": experiment.student, "teacher": experiment.teacher}

    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, field in fields.items():
        expert = field.experts["high"]
        calls[name, "forward"] = partial(expert, latents, timestep, *text)
        calls[name, "step"] = partial(field.velocity, latents, sigma, *text)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        seconds = measures.median_seconds(calls, device)

    height, width = latents.shape[2:]
    flops = {name: measures.picture_flops(field, (height, width), text[0].shape[1]) for name, field in fields.items()}
    rows: dict[str, dict[str, float]] = {
        "parameters": {
            name: sum(count_parameters(expert.config).total for expert in field.experts.values())
            for name, field in fields.items()
        },
        "forward_seconds": {name: seconds[name, "forward"] for name in fields},
        "forward_flops": {name: forward for name, (forward, _) in flops.items()},
        "step_seconds": {name: seconds[name, "step"] for name in fields},
        "step_flops": {name: step for name, (_, step) in flops.items()},
    }
    return {name: row | {"ratio": row["student"] / row["teacher"]} for name, row in rows.items()}
