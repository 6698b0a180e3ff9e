"""The frontier of fields whose endpoints are known: Gaussian data, which diffusers' schedulers sample by hand, and straight lines."""

import math
from dataclasses import dataclass, replace

import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from wandistiller import StudentConfig
from wandistiller.evaluation import measures
from wandistiller.evaluation.experiment import Experiment
from wandistiller.evaluation.frontier import measure_frontier, recommended_steps
from wandistiller.evaluation.pair import Artist
from wandistiller.model.sizes import transformer_flops
from wandistiller.reports.plots import save_frontier
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions
from wandistiller.wan.prompt_embeds import mock_prompt_embeds

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000, "flow_shift": 3.0}
SCHEDULERS = {
    "UniPC": lambda: UniPCMultistepScheduler(**FLOW),
    "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**FLOW),
    "Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
NOISE = seeded_noise(range(6), (16, 8, 8))
SECONDS = {"student": 0.25, "teacher": 1.0}


@dataclass
class Expert:
    config: StudentConfig


class Field:
    """A velocity field with the shape of a model, of which the costs are counted."""

    def __init__(self, velocity, depth: int):
        shape = {"hidden_size": 24, "num_heads": 2, "num_channels": 16, "image_size": 64, "text_encoder_output_dim": 20}
        self.of, self.experts = velocity, {"high": Expert(StudentConfig(block="wan", depth=depth, **shape))}

    def scale_at(self, sigma: float) -> float:
        return 1.0

    def velocity(self, latents: Tensor, sigma: Tensor, *text: Tensor) -> Tensor:
        return self.of(latents, sigma.float().view(-1, 1, 1, 1))


def gaussian(latents: Tensor, sigma: Tensor, variance: float = 0.3) -> Tensor:
    """The exact velocity E[noise - x_0 | x_sigma] of data N(0, variance)."""
    x_0 = variance * (1 - sigma) / (variance * (1 - sigma) ** 2 + sigma**2) * latents
    return (latents - x_0) / sigma


def by_hand(name: str, steps: int) -> Tensor:
    scheduler, latents = SCHEDULERS[name](), NOISE
    scheduler.set_timesteps(
        **{"sigmas": [1 - i / steps for i in range(steps)]} if name == "Euler" else {"num_inference_steps": steps}
    )
    for timestep in scheduler.timesteps:
        velocity = gaussian(latents, timestep.float().view(1, 1, 1, 1) / 1000)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


FULL = by_hand("UniPC", 20)


def frontier_of(student_velocity, student_steps=(), **options) -> dict:
    drawn = SamplingOptions(shift=3.0, num_inference_steps=20)
    experiment = Experiment(
        student=Artist(Field(student_velocity, 1), replace(drawn, **options), None, None),
        teacher=Artist(Field(gaussian, 4), drawn, None, None),
        prompts=["a", "b", "c"],
        embeds=mock_prompt_embeds(["a", "b", "c"], 20),
        noise=NOISE,
        seeds=list(range(6)),
        judge=None,
        num_seeds=2,
        batch_size=4,
    )
    own = experiment.sample(experiment.student.field, experiment.student.options)
    return measure_frontier(experiment, FULL, own, student_steps, SECONDS)


def rows_of(frontier: dict, who: str) -> dict[int, dict]:
    return {row["steps"]: row for row in frontier["rows"] if row["who"] == who}


def test_the_teacher_in_fewer_steps_is_drawn_by_the_nearest_of_diffusers_samplers():
    rows = rows_of(frontier_of(gaussian), "teacher")
    assert list(rows) == [1, 2, 3, 4, 5, 6, 8, 10, 20]
    for steps in (1, 3, 5, 10):
        errors = {name: measures.endpoint_error(by_hand(name, steps), FULL) for name in SCHEDULERS}
        assert rows[steps]["endpoint"] == pytest.approx(min(errors.values()), rel=1e-3)
        if steps > 2:  # else all are Euler's method
            assert rows[steps]["sampler"] == min(errors, key=errors.get)
        assert rows[steps]["cost"] == pytest.approx(steps / 20) and rows[steps]["seconds"] == steps
    assert rows[20]["endpoint"] == 0 and rows[20]["noise_cosine"] == pytest.approx(1)


def line_to(end: Tensor):
    """Straight lines from each of NOISE to its end, x_sigma = (1 - sigma) end + sigma noise; each state knows its own line."""

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        off = latents[:, None] - (1 - sigma[:, None]) * end - sigma[:, None] * NOISE  # (B, lines, C, H, W)
        own = off.flatten(2).norm(dim=2).argmin(dim=1)
        return NOISE[own] - end[own]

    return velocity


@pytest.mark.parametrize("steps", [1, 4])
def test_a_student_at_a_known_distance_is_as_near_as_the_teacher_in_steps_between(steps):
    """A straight line ends where it leads in any number of steps: at the geometric mean of the teacher's errors in 4 and 5."""
    errors = {one: row["endpoint"] for one, row in rows_of(frontier_of(gaussian), "teacher").items()}
    error = math.sqrt(errors[4] * errors[5])
    end = FULL + error * measures.spread(FULL) / math.sqrt(FULL[0].numel())
    frontier = frontier_of(line_to(end), num_inference_steps=steps)
    row = rows_of(frontier, "student")[steps]
    assert row["endpoint"] == pytest.approx(error, rel=1e-3)
    assert row["teacher_steps"] == pytest.approx(math.sqrt(20), rel=1e-3) and not row["at_least"]
    one, four = (transformer_flops(Field(gaussian, depth).experts["high"].config, 16, 3) for depth in (1, 4))
    assert row["cost"] == pytest.approx(steps * one / (20 * four))
    assert row["times_cheaper"] == pytest.approx(math.sqrt(20) * four / (steps * one), rel=1e-3)
    assert row["noise_cosine"] == pytest.approx(1, abs=1e-4), "what is added to all alike is no noise part"


def test_a_student_nearer_or_farther_than_every_step_of_the_teacher():
    near, far = (rows_of(frontier_of(line_to(end), [1]), "student")[1] for end in (FULL, FULL + 5))
    assert near["at_least"] and near["teacher_steps"] == 10
    assert (far["teacher_steps"], far["times_cheaper"], far["at_least"]) == (None, None, False)


def test_a_curve_that_rises_once_counts_as_its_smallest_error_so_far():
    assert measures.equal_steps(0.2, {1: 1.0, 2: 0.2, 3: 0.4, 4: 0.1}) == (pytest.approx(3, abs=1), False)
    assert measures.equal_steps(0.1, {}) == (None, False)
    assert measures.equal_steps(0.0, {1: 0.0, 2: 0.0})[1] is False


@pytest.mark.parametrize(
    "errors, steps",
    [
        ({1: 1.7, 2: 0.378, 4: 0.243, 8: 0.219, 20: 0.225}, 8),
        ({1: 0.23, 2: 0.22, 20: 0.21}, 1),
        ({4: 0.3}, 4),
        ({1: math.nan, 2: 0.5}, 2),
        ({1: math.nan}, None),
    ],
)
def test_the_fewest_steps_near_the_best_are_recommended(errors, steps):
    assert recommended_steps(errors) == steps


def test_the_plot_is_written(tmp_path):
    save_frontier(frontier_of(gaussian, [1, 2, 4]), tmp_path / "frontier.png")
    assert Image.open(tmp_path / "frontier.png").text["Software"].startswith("WanDistiller")
