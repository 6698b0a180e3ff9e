"""Held-out errors agree with errors that are known and with a loop written by hand, and leave training as it was.

Modes, weights, gradients and random numbers are compared before and after a measurement.

pytest tests/evaluation/test_held_out.py
"""

import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.evaluation.held_out import (
    HeldOutErrors,
    HeldOutNoise,
    MeanOverSizes,
    PathErrors,
    PathStates,
    draw_path_states,
)
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
SEED = 41


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


def make_errors(teacher: Teacher, options: SamplingOptions = OPTIONS, **changes) -> HeldOutErrors:
    return HeldOutErrors(teacher, EMBEDS, SHAPE, options, **{"num_levels": 4, "seed": SEED} | changes)


class Counted:
    """A velocity field that counts the batches and the states it answers."""

    def __init__(self, teacher: Teacher):
        self.teacher, self.sizes = teacher, []

    def velocity(self, latents, sigma, prompt_embeds, prompt_lengths):
        self.sizes.append(len(latents))
        return self.teacher.velocity(latents, sigma, prompt_embeds, prompt_lengths)


# ---- the two errors ----


def test_a_student_that_equals_the_teacher_errs_nowhere():
    teacher = mock_teacher()
    errors = make_errors(teacher)(student_like(teacher))
    assert list(errors) == ["teacher_states", "student_states"]
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize("scale", [1.1, 0.5])
def test_a_velocity_that_is_off_by_a_known_part_errs_by_that_part(scale):
    teacher = mock_teacher()
    errors = make_errors(teacher)(student_like(teacher, scale))
    # |s v - v| / |v| at whichever state both are asked:
    assert errors == pytest.approx({"teacher_states": abs(scale - 1), "student_states": abs(scale - 1)}, rel=1e-4)


def errors_by_hand(teacher: Teacher, student: WanLiteStudent, leader: str, steps: set[int]) -> float:
    """Mean relative error at some steps of Euler's method along the velocity of `leader`, one prompt at a time."""
    scheduler, errors = wan_scheduler(3.0, 8, "euler"), []
    models = {"teacher": teacher.experts["high"], "student": student}
    for index in range(len(EMBEDS)):
        latents, text = seeded_noise([SEED + index], SHAPE), EMBEDS.batch([index])
        sigmas = list(pairwise(scheduler.sigmas.tolist()))
        for step, (timestep, (sigma, following)) in enumerate(zip(scheduler.timesteps, sigmas, strict=True)):
            with torch.no_grad():
                velocities = {name: model(latents, timestep[None], *text) for name, model in models.items()}
            if step in steps:
                difference = velocities["student"] - velocities["teacher"]
                errors.append(float(difference.norm() / velocities["teacher"].norm()))
            latents = latents + (following - sigma) * velocities[leader]
    assert len(errors) == len(EMBEDS) * len(steps)
    return sum(errors) / len(errors)


def test_each_error_is_met_on_the_path_of_its_own_leader():
    teacher, student = mock_teacher(), other_student()
    errors = make_errors(teacher, replace(OPTIONS, sampler="euler"))(student)
    by_hand = {
        f"{leader}_states": errors_by_hand(teacher, student, leader, {0, 2, 5, 7}) for leader in ("teacher", "student")
    }
    assert errors == pytest.approx(by_hand, rel=1e-4)
    # The two kinds of states must differ by far more than that tolerance, or the hand-written loop would prove nothing.
    assert abs(by_hand["teacher_states"] / by_hand["student_states"] - 1) > 0.01


def test_the_teacher_is_sampled_once_and_then_asked_at_the_measured_steps_alone():
    teacher = Counted(mock_teacher())
    errors = make_errors(teacher, num_levels=3, batch_size=2)
    assert teacher.sizes == [2] * 8 + [1] * 8
    for _ in range(2):
        teacher.sizes.clear()
        errors(other_student())
        assert teacher.sizes == [2] * 3 + [1] * 3


@pytest.mark.parametrize("num_levels, steps", [(1, [0]), (2, [0, 7]), (4, [0, 2, 5, 7]), (99, list(range(8)))])
def test_the_measured_steps_are_spread_evenly_with_both_ends_as_far_as_there_are_any(num_levels, steps):
    errors = make_errors(mock_teacher(), num_levels=num_levels)
    sigmas = wan_scheduler(3.0, 8).timesteps / 1000
    (states,) = errors.teacher_states
    assert [float(sigma[0]) for _, sigma, _ in states] == pytest.approx(sigmas[steps].tolist())
    assert all(latents.shape == velocity.shape == (3, *SHAPE) for latents, _, velocity in states)


# ---- states that are answered once ----


def path_errors(teacher: Teacher, student: WanLiteStudent, num_paths: int = 3, **draw) -> float:
    states = draw_path_states(teacher, EMBEDS, SHAPE, OPTIONS, num_paths, **draw)
    return PathErrors(states, EMBEDS, OPTIONS, draw.get("batch_size", 16))(student)["teacher_states"]


def test_every_state_of_the_teachers_paths_is_measured_as_the_longer_measurement_does():
    teacher, student = mock_teacher(), other_student()
    expected = HeldOutErrors(teacher, EMBEDS, SHAPE, OPTIONS, num_levels=8)(student)["teacher_states"]
    assert path_errors(teacher, student) == pytest.approx(expected, rel=1e-5) and expected > 0.1
    assert path_errors(teacher, student, batch_size=2) == pytest.approx(expected, rel=1e-5)
    assert path_errors(teacher, student_like(teacher)) < 1e-6
    assert path_errors(teacher, student_like(teacher, 0.5)) == pytest.approx(0.5, rel=1e-4)


def test_more_paths_than_prompts_have_noises_of_their_own():
    states = draw_path_states(mock_teacher(), EMBEDS, SHAPE, OPTIONS, 5)
    few = draw_path_states(mock_teacher(), EMBEDS, SHAPE, OPTIONS, 3)
    torch.testing.assert_close(states.latents[:, :3], few.latents)
    assert not any(torch.equal(states.latents[0, path], states.latents[0, path % 3]) for path in (3, 4))
    alone = draw_path_states(mock_teacher(), EMBEDS.part(0, 2), SHAPE, OPTIONS, 5)  # path 4 is of prompt 0 there
    torch.testing.assert_close(alone.latents[0], states.latents[0])
    assert not torch.allclose(alone.velocity[:, 4], states.velocity[:, 4])


def test_a_student_of_few_steps_should_go_from_one_end_of_a_segment_to_the_next_in_one_step():
    teacher = mock_teacher()
    segments = draw_path_states(teacher, EMBEDS, SHAPE, OPTIONS, 3, segment_steps=2)
    every = draw_path_states(teacher, EMBEDS, SHAPE, OPTIONS, 3)
    noise = seeded_noise(range(2**31, 2**31 + 3), SHAPE)
    end = sample(teacher, noise, *EMBEDS.batch(range(3)), OPTIONS)
    torch.testing.assert_close(segments.latents, every.latents[::2])
    sigmas = [*wan_scheduler(3.0, 4, "euler").sigmas.tolist()]  # what the student draws at
    assert segments.sigma.tolist() == pytest.approx(sigmas[:-1])
    starts = [*segments.latents, end]
    for level, (sigma, following) in enumerate(pairwise(sigmas)):
        step = starts[level] + (following - sigma) * segments.velocity[level]
        torch.testing.assert_close(step, starts[level + 1], atol=1e-5, rtol=1e-4)


def test_experts_take_turns_once_however_few_paths_are_asked_at_a_time():
    wan_files = open_teacher("mock", StudentConfig.from_dict(IDENTITY_CONFIG))
    settings = replace(
        resolve_settings(wan_files, guidance_scale=1.0, shift=3.0), guidance_scale_2=1.0, boundary_ratio=0.9
    )
    expert = project_experts(wan_files, 512)["high"]
    teacher = Teacher({"high": expert, "low": copy.deepcopy(expert)}, settings)
    counted = Counted(teacher)
    draw_path_states(counted, EMBEDS, SHAPE, OPTIONS, 6, batch_size=2)
    assert teacher.num_swaps == 1 and counted.sizes == [2] * 3 * 8


def test_only_noise_levels_of_a_range_are_kept():
    states = draw_path_states(mock_teacher(), EMBEDS, SHAPE, OPTIONS, 3)
    kept = states.within(0.5, 0.95)
    inside = [level for level, sigma in enumerate(states.sigma.tolist()) if 0.5 <= sigma <= 0.95]
    assert 0 < len(inside) < 8 and isinstance(kept, PathStates)
    assert torch.equal(kept.latents, states.latents[inside]) and torch.equal(kept.velocity, states.velocity[inside])


# ---- what the noise decides ----


def noise_of(teacher: Teacher, **changes) -> HeldOutNoise:
    return HeldOutNoise(teacher, EMBEDS, SHAPE, OPTIONS, **{"num_noises": 3} | changes)


def distance_by_hand(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """1 is as far off as the flat colour of all pictures."""
    flat = reference.mean(dim=(0, 2, 3), keepdim=True)
    return float(((latents - reference).square().sum() / (reference - flat).square().sum()).sqrt())


def test_a_student_that_equals_the_teacher_follows_every_noise():
    teacher = mock_teacher()
    assert noise_of(teacher)(student_like(teacher)) == pytest.approx(
        {"norm_ratio": 1, "cosine": 1, "gain": 1, "endpoint": 0}, rel=1e-4, abs=1e-5
    )


def test_the_noise_part_is_what_is_left_of_each_picture_without_the_mean_of_its_prompt():
    teacher, student = mock_teacher(), other_student()
    found = noise_of(teacher, batch_size=2)(student)
    parts, whole = {}, {}
    for name, model in (("teacher", teacher), ("student", Teacher({"high": student}, teacher.settings))):
        noise, rest, pictures = noise_of(teacher).noise, [], []
        for prompt in range(3):
            text = EMBEDS.batch([prompt] * 3)
            drawn = sample(model, noise[3 * prompt : 3 * prompt + 3], *text, OPTIONS).double()
            rest.append(drawn - drawn.mean(dim=0))
            pictures.append(drawn)
        parts[name] = torch.cat(rest).flatten()
        whole[name] = torch.cat(pictures)
    gain = float(parts["student"] @ parts["teacher"] / parts["teacher"].square().sum())
    ratio = float(parts["student"].norm() / parts["teacher"].norm())
    distance = distance_by_hand(whole["student"], whole["teacher"])
    expected = {"norm_ratio": ratio, "cosine": gain / ratio, "gain": gain, "endpoint": distance}
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found["gain"] - 1) > 0.01


def test_the_scale_is_the_teachers_own_distance_in_fewer_steps():
    teacher = mock_teacher()
    found = noise_of(teacher, scale_steps=(1, 2))(student_like(teacher))
    noise = noise_of(teacher).noise
    for steps in (1, 2):
        drawn = []
        for options in (replace(OPTIONS, num_inference_steps=steps), OPTIONS):
            first = [sample(teacher, noise[3 * n : 3 * n + 1], *EMBEDS.batch([n]), options) for n in range(3)]
            drawn.append(torch.cat(first).double())
        assert found[f"teacher_at_{steps}_steps"] == pytest.approx(distance_by_hand(*drawn), rel=1e-4)
    assert found["teacher_at_1_steps"] > found["teacher_at_2_steps"] > found["endpoint"]


# ---- the same every time ----


def test_the_errors_repeat_and_follow_their_seed():
    teacher, student = mock_teacher(), other_student()
    errors = make_errors(teacher)
    first = errors(student)
    assert errors(student) == first == make_errors(teacher)(student)
    assert make_errors(teacher, seed=SEED + 1)(student) != first


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_batch_size_changes_nothing(batch_size):
    teacher, student = mock_teacher(), other_student()
    assert make_errors(teacher, batch_size=batch_size)(student) == pytest.approx(
        make_errors(teacher)(student), rel=1e-4
    )


def test_errors_of_prompts_of_their_own_are_not_those_of_others():
    teacher, student = mock_teacher(), other_student()
    others = mock_prompt_embeds([f"a picture of {i}" for i in range(3)], 20)
    assert HeldOutErrors(teacher, others, SHAPE, OPTIONS, 4, SEED)(student) != make_errors(teacher)(student)


# ---- what it leaves alone ----


@pytest.mark.parametrize(
    "measure", [make_errors, lambda teacher: partial(path_errors, teacher), noise_of], ids=["both", "once", "noise"]
)
def test_modes_weights_gradients_and_random_numbers_are_left_as_they_were(measure):
    teacher, student = mock_teacher(), other_student().train()
    student.blocks[0].eval()  # a part that is kept out of training stays out of it
    modes = [module.training for module in student.modules()]
    weights = {name: weight.clone() for name, weight in student.state_dict().items()}
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    random_state = torch.get_rng_state()

    inside = []
    student.register_forward_hook(lambda module, *_: inside.append(any(part.training for part in module.modules())))
    measure(teacher)(student)

    assert inside and not any(inside), "measured in training mode"
    assert [module.training for module in student.modules()] == modes
    assert all(torch.equal(weights[name], weight) for name, weight in student.state_dict().items())
    assert all(p.requires_grad and (p.grad == 0.5).all() for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_training_mode_returns_even_from_a_failure():
    errors, student = make_errors(mock_teacher()), other_student().train()
    student.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        errors(student)
    assert all(module.training for module in student.modules())


def test_the_student_trains_on_after_it_was_measured_also_at_the_kept_states():
    errors, student = make_errors(mock_teacher()), other_student().train()
    errors(student)
    latents, sigma, velocity = errors.teacher_states[0][1]
    (student(latents, 1000 * sigma, *errors.texts[0]) - velocity).square().mean().backward()
    assert float(student.proj_out.weight.grad.norm()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_answer_in_the_compute_dtype(dtype):
    teacher, student = mock_teacher(), other_student()
    seen: dict[str, set[torch.dtype]] = {"teacher": set(), "student": set()}
    for side, model in (("student", student), ("teacher", teacher.experts["high"])):
        model.blocks[0].ffn.net[2].register_forward_hook(lambda *call, side=side: seen[side].add(call[2].dtype))
    errors = make_errors(teacher, replace(OPTIONS, compute_dtype=dtype))(student)
    assert seen == {"teacher": {dtype}, "student": {dtype}}
    exact = make_errors(mock_teacher())(other_student())
    assert errors == pytest.approx(exact, rel=0.05)


def test_several_sizes_are_one_mean_that_counts_every_path_alike():
    teacher, student = mock_teacher(), other_student()
    shapes = [(16, 4, 4), (16, 4, 6)]
    parts = [
        (HeldOutErrors(teacher, EMBEDS.first(n), shape, OPTIONS), n) for n, shape in zip((1, 2), shapes, strict=True)
    ]
    one, two = (part(student) for part, _ in parts)
    both = MeanOverSizes(parts)(student)
    assert both == {name: pytest.approx((one[name] + 2 * two[name]) / 3) for name in one}
    assert MeanOverSizes([(lambda _: {"gain": None}, 1), (lambda _: {"gain": 0.5}, 3)])(student) == {"gain": 0.5}
    assert MeanOverSizes([(lambda _: {"gain": None}, 1)])(student) == {"gain": None}
