"""The demo teacher's maker works at a tiny scale, its judge is right, and the shipped folder draws what is asked.

Pictures that the renderer made are the judge's oracle. Projection of the shipped teacher must be exact at one frame,
and it must draw held-out prompts with diffusers' WanPipeline.

pytest tests/tools/test_demo_teacher.py
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, sample
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.settings import resolve_settings
from wandistiller.wan.text_encoder import encode_prompts
from wandistiller.wan.text_encoder_files import TextEncoderFiles
from wandistiller.wan.vae import decode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import check_demo_teacher  # noqa: E402
import demo_judge  # noqa: E402
import demo_text  # noqa: E402
import demo_transformer  # noqa: E402
import demo_world as world  # noqa: E402

TEACHER = ROOT / "data" / "demo_teacher"
OTHER_VALUES = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "size": tuple(world.SIZES),
    "place": tuple(world.PLACES),
    "background": tuple(world.BACKGROUNDS),
}


def with_one_attribute_changed(scene: world.Scene, attribute: str, rng: np.random.Generator) -> world.Scene:
    """The scene with another value of one attribute, in one of its objects or in the background."""
    index = int(rng.integers(len(scene.things)))
    owner = scene if attribute == "background" else scene.things[index]
    others = [value for value in OTHER_VALUES[attribute] if value != getattr(owner, attribute)]
    changed = dataclasses.replace(owner, **{attribute: others[rng.integers(len(others))]})
    if attribute == "background":
        return changed
    things = list(scene.things)
    things[index] = changed
    return dataclasses.replace(scene, things=tuple(things))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96)])
def test_judge_accepts_true_renderings_and_none_with_another_attribute(size):
    """Objects are as large, and as far from the edge, as in the square of the shorter side."""
    rng = np.random.default_rng(0)
    for index in range(40):
        scene = world.sample_scene(rng, held_out=bool(index % 2))
        picture, prompt = world.render(scene, rng, size=size)[0], world.describe(scene, rng, variety=0.0)
        assert picture.shape == (size[1], size[0], 3)
        assert demo_judge.judge(picture, prompt)["correct"], (scene, size)
        for attribute in OTHER_VALUES:
            other = world.describe(with_one_attribute_changed(scene, attribute, rng), rng, variety=0.0)
            assert not demo_judge.judge(picture, other)["correct"], f"accepted {scene} as {other!r}"


def test_judge_rejects_empty_noisy_and_crowded_pictures():
    prompt = "a small red circle on the left, on a white background"
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not demo_judge.judge(np.full((64, 64, 3), 246, np.uint8), prompt)["correct"]
    assert not demo_judge.judge(noise, prompt)["correct"]
    two = "a small red circle on the left and a small blue ring on the right, on a white background"
    things = (world.Thing("circle", "red", "small", "left"), world.Thing("ring", "blue", "small", "right"))
    crowded = world.render(world.Scene(things, "white"), np.random.default_rng(3))[0]
    assert demo_judge.judge(crowded, two)["correct"]
    assert not demo_judge.judge(crowded, prompt)["correct"]


def scenes_that_differ_in(unsaid: tuple[str, ...], num_objects: int, rng: np.random.Generator, count: int):
    """Scenes that one prompt describes alike, no two of them the same in anything that it leaves unsaid."""
    scene = world.sample_scene(rng, two_objects=num_objects - 1)
    *others, last = scene.things
    values = {name: rng.permutation(OTHER_VALUES[name]) for name in ("size", "place", "colour", "background")}
    for index in range(count):
        free = {name: str(values[name][index]) for name in unsaid if name != "background"}
        if num_objects == 2:  # the other object's place leaves one to the last
            free.pop("place", None)
        background = str(values["background"][index]) if "background" in unsaid else scene.background
        yield world.Scene((*others, dataclasses.replace(last, **free)), background)


# The judge reads more than the demo teacher was taught to draw from.
UNSAID = [*((1, unsaid) for unsaid in world.UNSAID), (1, ("colour",)), (1, ("background",)), (2, ("size", "place"))]


@pytest.mark.parametrize(("num_objects", "unsaid"), UNSAID)
def test_judge_leaves_unsaid_attributes_free_and_asks_for_a_picture_of_the_world(num_objects: int, unsaid: tuple):
    rng = np.random.default_rng(6)
    accepted = {"true": [], "mean": [], "half": []}
    for _ in range(100):
        one, other = scenes_that_differ_in(unsaid, num_objects, rng, count=2)
        prompt = world.describe_partly(one, rng, unsaid)
        pictures = [world.render(scene, rng)[0] for scene in (one, other)]
        half = pictures[0].copy()
        half[:, world.PLACES[one.things[-1].place][0] :] = half[0, 0]
        accepted["true"] += [demo_judge.judge(picture, prompt)["correct"] for picture in pictures]
        accepted["mean"].append(demo_judge.judge(np.mean(pictures, 0).round().astype(np.uint8), prompt)["correct"])
        accepted["half"].append(demo_judge.judge(half, prompt)["correct"])
    assert all(accepted["true"]) and not any(accepted["half"])
    # The mean of red and yellow is an orange, that of white and black a gray; no judge can tell them from the real ones.
    assert np.mean(accepted["mean"]) <= (0.15 if {"colour", "background"} & set(unsaid) else 0.02)


def test_judge_reads_what_prompts_leave_out():
    (thing,), background = demo_judge.read_prompt("a small circle on the left")
    assert (thing.shape, thing.colour, thing.size, thing.place, background) == ("circle", None, "small", "left", None)
    (thing,), background = demo_judge.read_prompt("An orange ring, on a pink background.")
    assert (thing.colour, thing.size, thing.place, background) == ("orange", None, None, "pink")
    with pytest.raises(ValueError, match="no object"):
        demo_judge.read_prompt("a teal circle on the left")


def test_underspecified_prompts_are_held_out_and_leave_something_open():
    prompts = check_demo_teacher.read_prompts(ROOT / "data" / "demo_heldout_underspecified.txt")
    assert len(prompts) >= 100
    known = check_demo_teacher.read_prompts(ROOT / "data" / "demo_prompts.txt")
    assert not set(prompts) & set(known)
    read = [demo_judge.read_prompt(prompt) for prompt in prompts]
    assert not any(demo_judge.says_everything(*asked) for asked in read)
    fully = check_demo_teacher.read_prompts(ROOT / "data" / "demo_heldout_prompts.txt")
    assert all(demo_judge.says_everything(*demo_judge.read_prompt(prompt)) for prompt in fully)


def test_judge_sees_where_a_clip_goes():
    rng = np.random.default_rng(4)
    for _ in range(20):
        scene = world.sample_moving_scene(rng)
        frames = world.render(scene, rng, world.NUM_FRAMES)
        assert demo_judge.judge_clip(frames, world.describe(scene, rng))["moves"]
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[scene.motion]
        wrong_prompt = world.describe(dataclasses.replace(scene, motion=opposite), rng)
        assert not demo_judge.judge_clip(frames, wrong_prompt)["moves"]
        assert not demo_judge.judge_clip(frames[[0, 0]], world.describe(scene, rng))["moves"]


def test_folded_pads_equal_all_512_slots_of_plain_diffusers():
    torch.manual_seed(0)
    model = demo_transformer.new_transformer()
    with torch.no_grad():
        for p in model.parameters():  # a trained model's pads are not zero vectors, nor is its output layer zero
            p.add_(0.05 * torch.randn_like(p))
    tokenizer = demo_text.make_tokenizer(world.vocabulary())
    text_encoder = demo_text.new_text_encoder(len(tokenizer))
    prompts = ["", "a red ring, on a pink background", "a small red ring at the top and a big blue cross at the bottom"]
    latents, timestep = torch.randn(3, 16, 2, 8, 8), torch.tensor([20.5, 500.0, 999.0])
    with torch.no_grad():
        tokens = demo_text.tokenize(tokenizer, prompts, torch.device("cpu"))
        embeds, bias = demo_text.encode_folded(text_encoder, *tokens)
        num_missing = demo_text.TEXT_MAX_LENGTH - embeds.shape[1]
        slots = torch.cat([embeds, embeds.new_zeros(3, num_missing, embeds.shape[2])], dim=1)
        plain = model(latents, timestep, slots, return_dict=False)[0]
        demo_transformer.fold_pads(model).bias = bias
        folded = model(latents, timestep, embeds, return_dict=False)[0]
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-5)


def test_maker_writes_a_folder_that_wan_pipeline_draws_from(tmp_path: Path):
    command = [sys.executable, str(ROOT / "tools" / "make_demo_teacher.py"), "--tiny"]
    command += ["--output_dir", str(tmp_path / "teacher"), "--num_heldout_prompts", "5"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pipeline = check_demo_teacher.load_pipeline(tmp_path / "teacher")
    how = check_demo_teacher.Drawing(num_frames=5, steps=2, guidance=2.0, seed=0, batch_size=1)
    clip = check_demo_teacher.draw(pipeline, ["a red ring on a white background"], how)
    assert clip.shape == (1, 5, 64, 64, 3)
    assert pipeline.vae.config.latents_std != [1.0] * 16
    record = json.loads((tmp_path / "teacher" / "teacher_record.json").read_text(encoding="utf-8"))
    assert {"world", "guidance_scale", "num_inference_steps", "image_size", "text_max_length"} <= set(record)
    assert len(check_demo_teacher.read_prompts(tmp_path / "demo_heldout_prompts.txt")) == 5


@pytest.mark.slow
def test_maker_trains_a_sibling_on_the_sizes_that_it_is_given(tmp_path: Path):
    command = [sys.executable, str(ROOT / "tools" / "make_demo_teacher.py"), "--tiny", "--sizes", "64x64", "96x64"]
    command += ["--start", str(TEACHER), "--output_dir", str(tmp_path / "sibling")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    pipeline = check_demo_teacher.load_pipeline(tmp_path / "sibling")
    how = check_demo_teacher.Drawing(steps=2, guidance=2.0, seed=0, batch_size=1, size=(96, 64))
    picture = check_demo_teacher.draw(pipeline, ["a red ring on a white background"], how)
    assert picture.shape == (1, 1, 64, 96, 3)
    own, first = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "sibling", TEACHER)
    )
    assert all(torch.equal(own[name], first[name]) for name in first)
    record = json.loads((tmp_path / "sibling" / "teacher_record.json").read_text(encoding="utf-8"))
    assert record["world"] == "shapes" and record["training"]["sizes"] == ["64x64", "96x64"]


def test_training_prompts_hold_no_held_out_combination():
    def triples(name: str) -> list[set[tuple[str, str, str]]]:
        prompts = check_demo_teacher.read_prompts(ROOT / "data" / name)
        read = [demo_judge.read_prompt(prompt) for prompt in prompts]
        return [{(thing.colour, thing.shape, background) for thing in things} for things, background in read]

    held_out = set(world.held_out_combinations())
    training, evaluation = triples("demo_prompts.txt"), triples("demo_heldout_prompts.txt")
    assert len(training) >= 1000 and len(evaluation) >= 240
    assert not any(held_out & combinations for combinations in training)
    assert all(held_out & combinations for combinations in evaluation)
    assert any(len(combinations) == 2 for combinations in evaluation)


@pytest.fixture(scope="module")
def pipeline():
    return check_demo_teacher.load_pipeline(TEACHER)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((TEACHER / "teacher_record.json").read_text(encoding="utf-8"))


def test_projection_of_the_trained_teacher_is_exact_at_one_frame(pipeline):
    prompts = check_demo_teacher.read_prompts(ROOT / "data" / "demo_heldout_prompts.txt")[:4]
    embeds = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)[0]
    lengths = pipeline.tokenizer(prompts, padding=True, return_tensors="pt").attention_mask.sum(1)
    latents, timestep = torch.randn(4, 16, 8, 8), torch.tensor([999.0, 700.5, 300.25, 20.0])
    model, report = project_teacher(TEACHER)
    assert {entry["status"] for entry in report.student.values()} == {"exact"}
    with torch.no_grad():
        expected = pipeline.transformer(latents[:, :, None], timestep, embeds, return_dict=False)[0][:, :, 0]
        actual = model(latents, timestep, embeds[:, : lengths.max()], lengths)
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_the_projected_teacher_draws_what_wan_pipeline_draws(pipeline, record, tmp_path):
    prompts = check_demo_teacher.read_prompts(ROOT / "data" / "demo_heldout_prompts.txt")[:4]
    wan_files = open_wan_files(TEACHER)
    settings = resolve_settings(wan_files)
    assert (settings.guidance_scale, settings.num_inference_steps) == (
        record["guidance_scale"], record["num_inference_steps"]
    )  # fmt: skip
    noise = seeded_noise(range(4), (16, 8, 8))
    drawn = pipeline(
        prompts, settings.negative_prompt, height=64, width=64, num_frames=1, guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.num_inference_steps, latents=noise[:, :, None], output_type="np",
    )  # fmt: skip
    expected = np.round(np.asarray(drawn.frames)[:, 0] * 255)
    texts = [*prompts, settings.negative_prompt]
    embeds = encode_prompts(texts, TextEncoderFiles(TEACHER / "text_encoder", TEACHER / "tokenizer"), tmp_path)
    teacher = Teacher(project_experts(wan_files, 512), settings, embeds.read(4))
    options = SamplingOptions(shift=settings.shift, num_inference_steps=settings.num_inference_steps)
    latents = sample(teacher, noise, *embeds.batch(range(4), "cpu"), options)
    actual = decode(pipeline.vae, latents, settings.latents_mean, settings.latents_std)
    assert np.abs(actual - expected).max() <= 2


def test_shipped_teacher_draws_held_out_prompts(pipeline, record):
    files = [path for path in TEACHER.rglob("*") if path.is_file()]
    assert files, f"{TEACHER} is missing; make it with tools/make_demo_teacher.py"
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    prompts = check_demo_teacher.read_prompts(ROOT / "data" / "demo_heldout_prompts.txt")[:8]
    steps, guidance = record["num_inference_steps"], record["guidance_scale"]
    how = check_demo_teacher.Drawing(steps=steps, guidance=guidance, seed=0, batch_size=8)
    pictures = check_demo_teacher.draw(pipeline, prompts, how)
    facts = [demo_judge.judge(picture[0], prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    wrong = [(prompt, fact) for prompt, fact in zip(prompts, facts, strict=True) if not fact["correct"]]
    assert len(wrong) <= 2, wrong
