"""Student and teacher drawn from the same noise, and everything that is measured on what they drew."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wandistiller.evaluation import measures, noise_parts
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample_in_batches
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.vae import decode

Judge = Callable[[np.ndarray, str], dict]


@dataclass
class Experiment:
    """Both velocity fields and everything they draw from."""

    student: Teacher
    teacher: Teacher
    embeds: PromptEmbeds
    prompts: list[str]  # of each sample
    prompt_indices: list[int]
    noise: Tensor
    options: SamplingOptions  # the teacher's
    student_options: SamplingOptions
    settings: TeacherSettings
    vae: object
    num_seeds: int
    batch_size: int

    def draw(self, name: str, field: VelocityField, options: SamplingOptions) -> Tensor:
        """Latents of every sample, with a bar on a terminal and a line when done."""
        name, start = f"{name}, {options.num_inference_steps} steps", time.perf_counter()
        with tqdm(total=len(self.noise), desc=name, disable=None, leave=False) as bar:
            latents = sample_in_batches(
                field, self.noise, self.embeds, self.prompt_indices, options, self.batch_size, bar.update
            )
        print(f"{name}: {len(latents)} pictures, {time.perf_counter() - start:.1f} s", flush=True)
        return latents

    def decode(self, latents: Tensor) -> np.ndarray:
        parts = latents.split(self.batch_size)
        return np.concatenate(
            [decode(self.vae, part, self.settings.latents_mean, self.settings.latents_std) for part in parts]
        )


def measure(experiment: Experiment, judge: Judge | None) -> tuple[dict, np.ndarray, np.ndarray]:
    """All measures as JSON values, and the pictures of teacher and student."""
    has_velocity = experiment.student_options.sampler == experiment.options.sampler
    recorded = measures.RecordedErrors(experiment.teacher, experiment.student, experiment.num_seeds)
    field = recorded if has_velocity else experiment.teacher
    name = "teacher and student's velocity" if has_velocity else "teacher"
    latents_teacher = experiment.draw(name, field, experiment.options)
    latents_student = experiment.draw("student", experiment.student, experiment.student_options)
    pictures_teacher, pictures_student = experiment.decode(latents_teacher), experiment.decode(latents_student)
    error = measures.endpoint_error(latents_student, latents_teacher)
    results = {
        "endpoint": {
            "latent_relative_error": error,
            "psnr_db": statistics.fmean(measures.psnr(pictures_student, pictures_teacher)),
            "ssim": statistics.fmean(measures.ssim(pictures_student, pictures_teacher)),
        },
        "teacher_at_fewer_steps": measure_fewer_steps(experiment, latents_teacher, error, judge),
        "noise": measure_noise(experiment.num_seeds, latents_student, latents_teacher),
        **compare_hidden(experiment, (latents_student, latents_teacher), (pictures_student, pictures_teacher)),
    }
    if has_velocity:  # a student of few steps answers with the average over a whole step instead
        results["velocity_error"] = {
            "mean": float(recorded.errors.mean()),
            "by_sigma": measures.bucket_means(recorded.sigmas, recorded.errors),
        }
        unit = measures.spread(latents_teacher)
        results["noise"]["by_sigma"] = recorded.noise.by_sigma(unit, measures.NUM_BUCKETS)
    if judge is not None:
        both = [measures.accuracy(part, experiment.prompts, judge) for part in (pictures_student, pictures_teacher)]
        results["accuracy"] = {
            "student": both[0],
            "teacher": both[1],
            "ratio": measures.ratio(both[0]["correct"], both[1]["correct"]),
            "num_pictures": len(experiment.prompts),
        }
    return results, pictures_teacher, pictures_student


def measure_noise(num_seeds: int, latents_student: Tensor, latents_teacher: Tensor) -> dict:
    """The prompt's part and the noise part of what both drew, as `evaluation.noise_parts` defines them; None with one seed."""
    grouped = [part.unflatten(0, (-1, num_seeds)) for part in (latents_student, latents_teacher)]
    sums = noise_parts.noise_sums(*grouped) if num_seeds > 1 else noise_parts.NOTHING
    parts = noise_parts.noise_parts(sums, measures.spread(latents_teacher))
    return {"num_noises": num_seeds, **parts, "meaning": noise_parts.MEANING}


def compare_hidden(
    experiment: Experiment, latents: tuple[Tensor, Tensor], pictures: tuple[np.ndarray, np.ndarray]
) -> dict:
    """Blur, diversity and prompt sensitivity of (student, teacher), which averages over pixels hide."""
    by_prompt = [part.unflatten(0, (-1, experiment.num_seeds)) for part in latents]
    measured = {
        "high_frequency_energy": [measures.high_frequency_energy(part) for part in pictures],
        "diversity": [measures.diversity(part) for part in by_prompt],
        "prompt_sensitivity": [measures.prompt_sensitivity(part) for part in by_prompt],
    }
    return {
        name: {"student": student, "teacher": teacher, "ratio": measures.ratio(student, teacher)}
        for name, (student, teacher) in measured.items()
    }


def measure_fewer_steps(
    experiment: Experiment, latents_teacher: Tensor, student_error: float, judge: Judge | None
) -> dict:
    """The teacher's own endpoint error (and accuracy) at fewer steps, and between which of them the student's error lies."""
    errors, accuracies = {}, {}
    full, own = experiment.options.num_inference_steps, experiment.student_options.num_inference_steps
    for steps in measures.fewer_steps(full, own):
        options = replace(experiment.options, num_inference_steps=steps)
        latents = experiment.draw("teacher", experiment.teacher, options)
        errors[steps] = measures.endpoint_error(latents, latents_teacher)
        if judge is not None:
            facts = measures.accuracy(experiment.decode(latents), experiment.prompts, judge)
            accuracies[steps] = facts["correct"]
    low, high = measures.steps_of_equal_error(student_error, errors)
    return {
        "latent_relative_error": errors,
        **({"accuracy": accuracies} if accuracies else {}),
        "student_equals": {"at_least_steps": low, "fewer_than_steps": high},
    }


def measure_cost(experiment: Experiment) -> dict:
    """Parameters, time and FLOPs of one forward pass and of one sampling step (guidance takes two passes), one picture."""
    device = experiment.options.device
    latents, sigma = experiment.noise[:1].to(device), torch.ones(1)
    text = experiment.embeds.batch([0], device)
    dtype = experiment.options.compute_dtype
    fields = {"student": experiment.student, "teacher": experiment.teacher}
    calls = {}
    for name, field in fields.items():
        expert = field.experts["high"]
        calls[name, "forward"] = lambda expert=expert: expert(latents, torch.tensor([1000.0], device=device), *text)
        calls[name, "step"] = lambda field=field: field.velocity(latents, sigma, *text)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        seconds = measures.median_seconds(calls)
    flops = {}
    for name, field in fields.items():
        sizes = measures.picture_flops(field, latents.shape[-1], text[0].shape[1])
        flops[name, "forward"], flops[name, "step"] = sizes
    counts = {name: measures.count_parameters(*field.experts.values()) for name, field in fields.items()}
    table = {"parameters": counts}
    for what in ("forward", "step"):
        table[f"{what}_seconds"] = {name: seconds[name, what] for name in fields}
        table[f"{what}_flops"] = {name: flops[name, what] for name in fields}
    return {name: row | {"ratio": row["student"] / row["teacher"]} for name, row in table.items()}
