"""The frontier: how near student and teacher come to the teacher's own pictures in fewer steps, and what each costs.

The bar of a small student is not the teacher in all of its steps but the teacher in fewer, drawn by the sampler that is nearest at
that number: a student pays where it is as near as that at less cost.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor
from tqdm import tqdm

from wandistiller.evaluation import measures
from wandistiller.evaluation.cost import picture_flops
from wandistiller.evaluation.experiment import Experiment
from wandistiller.sampling.sampler import SAMPLER_NAMES, SamplingOptions

TEACHER_STEPS = (1, 2, 3, 4, 5, 6, 8, 10)
SAMPLERS = ("euler", "unipc", "dpm++")
NEAR_BEST = 1.1


def measure_frontier(
    experiment: Experiment, full: Tensor, own: Tensor, student_steps: Sequence[int], step_seconds: dict[str, float]
) -> dict:
    """Draw with both in fewer steps; return a row for each number of steps, and the number that is recommended for the student.

    Args:
        full: latents of the teacher in all of its steps, which every row is held against.
        own: latents of the student in its own number of steps.
        student_steps: numbers of steps to draw the student in.
        step_seconds: of one sampling step, measured, of "student" and "teacher".
    """
    of_teacher, of_student = experiment.teacher.options, experiment.student.options
    rows = Rows(experiment, full, step_seconds)
    student = [rows.row("student", of_student, own)]
    for steps in tqdm(student_steps, desc="student in fewer steps", disable=None, leave=False):
        if steps != of_student.num_inference_steps:
            student.append(rows.nearest("student", [replace(of_student, num_inference_steps=steps)]))
    student.sort(key=lambda row: row["steps"])
    fewer = [steps for steps in TEACHER_STEPS if steps < of_teacher.num_inference_steps]
    bar = tqdm(fewer, desc="teacher in fewer steps", disable=None, leave=False)
    teacher = [rows.nearest("teacher", ways(of_teacher, steps)) for steps in bar]
    teacher.append(rows.row("teacher", of_teacher, full))
    for row in student:
        row |= compare_cost(row, teacher)
    return {
        "num_prompts": len(experiment.embeds),
        "num_seeds": experiment.num_seeds,
        "rows": [*student, *teacher],
        "recommended_steps": recommended_steps({row["steps"]: row["endpoint"] for row in student}),
    }


def ways(options: SamplingOptions, steps: int) -> list[SamplingOptions]:
    """Return the ways to draw with a teacher in a number of steps; one with noise levels of its own keeps to its sampler."""
    samplers = SAMPLERS if options.sampler in SAMPLERS else [options.sampler]
    alike = 1 if steps <= 2 else len(samplers)  # in one step or two the samplers of higher order are Euler's too
    return [replace(options, num_inference_steps=steps, sampler=sampler) for sampler in samplers[:alike]]


class Rows:
    """Draws the rows of a frontier.

    Args:
        full: latents of the teacher in all of its steps, from the noises of the experiment.
    """

    def __init__(self, experiment: Experiment, full: Tensor, step_seconds: dict[str, float]):
        self.experiment, self.full, self.step_seconds = experiment, full, step_seconds
        self.unit = measures.spread(full)
        self.full_flops = picture_flops(experiment.teacher.field, experiment.teacher.options, experiment)

    def nearest(self, who: str, choices: Sequence[SamplingOptions]) -> dict:
        """Draw every sample in each of these ways, and return the row of the one nearest to the full drawing."""
        field = getattr(self.experiment, who).field
        drawn = [self.experiment.sample(field, options) for options in choices]
        errors = [measures.endpoint_error(latents, self.full, self.unit) for latents in drawn]
        best = int(np.nanargmin([*errors, math.inf])) % len(choices)  # of which any may have left the numbers
        return self.row(who, choices[best], drawn[best])

    def row(self, who: str, options: SamplingOptions, latents: Tensor) -> dict:
        """Return how near latents are that were drawn in some way, and what that costs."""
        own, steps = self.experiment, options.num_inference_steps
        noise = measures.noise_parts(latents, self.full, own.num_seeds)
        return {
            "who": who,
            "steps": steps,
            "sampler": SAMPLER_NAMES[options.sampler],
            "cost": picture_flops(getattr(own, who).field, options, own) / self.full_flops,
            "seconds": steps * self.step_seconds[who],
            "endpoint": measures.endpoint_error(latents, self.full, self.unit),
            "noise_cosine": noise["cosine"],
            "noise_size": noise["norm_ratio"],
            "right": own.drawn(latents).right if own.judge else None,
        }


def compare_cost(row: dict, teacher: Sequence[dict]) -> dict:
    """Return in how many steps the teacher is as near as the student of a row, and how much more it then costs.

    Both are None where the student is farther than the teacher in its fewest steps. Where it is nearer than the teacher in every
    measured number of steps below the full one, both are those of the largest of these, and `at_least` is true.
    """
    steps, is_beyond = measures.equal_steps(row["endpoint"], {one["steps"]: one["endpoint"] for one in teacher[:-1]})
    if steps is None:
        return {"teacher_steps": None, "at_least": False, "times_cheaper": None}
    cost = float(np.interp(steps, [one["steps"] for one in teacher], [one["cost"] for one in teacher]))
    return {"teacher_steps": steps, "at_least": is_beyond, "times_cheaper": cost / row["cost"]}


def recommended_steps(errors: dict[int, float]) -> int | None:
    """Return the fewest steps whose error is at most NEAR_BEST times the smallest; None where no error is a number."""
    smallest = min((error for error in errors.values() if math.isfinite(error)), default=math.nan)
    return min((steps for steps, error in errors.items() if error <= NEAR_BEST * smallest), default=None)
