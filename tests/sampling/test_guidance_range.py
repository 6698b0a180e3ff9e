"""Guidance in a range of noise levels: outside of it one pass of the teacher answers, and the rest is as ever.

The oracle is diffusers: its 3D transformers, each half on its own, followed by its scheduler.

pytest tests/sampling/test_guidance_range.py
"""

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from support.wan_folders import oracle_velocity, relative_error, write_pipeline_folder
from wandistiller.errors import UserError
from wandistiller.projection.project import project_experts
from wandistiller.sampling.sampler import SamplingOptions, alone, sample
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.settings import resolve_settings

NEGATIVE = torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
SIGMA = torch.tensor([0.3, 0.5, 0.875, 0.9, 0.95])


def batch(count: int = 5):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 16, 4, 6, generator=generator)
    return latents, SIGMA[:count], torch.randn(count, 9, 20, generator=generator), torch.full((count,), 9)


def make_teacher(folder, *, two_experts: bool = False, **settings):
    transformers = write_pipeline_folder(folder, two_experts=two_experts, seed=3)
    wan_files = open_wan_files(folder)
    teacher = Teacher(project_experts(wan_files, 512), resolve_settings(wan_files, **settings), NEGATIVE)
    calls = {name: [] for name in teacher.experts}
    for name, expert in teacher.experts.items():
        expert.register_forward_hook(lambda _module, _args, output, name=name: calls[name].append(len(output)))
    return teacher, transformers, calls


def by_hand(model, scale: float, guidance_range, latents, sigma, prompt_embeds, lengths):
    """Of diffusers' model, each half on its own; guided where sigma lies in the range."""
    cond = oracle_velocity(model, latents, 1000 * sigma, prompt_embeds, lengths)
    negative, length = NEGATIVE.expand(len(latents), -1, -1), torch.full((len(latents),), len(NEGATIVE))
    uncond = oracle_velocity(model, latents, 1000 * sigma, negative, length)
    low, high = guidance_range
    scales = torch.tensor([scale if low <= level <= high else 1.0 for level in sigma.tolist()])
    return uncond + scales[:, None, None, None] * (cond - uncond)


@pytest.mark.parametrize(
    "guidance_range, calls",
    [((0.5, 0.9), [6, 2]), ((0.0, 0.2), [5]), ((0.1, 0.96), [10]), ((0.88, 1.0), [4, 3])],
)
def test_a_mixed_batch_is_guided_in_the_range_alone_and_costs_what_it_needs(tmp_path, guidance_range, calls):
    # The range of float32 levels: those of a batch are 0.3, 0.5, 0.875, 0.9 and 0.95.
    teacher, (model,), counted = make_teacher(tmp_path, guidance_scale=4.0, guidance_range=guidance_range)
    expected = by_hand(model, 4.0, tuple(torch.tensor(guidance_range).tolist()), *batch())
    assert relative_error(teacher.velocity(*batch()), expected) <= 1e-5
    assert counted == {"high": calls}


def test_each_expert_is_guided_by_its_own_scale_in_the_range(tmp_path):
    scales = {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "boundary_ratio": 0.875}
    teacher, models, counted = make_teacher(tmp_path, two_experts=True, guidance_range=(0.4, 0.92), **scales)
    high, low = (by_hand(model, scale, (0.4, 0.92), *batch()) for model, scale in zip(models, (4, 3), strict=True))
    expected = torch.where((SIGMA >= 0.875)[:, None, None, None], high, low)
    assert relative_error(teacher.velocity(*batch()), expected) <= 1e-5
    assert counted == {"high": [4, 1], "low": [2, 1]}
    assert [teacher.scale_at(sigma) for sigma in (0.3, 0.5, 0.9, 0.95)] == [1.0, 3.0, 4.0, 1.0]


def test_hidden_states_of_a_split_batch_lie_in_the_rows_of_their_states(tmp_path):
    teacher, _, _ = make_teacher(tmp_path, guidance_scale=4.0, guidance_range=(0.4, 0.89))
    _, features = teacher.velocity_and_features(*batch(), layers=[0, 2])
    for row in range(5):
        alone = [part[row : row + 1] for part in batch()]
        _, own = teacher.velocity_and_features(*alone, layers=[0, 2])
        for feature, expected in zip(features, own, strict=True):
            torch.testing.assert_close(feature[row], expected[0], atol=1e-5, rtol=1e-4)


def test_sampling_follows_diffusers_scheduler_with_guidance_in_the_interval(tmp_path):
    teacher, (model,), counted = make_teacher(tmp_path, guidance_scale=5.0, guidance_range=(0.4, 0.9), shift=3.0)
    latents, _, prompt_embeds, lengths = batch(2)
    drawn = sample(teacher, latents, prompt_embeds, lengths, SamplingOptions(shift=3.0, num_inference_steps=10))

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(10)
    expected, num_rows = latents, 0
    for timestep in scheduler.timesteps:
        sigma = timestep.float().expand(2) / 1000
        num_rows += 4 if 0.4 <= float(timestep) / 1000 <= 0.9 else 2
        velocity = by_hand(model, 5.0, (0.4, 0.9), expected, sigma, prompt_embeds, lengths)
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
    assert relative_error(drawn, expected) <= 1e-4
    assert sum(counted["high"]) == num_rows and 20 < num_rows < 40


def test_a_range_of_all_levels_is_none_and_one_without_guidance_is_refused(tmp_path):
    write_pipeline_folder(tmp_path)
    wan_files = open_wan_files(tmp_path)
    whole = resolve_settings(wan_files, guidance_range=(0.0, 1.0))
    assert whole == resolve_settings(wan_files) and "guidance_range" not in whole.recorded()
    with pytest.raises(UserError, match="--guidance_range: there is no guidance here"):
        resolve_settings(wan_files, guidance_scale=1.0, guidance_range=(0.2, 0.8))


def test_a_student_in_its_teachers_place_has_no_range(tmp_path):
    teacher, _, counted = make_teacher(tmp_path, guidance_scale=4.0, guidance_range=(0.4, 0.6))
    Teacher(teacher.experts, alone(teacher.settings, 2.0), NEGATIVE).velocity(*batch())
    assert counted["high"] == [10]
