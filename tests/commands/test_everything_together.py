"""What people bring, all at once: a LoRA, a teacher of few steps, sizes off the square, and prompt templates.

Each of them has tests of its own. Here they meet in one run, which is killed twice and typed again, drawn with at each of its sizes,
measured and exported.

pytest tests/commands/test_everything_together.py
"""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_student
import export_student
import generate_images
import train_distillation
from support.loras import diffusers_keys, random_pairs, write
from support.processes import exit_code, fork, run_and_exit
from support.runs import ROOT, read_metrics, same_weights
from support.students import STUDENT, write_teacher
from wandistiller import StudentConfig

LEVELS = [1, 0.9, 0.75, 0.5]  # of four even steps at shift 3
SIZES = [(64, 64), (80, 48), (48, 80)]  # width and height of 1:1, 3:2 and 2:3 on a grid of 16 pixels
PROMPT = "a big red ring in the center, on a white background"


@dataclass(frozen=True)
class World:
    """A teacher with its LoRA, and what else a run of it is typed with."""

    root: Path
    teacher: Path
    config: Path
    lora: Path
    templates: Path

    def training(self, output: Path, *more: object) -> list[str]:
        words = [
            "--teacher_path", self.teacher, "--student_config", self.config, "--teacher_lora", f"{self.lora}:0.7",
            "--teacher_steps", 4, "--shift", 3, "--image_sizes", "1:1", "3:2", "2:3", "--data_path", self.templates,
            "--eval_prompts", self.templates, "--prompt_cache", self.root / "cache", "--teacher_calls", 6, "--replay", 2,
            "--batch_size", 4, "--save_every", 4, "--eval_every", 6, "--num_samples", 3, "--sample_every", 6,
            "--device", "cpu", "--output_dir", output, *more,
        ]  # fmt: skip
        return [str(word) for word in words]

    def drawing(self, student: Path) -> list[object]:
        return ["--student", student, "--prompt_cache", self.root / "cache", "--device", "cpu"]


def make_world(root: Path, name: str) -> World:
    """Make the tiny world, of random weights, or that of the demo's teacher."""
    from diffusers import WanTransformer3DModel

    if name == "tiny":
        teacher, config = root / "teacher", root / "config.json"
        write_teacher(teacher, seed=5)
        record = {"world": "shapes", "guidance_scale": 3.0, "num_inference_steps": 6}
        (teacher / "teacher_record.json").write_text(json.dumps(record), encoding="utf-8")
        config.write_text(json.dumps(STUDENT | {"image_size": 64}), encoding="utf-8")
    else:
        teacher, config = ROOT / "data" / "demo_teacher", ROOT / "config" / "demo_student_config.json"
    model = WanTransformer3DModel.from_pretrained(teacher / "transformer")
    lora = write(root / "lora.safetensors", diffusers_keys(random_pairs(model, size=0.1)))
    return World(root, teacher, config, lora, ROOT / "data" / "prompt_templates")


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def world(request, tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param)


def killed_after(num_steps: int, argv: list[str], student: Path, log: Path) -> None:
    """Run the command in a process that is killed once it has taken so many steps."""
    process = fork(
        run_and_exit, lambda: exit_code(train_distillation.main, argv), os.open(log, os.O_CREAT | os.O_WRONLY)
    )
    metrics = student / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count("\n") < num_steps:
        time.sleep(0.002)
        assert process.is_alive(), log.read_text()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_one_run_of_everything_from_two_kills_to_pictures_figures_and_a_pipeline(world, run_main, tmp_path):
    straight, student = tmp_path / "straight", tmp_path / "student"
    outcome = run_main(train_distillation.main, *world.training(straight))
    assert outcome.code == 0, outcome.err
    assert " templates" in outcome.out and "lora.safetensors at scale 0.7" in outcome.out
    assert f"noise levels, and no others: {', '.join(f'{level:g}' for level in LEVELS)}" in outcome.out

    # Killed before and after a checkpoint, and typed again each time, it is the run that nobody stopped:
    for num_steps in (2, 6):
        killed_after(num_steps, world.training(student), student, tmp_path / "log.txt")
    outcome = run_main(train_distillation.main, *world.training(student))
    assert outcome.code == 0 and "Resuming from step" in outcome.out, outcome.err
    assert same_weights(straight, student)
    told = [[(line["loss"], line.get("held_out")) for line in read_metrics(run)] for run in (straight, student)]
    assert told[0] == told[1] and len(told[0]) == 12
    picture = "samples/step_000012.png"
    np.testing.assert_array_equal(pixels(straight / picture), pixels(student / picture))

    # The record holds what came together, and who draws and measures goes by it:
    record = StudentConfig.load(student).distillation
    assert record["image_sizes"] == [f"{width}x{height}" for width, height in SIZES]
    assert (record["teacher_sampler"], record["num_inference_steps"]) == ("euler", 4)
    assert [(lora["file"], lora["scale"]) for lora in record["teacher_loras"]] == [("lora.safetensors", 0.7)]
    check_pictures(world, run_main, student, tmp_path / "pictures")
    check_evaluation(world, run_main, student)
    check_pipeline(run_main, student, SIZES[1], tmp_path / "pipeline")


def check_pictures(world: World, run_main, student: Path, folder: Path) -> None:
    """Both draw at each size; the teacher's LoRA is in what it draws."""
    words = [*world.drawing(student), "--prompt", PROMPT]
    for width, height in SIZES:
        for model in ("student", "teacher"):
            flags = ["--width", width, "--height", height, "--model", model, "--output", folder / model]
            outcome = run_main(generate_images.main, *words, *flags)
            assert outcome.code == 0 and "Warning" not in outcome.out, outcome.err + outcome.out
            (file,) = (folder / model).glob(f"000*_{width}x{height}.png")
            assert pixels(file).shape == (height, width, 3) and pixels(file).std() > 1
    flags = ["--model", "teacher", "--teacher_lora", f"{world.lora}:0.0001", "--output", folder / "plain"]
    assert run_main(generate_images.main, *words, *flags).code == 0
    plain, changed = (next((folder / name).glob("000*_{}x{}.png".format(*SIZES[0]))) for name in ("plain", "teacher"))
    assert np.abs(pixels(plain).astype(int) - pixels(changed)).max() > 3


def check_evaluation(world: World, run_main, student: Path) -> None:
    """The student is measured on prompts that the templates hold out, and all that is written says so."""
    flags = ["--prompts_file", world.templates, "--num_prompts", 3, "--num_seeds", 2]
    outcome = run_main(evaluate_student.main, *world.drawing(student), *flags)
    assert outcome.code == 0 and "prompts of the training" not in outcome.out, outcome.err
    assert "teacher, 4 steps" in outcome.out and "student, 4 steps" in outcome.out
    results = json.loads((student / "evaluation.json").read_text(encoding="utf-8"))
    assert (results["image_size"], results["num_trained_prompts"]) == ("64x64", 0) and "velocity_error" in results
    card = (student / "README.md").read_text(encoding="utf-8")
    assert all(words in card for words in ("lora.safetensors at 0.7", "In 4 steps", "| euler |"))


def check_pipeline(run_main, student: Path, size: tuple[int, int], folder: Path) -> None:
    """diffusers alone draws with the export at a size off the square."""
    from diffusers import WanPipeline

    outcome = run_main(export_student.main, "--student", student, "--format", "pipeline", "--output", folder)
    assert outcome.code == 0 and "num_inference_steps=4" in outcome.out, outcome.err
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    width, height = size
    drawn = pipeline(
        PROMPT, num_frames=1, guidance_scale=1.0, num_inference_steps=4, width=width, height=height, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames[0][0]  # fmt: skip
    assert drawn.shape == (height, width, 3) and np.isfinite(drawn).all() and drawn.std() > 0.005


def test_a_student_of_the_teachers_own_shape_has_nothing_to_learn_at_any_size(run_main, tmp_path):
    """It starts as the teacher with its LoRA: what it learns from, what both draw and what is scored must say so at once."""
    world = make_world(tmp_path, "tiny")
    own = STUDENT | {"image_size": 64, "hidden_size": 24, "depth": 3, "num_heads": 2, "ffn_dim": 40}
    world.config.write_text(json.dumps(own), encoding="utf-8")
    student = tmp_path / "student"
    still = ["--guidance_scale", 1, "--lr", 1e-12, "--optimizer", "adamw", "--feature_loss_weight", 0]
    outcome = run_main(train_distillation.main, *world.training(student, *still))
    assert outcome.code == 0, outcome.err
    assert max(line["loss"] for line in read_metrics(student)) < 1e-9
    flags = ["--prompts_file", world.templates, "--num_prompts", 2, "--num_seeds", 1]
    for width, height in SIZES[:2]:
        outcome = run_main(evaluate_student.main, *world.drawing(student), *flags, "--size", f"{width}x{height}")
        assert outcome.code == 0, outcome.err
        results = json.loads((student / "evaluation.json").read_text(encoding="utf-8"))
        assert results["endpoint"]["latent_relative_error"] < 1e-5
