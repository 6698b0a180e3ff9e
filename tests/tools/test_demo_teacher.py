"""The demo teacher's maker works at a tiny scale, its judge is right, and the shipped folder draws what is asked.

Pictures that the renderer made are the judge's oracle. Projection of the shipped teacher must be exact at one frame,
and it must draw held-out prompts with diffusers' WanPipeline.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support.runs import ROOT
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, sample
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.settings import resolve_settings
from wandistiller.wan.text_encoder import encode_prompts
from wandistiller.wan.text_encoder_files import TextEncoderFiles
from wandistiller.wan.vae_2d import load_vae_2d

sys.path.insert(0, str(ROOT / "tools"))

import check_demo_teacher
import demo_judge
import demo_world as world
import make_demo_teacher

TEACHER = ROOT / "data" / "demo_teacher"
VALUES = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "size": tuple(world.SIZES),
    "place": tuple(world.PLACES),
    "background": tuple(world.BACKGROUNDS),
}


def prompts_of(name: str) -> list[str]:
    return check_demo_teacher.read_prompts(ROOT / "data" / f"{name}.txt")


def with_one_attribute_changed(scene: world.Scene, attribute: str, rng: np.random.Generator) -> world.Scene:
    """The scene with another value of one attribute, in one of its objects or in the background."""
    index = int(rng.integers(len(scene.things)))
    owner = scene if attribute == "background" else scene.things[index]
    others = [value for value in VALUES[attribute] if value != getattr(owner, attribute)]
    changed = replace(owner, **{attribute: others[rng.integers(len(others))]})
    if attribute == "background":
        return changed
    return replace(scene, things=(*scene.things[:index], changed, *scene.things[index + 1 :]))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96)])
def test_the_judge_accepts_true_renderings_and_none_with_another_attribute(size):
    rng = np.random.default_rng(0)
    for index in range(16):
        scene = world.sample_scene(rng, held_out=bool(index % 2))
        picture, prompt = world.render(scene, rng, size=size)[0], world.describe(scene, rng, variety=0.0)
        assert demo_judge.judge(picture, prompt)["correct"], (scene, size)
        for attribute in VALUES:
            other = world.describe(with_one_attribute_changed(scene, attribute, rng), rng, variety=0.0)
            assert not demo_judge.judge(picture, other)["correct"], f"accepted {scene} as {other!r}"


def test_the_judge_rejects_empty_noisy_and_crowded_pictures():
    prompt = "a small red circle on the left, on a white background"
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not demo_judge.judge(np.full((64, 64, 3), 246, np.uint8), prompt)["correct"]
    assert not demo_judge.judge(noise, prompt)["correct"]
    two = "a small red circle on the left and a small blue ring on the right, on a white background"
    things = (world.Thing("circle", "red", "small", "left"), world.Thing("ring", "blue", "small", "right"))
    crowded = world.render(world.Scene(things, "white"), np.random.default_rng(3))[0]
    assert demo_judge.judge(crowded, two)["correct"] and not demo_judge.judge(crowded, prompt)["correct"]


@pytest.mark.parametrize("unsaid", world.UNSAID)
def test_the_judge_leaves_unsaid_attributes_free_and_rejects_the_mean_of_what_they_allow(unsaid):
    rng = np.random.default_rng(6)
    for _ in range(20):
        scene = world.sample_scene(rng, two_objects=False)
        pairs = {name: rng.permutation(VALUES[name])[:2] for name in unsaid}
        scenes = []
        for values in ({name: str(pair[index]) for name, pair in pairs.items()} for index in range(2)):
            background = values.pop("background", scene.background)
            scenes.append(world.Scene((replace(scene.things[0], **values),), background))
        prompt = world.describe_partly(scenes[0], rng, unsaid)
        pictures = [world.render(scene, rng)[0] for scene in scenes]
        assert all(demo_judge.judge(picture, prompt)["correct"] for picture in pictures)
        # The mean of red and yellow is an orange, that of white and black a gray; no judge can tell them from real ones.
        if not {"colour", "background"} & set(unsaid):
            assert not demo_judge.judge(np.mean(pictures, 0).round().astype(np.uint8), prompt)["correct"]


def test_prompts_for_training_hold_no_held_out_combination_and_those_left_open_say_less():
    def triples(name: str) -> list[set[tuple[str, str, str]]]:
        read = [demo_judge.read_prompt(prompt) for prompt in prompts_of(name)]
        return [{(thing.colour, thing.shape, background) for thing in things} for things, background in read]

    held_out = set(world.held_out_combinations())
    training, evaluation = triples("demo_prompts"), triples("demo_heldout_prompts")
    assert len(training) >= 1000 and len(evaluation) >= 240
    assert not any(held_out & combinations for combinations in training)
    assert all(held_out & combinations for combinations in evaluation)
    open_prompts = prompts_of("demo_heldout_underspecified")
    assert not set(open_prompts) & set(prompts_of("demo_prompts"))
    assert not any(demo_judge.says_everything(*demo_judge.read_prompt(prompt)) for prompt in open_prompts)


def test_the_maker_writes_a_folder_that_wan_pipeline_draws_from(tmp_path: Path):
    make_demo_teacher.main(["--tiny", "--output_dir", str(tmp_path / "teacher"), "--num_heldout_prompts", "5"])
    pipeline = check_demo_teacher.load_pipeline(tmp_path / "teacher")
    how = check_demo_teacher.Drawing(num_frames=5, steps=2, guidance=2.0, seed=0, batch_size=1)
    assert check_demo_teacher.draw(pipeline, ["a red ring on a white background"], how).shape == (1, 5, 64, 64, 3)
    record = json.loads((tmp_path / "teacher" / "teacher_record.json").read_text(encoding="utf-8"))
    assert {"world", "guidance_scale", "num_inference_steps", "image_size", "text_max_length"} <= set(record)
    assert len(check_demo_teacher.read_prompts(tmp_path / "demo_heldout_prompts.txt")) == 5


@pytest.fixture(scope="module")
def pipeline():
    return check_demo_teacher.load_pipeline(TEACHER)


def test_projection_of_the_trained_teacher_is_exact_at_one_frame(pipeline):
    prompts = prompts_of("demo_heldout_prompts")[:4]
    embeds = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    lengths = pipeline.tokenizer(prompts, padding=True, return_tensors="pt").attention_mask.sum(1)
    latents, timestep = torch.randn(4, 16, 8, 8), torch.tensor([999.0, 700.5, 300.25, 20.0])
    model, report = project_teacher(TEACHER)
    assert {entry["status"] for entry in report.student.values()} == {"exact"}
    with torch.no_grad():
        expected = pipeline.transformer(latents[:, :, None], timestep, embeds, return_dict=False)[0][:, :, 0]
        actual = model(latents, timestep, embeds[:, : lengths.max()], lengths)
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_the_shipped_teacher_draws_held_out_prompts_and_the_projected_one_the_same_pictures(pipeline, tmp_path):
    files = [path for path in TEACHER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    prompts, wan_files = prompts_of("demo_heldout_prompts")[:8], open_wan_files(TEACHER)
    settings, noise = resolve_settings(wan_files), seeded_noise(range(8), (16, 8, 8))
    drawn = pipeline(
        prompts, settings.negative_prompt, height=64, width=64, num_frames=1, guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.num_inference_steps, latents=noise[:, :, None], output_type="np",
    )  # fmt: skip
    expected = np.round(np.asarray(drawn.frames)[:, 0] * 255)
    wrong = [p for picture, p in zip(expected, prompts, strict=True) if not demo_judge.judge(picture, p)["correct"]]
    assert len(wrong) <= 2, wrong

    texts = [*prompts, settings.negative_prompt]
    embeds = encode_prompts(texts, TextEncoderFiles(TEACHER / "text_encoder", TEACHER / "tokenizer"), tmp_path)
    teacher = Teacher(project_experts(wan_files, 512), settings, embeds.read(8))
    options = SamplingOptions(shift=settings.shift, num_inference_steps=settings.num_inference_steps)
    latents = sample(teacher, noise, *embeds.batch(range(8), "cpu"), options)
    actual = load_vae_2d(TEACHER / "vae", 16, 8).pictures(latents, settings.latents_mean, settings.latents_std)
    assert np.abs(actual - expected).max() <= 2
