"""A teacher of a few noise levels that noises its x_0 anew at each: walked and drawn by the published step, worked out by hand.

The step of DMD's few-step generators (arXiv 2405.14867), as FastVideo and diffusers' FlowMatchLCMScheduler take it:
x_0 = x - sigma v, and x' = (1 - sigma') x_0 + sigma' noise.
"""

import itertools
import json

import pytest
import torch

from support.walks import EMBEDS, Field, ask, make_walk
from support.wan_folders import write_pipeline_folder
from wandistiller.sampling.sampler import SamplingOptions, sample, sample_in_batches
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.settings import resolve_settings

LEVELS = (1000.0, 757.0, 522.0)
OPTIONS = SamplingOptions(shift=8.0, num_inference_steps=3, sampler="renoise", levels=LEVELS)


def x_0(latents: torch.Tensor, sigma: torch.Tensor, field: Field) -> torch.Tensor:
    return latents - sigma.float()[:, None, None, None] * field.velocity(latents, sigma, None, None)


def check_noise(noise: torch.Tensor, *others: torch.Tensor) -> None:
    """Hold many values to a normal distribution, which has nothing of the others."""
    assert abs(float(noise.mean())) < 0.1 and float(noise.std()) == pytest.approx(1, abs=0.1)
    assert all(abs(float((noise * other).mean())) < 0.1 for other in others)


def test_a_picture_is_drawn_by_steps_to_x_0_and_fresh_noise_whatever_batch_it_is_in():
    field, noise = Field(rate=0.3, constant=0.1), torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = sample(field, noise, *EMBEDS.batch(range(8)), OPTIONS)
    asked = list(field.asked)
    assert [float(sigma[0]) for _, sigma in asked] == pytest.approx([1.0, 0.757, 0.522])
    assert torch.equal(asked[0][0], noise)
    fresh = [noise]
    for (before, sigma), (after, level) in itertools.pairwise(asked):
        level = level.float()[:, None, None, None]
        fresh.append((after - (1 - level) * x_0(before, sigma, field)) / level)
        check_noise(fresh[-1], *fresh[:-1])
    torch.testing.assert_close(drawn, x_0(*asked[-1], field))
    assert torch.equal(drawn, sample_in_batches(field, noise, EMBEDS, range(8), OPTIONS, 3))
    once = sample(field, noise, *EMBEDS.batch(range(8)), SamplingOptions(**vars(OPTIONS) | {"num_inference_steps": 1}))
    torch.testing.assert_close(once, x_0(noise, torch.ones(8), field))


def test_a_walk_takes_the_same_steps():
    field = Field(rate=0.3, constant=0.1)
    walk = make_walk(field, levels=(1.0, 0.757, 0.522, 0.0), num_steps=3, renoises=True)
    before, found = {}, {0.757: [], 0.522: []}
    for answer in ask(walk, 300):
        ends = x_0(answer["latents"], answer["sigma"], field)
        for row, prompt, sigma, latents, end in zip(
            *(answer[name].tolist() for name in ("rows", "prompts", "sigma")), answer["latents"], ends, strict=True
        ):
            if (level := round(sigma, 3)) < 1:
                found[level].append((latents - (1 - sigma) * before[row, prompt]) / sigma)
            before[row, prompt] = end
    assert all(len(noise) > 300 for noise in found.values())
    for noise in found.values():
        check_noise(torch.stack(noise))


def test_the_levels_of_fastwan_are_found_from_its_folder(tmp_path):
    write_pipeline_folder(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}), encoding="utf-8")
    settings = resolve_settings(open_wan_files(tmp_path))
    assert (settings.teacher_sampler, settings.teacher_levels) == ("renoise", LEVELS)
    assert settings.num_inference_steps == 3 and not settings.uses_guidance
    other = resolve_settings(open_wan_files(tmp_path), teacher_sampler="euler", teacher_steps=4)
    assert other.teacher_levels == () and other.num_inference_steps == 4
