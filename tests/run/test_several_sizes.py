"""Runs at several image sizes: every step is of one size, all are visited equally, and memory is that of one size.

A run of the square alone is bit for bit the run without the flags. The teacher is asked, and the student learns, at shapes that are
recorded where both are asked. That a stopped run resumes bit for bit is in tests/training/test_checkpoints.py.
"""

import json
from collections import Counter
from dataclasses import replace

import pytest

import evaluate_student
import generate_images
from support.asked import questions
from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG, same_weights
from support.students import train_student, write_teacher
from wandistiller.budget.memory import memory_budget
from wandistiller.model.config import StudentConfig
from wandistiller.projection.comfyui import comfyui_workflow
from wandistiller.run.dry_run import workload_of
from wandistiller.run.flags import parse_args
from wandistiller.run.inputs import read_inputs
from wandistiller.run.resolve import resolve

THREE = ["--image_sizes", "32x32", "48x32", "32x48"]
SHAPES = [(4, 4), (4, 6), (6, 4)]  # height and width of their latents
RECIPES = {
    "paths": ["--replay", 2, "--student_steps", "none"],
    "few steps": ["--student_steps", 2, "--replay", 2],
    "two experts": ["--calls_per_expert", 2, "--replay", 1],
}


@pytest.mark.parametrize("flags", [["--image_sizes", "1:1"], ["--image_sizes", "32x32"]], ids=["ratio", "size"])
def test_the_square_alone_is_the_run_without_the_flag(train, teachers, tmp_path, flags):
    plain, given = tmp_path / "plain", tmp_path / "given"
    recipe = [*RECIPES["paths"], "--max_steps", 8, "--batch_size", 4, "--save_every", 8]
    train(teachers.one, PRUNED_CONFIG, *recipe, output_dir=plain).ok()
    train(teachers.one, PRUNED_CONFIG, *recipe, *flags, output_dir=given).ok()
    assert same_weights(plain, given)
    records = [json.loads((folder / "student_config.json").read_text())["distillation"] for folder in (plain, given)]
    assert records[0] == records[1] and "image_sizes" not in records[0]
    # A checkpoint of either is a checkpoint of the other:
    longer = train(teachers.one, PRUNED_CONFIG, *recipe, *flags, "--max_steps", 9, output_dir=plain)
    assert longer.code == 0 and "Resuming from step 8" in longer.out


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_is_of_one_size_and_all_are_visited_equally(train, teachers, recipe):
    teacher = teachers.two if recipe == "two experts" else teachers.one
    flags = [*RECIPES[recipe], *THREE, "--max_steps", 18, "--batch_size", 4, "--eval_every", 0]
    with questions(IDENTITY_CONFIG["hidden_size"]) as of_teacher, questions(PRUNED_CONFIG["hidden_size"]) as of_student:
        outcome = train(teacher, PRUNED_CONFIG, *flags)
    assert outcome.code == 0, outcome.err
    learnt = Counter(latents.shape[2:] for latents, _ in of_student if len(latents) == 4)
    assert min(learnt.values()) >= 6  # more where paths ask the student too
    taught = Counter(latents.shape[2:] for latents, _ in of_teacher)
    assert set(taught) == set(learnt) == set(SHAPES)
    if recipe == "paths":
        assert "the teacher answered 9 batches" in outcome.out
        assert max(taught.values()) == min(taught.values())


def test_a_cache_of_several_sizes_is_filled_once_and_learnt_from_offline(train, teachers, tmp_path):
    cache = ["--teacher_cache", tmp_path / "cache", "--max_steps", 9, "--batch_size", 4]
    train(teachers.one, PRUNED_CONFIG, *cache, *THREE, output_dir=tmp_path / "one").ok()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["32x32", "32x48", "48x32"]
    with questions(IDENTITY_CONFIG["hidden_size"]) as of_teacher:
        again = train(teachers.one, PRUNED_CONFIG, *cache, *THREE, "--offline_teacher", output_dir=tmp_path / "two")
    assert again.code == 0 and not of_teacher
    assert same_weights(tmp_path / "one", tmp_path / "two")
    train(teachers.one, PRUNED_CONFIG, *cache, output_dir=tmp_path / "four").refused("--teacher_cache")
    assert not (tmp_path / "four").exists()


def test_the_memory_is_that_of_a_run_at_the_largest_size_alone(flags_of):
    def planned(*flags: object):
        given = parse_args(flags_of("planned", "--batch_size", 4, "--max_steps", 24, *flags))
        return workload_of(resolve(given, read_inputs(given)))

    three = planned(*THREE)
    one = planned("--image_sizes", "48x32")
    assert three == replace(one, latents_per_slot=3 * one.latents_per_slot), "each size has paths of its own"
    memory = {part.name: part.num_bytes for part in memory_budget(one)}
    square = {part.name: part.num_bytes for part in memory_budget(planned())}
    assert memory["training states"] == 1.5 * square["training states"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image_sizes", "5:1"], "4:1 to 1:4"),
        (["--image_sizes", "1:1", "4:3"], "4:3: 32x32 is there already"),
        (["--image_sizes", "50x32"], "nearest is 48x32"),
        (["--image_sizes", "32x0"], "32x0"),
        (["--image_sizes", "160x32"], "nearest is 160x48"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_message(train, teachers, tmp_path, flags, words):
    outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 1, *flags)
    assert outcome.code == 2 and words in outcome.err and len(outcome.err) < 500 and "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A student of three sizes, and one of rectangles alone, of a teacher of the demo's world by its record."""
    root = tmp_path_factory.mktemp("sizes")
    teacher = write_teacher(root / "teacher", seed=5)
    record = {"world": "shapes", "guidance_scale": 3.0, "num_inference_steps": 4}
    (teacher / "teacher_record.json").write_text(json.dumps(record), encoding="utf-8")
    train_student(root / "three", teacher, "--image_sizes", "48x32", "32x32", "32x48", "--num_samples", "4")
    train_student(root / "wide", teacher, "--image_sizes", "48x32", "--num_samples", "0")
    return root


def draw(house, run_main, student: str, output, *flags: object):
    argv = ["--student", house / student / "student", "--prompt", "a red ring", "--output", output, *flags]
    outcome = run_main(generate_images.main, *argv, "--prompt_cache", house / "cache", "--device", "cpu").ok()
    return outcome.out


def test_a_student_records_its_sizes_and_draws_at_them(house, run_main, tmp_path):
    config = StudentConfig.load(house / "three" / "student")
    assert config.image_size == 32 and config.distillation["image_sizes"] == ["48x32", "32x32", "32x48"]
    out = draw(house, run_main, "three", tmp_path)
    assert "_32x32.png" in out and "Warning" not in out
    out = draw(house, run_main, "three", tmp_path, "--width", 48)
    assert "_48x32.png" in out and "Warning" not in out
    assert "_48x32.png" in draw(house, run_main, "wide", tmp_path / "wide")


def test_a_student_of_rectangles_alone_is_drawn_at_its_first_everywhere(house):
    """Where no size is asked for, as by generate_images.py: by the workflow for ComfyUI."""
    folder = house / "wide" / "student"
    workflow = comfyui_workflow(StudentConfig.load(folder), "student.safetensors", "a red ring")
    (latents,) = [node for node in workflow["nodes"] if node["type"] == "EmptyHunyuanLatentVideo"]
    assert latents["widgets_values"][:2] == [48, 32]


def test_a_size_far_from_all_that_were_learnt_is_a_warning_in_one_sentence(house, run_main, tmp_path):
    out = draw(house, run_main, "three", tmp_path, "--width", 96, "--height", 48)
    (warning,) = [line for line in out.splitlines() if line.startswith("Warning")]
    assert "48x32" in warning and "32x48" in warning and "96 wide and 48 high" in warning


def test_sample_pictures_are_of_all_sizes(house):
    (strip,) = (house / "three" / "student" / "samples").glob("*.png")
    assert strip.stat().st_size > 0


def test_an_evaluation_is_of_the_first_size_or_of_the_one_that_is_asked_for(house, run_main, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a small red circle on the left, on a white background\na large blue ring at the top, gray background\n"
    )
    flags = ["--student", house / "three" / "student", "--prompts_file", prompts, "--prompt_cache", house / "cache"]
    errors = {}
    for size, given in (("32x32", []), ("48x32", ["--size", "48x32"])):
        outcome = run_main(evaluate_student.main, *flags, "--output", tmp_path / size, "--device", "cpu", *given).ok()
        results = json.loads((tmp_path / size / "evaluation.json").read_text())
        assert results["image_size"] == size
        errors[size] = results["endpoint"]["latent_relative_error"]
    assert errors["32x32"] != errors["48x32"]
    outcome = run_main(evaluate_student.main, *flags, "--output", tmp_path / "odd", "--size", "40x32")
    assert outcome.code == 2 and "--size 40 is not a multiple of 16" in outcome.err
