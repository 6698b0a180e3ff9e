"""Held-out errors agree with errors that are known and with a loop written by hand, and leave training as it was.

Modes, weights, gradients and random numbers are compared before and after a measurement.
"""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.evaluation.held_out import NUM_PATHS, PathErrors, draw_path_states
from wandistiller.evaluation.measures import endpoint_error
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, sample, wan_scheduler
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.settings import resolve_settings

SHAPE = (16, 4, 4)
OPTIONS = SamplingOptions(shift=3.0, num_inference_steps=8)
EMBEDS = mock_prompt_embeds([f"prompt {'word ' * i}" for i in range(3)], 20)


def mock_teacher() -> Teacher:
    """The mock at guidance 1, which one conditional pass answers."""
    wan_files = open_teacher("mock", StudentConfig.from_dict(IDENTITY_CONFIG))
    settings = resolve_settings(wan_files, guidance_scale=1.0, shift=3.0)
    return Teacher(project_experts(wan_files, 512), settings)


def student_like(teacher: Teacher, scale: float = 1.0) -> WanLiteStudent:
    """A student of the teacher's own shape whose velocity is `scale` times the teacher's."""
    student = copy.deepcopy(teacher.experts["high"]).requires_grad_().train()
    with torch.no_grad():
        student.proj_out.weight.mul_(scale)
        student.proj_out.bias.mul_(scale)
    return student


def other_student() -> WanLiteStudent:
    """A smaller student, whose velocity is another everywhere."""
    config = StudentConfig.from_dict(PRUNED_CONFIG)
    return project_teacher(open_teacher("mock", config), config)[0]


def path_errors(teacher: Teacher, student: WanLiteStudent, options: SamplingOptions = OPTIONS, **draw) -> float:
    states = draw_path_states(teacher, EMBEDS, SHAPE, options, **draw)
    return PathErrors(states, EMBEDS, options, draw.get("batch_size", 16))(student)["velocity_error"]


@pytest.mark.parametrize("scale", [1, 1.1, 0.5])
def test_a_velocity_that_is_off_by_a_known_part_errs_by_that_part(scale):
    teacher = mock_teacher()
    # |s v - v| / |v| at whichever state both are asked:
    expected = pytest.approx(abs(scale - 1), rel=1e-4, abs=1e-6)
    assert path_errors(teacher, student_like(teacher, scale)) == expected


def errors_by_hand(teacher: Teacher, student: WanLiteStudent) -> float:
    """Mean relative error over Euler's method along the velocity of the teacher, one path at a time, the prompts in turn."""
    scheduler, errors = wan_scheduler(3.0, 8, "euler"), []
    for path in range(NUM_PATHS):
        latents, text = seeded_noise([2**31 + path], SHAPE), EMBEDS.batch([path % len(EMBEDS)])
        sigmas = pairwise(scheduler.sigmas.tolist())
        for timestep, (sigma, following) in zip(scheduler.timesteps, sigmas, strict=True):
            with torch.no_grad():
                of_teacher, of_student = (
                    model(latents, timestep[None], *text) for model in (teacher.experts["high"], student)
                )
            errors.append(float((of_student - of_teacher).norm() / of_teacher.norm()))
            latents = latents + (following - sigma) * of_teacher
    return sum(errors) / len(errors)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_every_state_of_the_teachers_paths_is_measured_as_by_hand(batch_size):
    teacher, student, euler = mock_teacher(), other_student(), replace(OPTIONS, sampler="euler")
    expected = errors_by_hand(teacher, student)
    assert path_errors(teacher, student, euler, batch_size=batch_size) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1


def test_modes_weights_gradients_and_random_numbers_are_left_as_they_were():
    teacher, student = mock_teacher(), other_student().train()
    student.blocks[0].eval()  # a part that is kept out of training stays out of it
    modes = [module.training for module in student.modules()]
    weights = {name: weight.clone() for name, weight in student.state_dict().items()}
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    random_state = torch.get_rng_state()

    path_errors(teacher, student)

    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(weights[name], weight) for name, weight in student.state_dict().items())
    assert all(p.requires_grad and (p.grad == 0.5).all() for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_what_a_student_draws_is_held_against_the_teacher_in_all_and_in_fewer_steps():
    """Euler's method by hand, along the levels 1 - i/n before the shift, is the oracle of a student of few steps."""
    teacher, student = mock_teacher(), other_student()
    path = replace(OPTIONS, num_inference_steps=4)
    states = draw_path_states(teacher, EMBEDS, SHAPE, path, batch_size=3, full_steps=10)
    noise = seeded_noise(range(2**31, 2**31 + 8), SHAPE)
    text = EMBEDS.batch([index % 3 for index in range(8)])
    full = sample(teacher, noise, *text, replace(OPTIONS, num_inference_steps=10))
    assert endpoint_error(states.full, full) < 1e-5
    for steps, error in states.fewer.tolist():
        drawn = sample(teacher, noise, *text, replace(OPTIONS, num_inference_steps=int(steps)))
        assert error == pytest.approx(endpoint_error(drawn, full), rel=1e-4)
    assert states.fewer[:, 0].tolist() == [1, 2, 4, 8]

    latents, sigmas = noise, [1, 0.75, 0]  # two steps at shift 3
    for sigma, following in pairwise(sigmas):
        with torch.no_grad():
            latents = latents + (following - sigma) * student(latents, torch.full((8,), 1000.0 * sigma), *text)
    few = replace(OPTIONS, num_inference_steps=2, sampler="euler")
    found = PathErrors(states, EMBEDS, OPTIONS, 3)(student, few)
    assert found["endpoint"] == pytest.approx(endpoint_error(latents, full), rel=1e-4) and found["steps"] == 2
    assert "velocity_error" not in found, "it has learnt whole steps"
    full_options = replace(OPTIONS, num_inference_steps=10)
    same = PathErrors(states, EMBEDS, full_options, 16)(student_like(teacher))
    assert same["velocity_error"] < 1e-5 and same["endpoint"] < 1e-4 and same["teacher_steps"] == 8
