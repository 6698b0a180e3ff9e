"""evaluate_student.py works end to end.

A student that equals its teacher must score perfectly, and results must not depend on the batch.
"""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import evaluate_student
import generate_images
from support.clip import save_clip
from support.runs import ROOT
from support.students import train_student, write_teacher
from wandistiller.command_line import run_command
from wandistiller.evaluation.judges import load_judge
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.students.record import StudentRecord

JUDGE = f"{ROOT / 'tools' / 'demo_judge.py'}:judge_all"
WORLD_PROMPTS = [
    "a small red circle on the left, on a white background",
    "a large blue square on the right, on a black background",
    "a large green ring in the center, on a gray background",
]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A teacher of the demo world by its record (its pictures are of nothing), and a student of it."""
    root = tmp_path_factory.mktemp("house")
    write_teacher(root / "teacher", seed=5)
    record = {"world": "shapes", "guidance_scale": 3.0, "num_inference_steps": 6}
    (root / "teacher" / "teacher_record.json").write_text(json.dumps(record), encoding="utf-8")
    (root / "world.txt").write_text("\n".join(WORLD_PROMPTS), encoding="utf-8")
    (root / "other.txt").write_text("a photo of a cat\na cathedral at dusk\n", encoding="utf-8")
    (root / "broken.py").write_text("1 / 0", encoding="utf-8")
    own = "def bright(pictures, prompts):\n    return [p.mean() > 0 for p in pictures]\ndef short(*_):\n    return [True]\n"
    (root / "own.py").write_text(own, encoding="utf-8")
    train_student(root / "of", root / "teacher")
    return root


def evaluate(student: Path, prompts_file: Path, output: Path, *flags: str) -> dict:
    argv = ["--student", str(student), "--prompts_file", str(prompts_file), "--output", str(output), "--device", "cpu"]
    assert evaluate_student.main([*argv, "--prompt_cache", str(student.parent / "cache"), *flags]) == 0
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8"))


def test_table_json_and_pictures(house, tmp_path, capsys):
    flags = ["--num_prompts", "3", "--num_seeds", "2", "--judge", JUDGE]
    results = evaluate(house / "of" / "student", house / "world.txt", tmp_path, *flags)
    printed = capsys.readouterr().out
    assert results["num_inference_steps"] == 6 and results["guidance_scale"] == 3.0
    rows = [(row["who"], row["steps"]) for row in results["frontier"]["rows"]]
    assert rows == [*(("student", n) for n in (1, 2, 4, 6)), *(("teacher", n) for n in (1, 2, 3, 4, 5, 6))]
    last, recommended = results["frontier"]["rows"][3], results["frontier"]["recommended_steps"]
    assert last["endpoint"] == pytest.approx(results["endpoint"]["latent_relative_error"]) and last["right"] is not None
    assert last["cost"] == pytest.approx(results["cost"]["step_flops"]["ratio"])
    facts = {"present", "shape", "colour", "size", "place", "background", "makeable", "correct"}
    assert set(results["accuracy"]["student"]) == set(results["accuracy"]["teacher"]) == facts
    assert results["accuracy"]["num_pictures"] == 6
    cost = results["cost"]
    assert cost["parameters"]["student"] == sum(
        parameter.numel() for parameter in WanLiteStudent.from_pretrained(house / "of" / "student").parameters()
    )
    assert 0 < cost["parameters"]["ratio"] < 1
    for words in ("prompt drawn right", "as teacher in", "lower is better", "what the noise decides: gain"):
        assert words in printed
    farthest = [one["prompt"] for one in results["worst_prompts"]]
    assert sorted(farthest) == sorted(WORLD_PROMPTS)
    said = [f"In {recommended} step", f"Farthest from the teacher: {farthest[0]!r}", "as teacher in"]
    assert sorted(said, key=printed.index) == said
    picture = results["picture"]
    assert list(picture) == ["text encoder", "student", "teacher", "VAE"]
    assert all(value > 0 for part in picture.values() for value in part.values())
    assert picture["student"]["flops"] == pytest.approx(6 * cost["step_flops"]["student"])
    stored = load_file(house / "teacher" / "text_encoder" / "model.safetensors")
    assert picture["text encoder"]["bytes"] == 4 * sum(tensor.numel() for tensor in stored.values())
    assert results["noise"]["num_noises"] == 2
    image = Image.open(tmp_path / "teacher_vs_student.png")
    assert image.width > 3 * 160 and image.height > 2 * 160
    written = {"evaluation.json", "frontier.png", "gallery.html", "teacher_vs_student.png"}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_a_student_equal_to_its_teacher_scores_perfectly(house, tmp_path):
    """The teacher's own shape, no guidance and no learning to speak of: every measure must say equal."""
    shape = {"hidden_size": 24, "depth": 3, "num_heads": 2, "ffn_dim": 40}
    flags = ["--guidance_scale", "1", "--lr", "1e-12"]
    student = train_student(tmp_path / "same", house / "teacher", *flags, **shape)
    judge = f"{house / 'own.py'}:bright"
    results = evaluate(student, house / "other.txt", tmp_path / "out", "--judge", judge, "--frontier_prompts", "0")
    assert results["accuracy"]["student"] == results["accuracy"]["teacher"] == {"correct": 1.0}
    assert results["velocity_error"]["mean"] < 1e-5
    assert results["endpoint"]["latent_relative_error"] < 1e-4
    for name in ("norm_ratio", "cosine", "gain"):
        assert results["noise"][name] == pytest.approx(1, abs=1e-3)
    for name in ("parameters", "step_flops"):
        assert results["cost"][name]["ratio"] == 1


def test_the_steps_that_are_enough_are_recorded_and_drawn_in_from_then_on(house, tmp_path, capsys):
    student = shutil.copytree(house / "of" / "student", tmp_path / "of" / "student")
    evaluate(student, house / "world.txt", student, "--num_inference_steps", "2")  # not against all of its steps
    assert "are enough" not in capsys.readouterr().out
    recommended = evaluate(student, house / "world.txt", student)["frontier"]["recommended_steps"]
    assert recommended < 6 and f"{recommended} steps are enough" in capsys.readouterr().out
    assert StudentRecord.of(StudentConfig.load(student)).steps == recommended
    words = ["--student", str(student), "--prompt", "a", "--output", str(tmp_path / "pictures"), "--device", "cpu"]
    assert generate_images.main([*words, "--prompt_cache", str(tmp_path / "cache")]) == 0
    assert Image.open(tmp_path / "pictures" / "000_a_seed0_32x32.png").text["num_inference_steps"] == str(recommended)
    again = evaluate(student, house / "world.txt", student)
    assert again["student_steps"] == again["frontier"]["recommended_steps"] == recommended


def test_a_clip_judges_any_world(house, tmp_path, monkeypatch):
    """A tiny one with random weights; transformers' own call on a single pair of picture and text is the oracle."""
    model, processor = save_clip(tmp_path / "clip")
    monkeypatch.setenv("CLIP", str(tmp_path / "clip"))
    judge = f"{ROOT / 'tools' / 'clip_judge.py'}:cosines"
    results = evaluate(
        house / "of" / "student", house / "other.txt", tmp_path / "out", "--num_seeds", "1", "--judge", judge
    )
    assert set(results["accuracy"]["student"]) == {"clip"} and results["frontier"]["rows"][0]["right"] is None
    picture = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), dtype=np.uint8)
    (found,) = load_judge(judge, ["a cat"])(picture, ["a cat"])
    answer = model(**processor(text=["a cat"], images=[Image.fromarray(picture[0])], return_tensors="pt"))
    assert found["clip"] == pytest.approx(float(answer.logits_per_image / model.logit_scale.exp()), abs=1e-4)


def test_a_student_of_few_steps_is_drawn_in_these_alone_and_the_frontier_may_be_left_out(house, tmp_path):
    student = train_student(tmp_path / "few", house / "teacher", "--student_steps", "2", "--max_steps", "3")
    results = evaluate(student, house / "world.txt", tmp_path / "out")
    assert "accuracy" not in results, "no record of a teacher or student names a judge"
    student_rows = [row for row in results["frontier"]["rows"] if row["who"] == "student"]
    assert [(row["steps"], row["sampler"]) for row in student_rows] == [(2, "Euler")]
    assert results["frontier"]["recommended_steps"] == 2
    assert "frontier" not in evaluate(student, house / "world.txt", tmp_path / "none", "--frontier_prompts", "0")
    assert not (tmp_path / "none" / "frontier.png").exists()


def test_a_student_of_fewer_steps_than_a_teacher_of_few_has_no_velocity_error(house, tmp_path):
    """Both are drawn by Euler, but the student knows the average velocity of two of the teacher's steps."""
    flags = ["--teacher_steps", "4", "--guidance_scale", "1", "--max_steps", "3"]
    for steps, is_measured in (("2", False), ("none", True)):
        student = train_student(tmp_path / steps, house / "teacher", *flags, "--student_steps", steps)
        results = evaluate(student, house / "world.txt", tmp_path / f"of {steps}", "--frontier_prompts", "0")
        assert ("velocity_error" in results) == is_measured


def test_results_do_not_depend_on_the_batch(house, tmp_path):
    of, flags = (house / "of" / "student", house / "world.txt"), ["--frontier_prompts", "0", "--batch_size"]
    one, many = (evaluate(*of, tmp_path / size, *flags, size) for size in ("1", "16"))
    distances = [results["endpoint"]["latent_relative_error"] for results in (one, many)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)
    assert one["velocity_error"]["mean"] == pytest.approx(many["velocity_error"]["mean"], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--prompts_file", "{house}/other.txt", "--judge", JUDGE],
            "no object of the demo world in the prompt 'a photo",
        ),
        (["--judge", "tools"], "--judge tools: there is no such file; give FILE.py:FUNCTION"),
        (["--judge", JUDGE + "s"], "the file has no function judge_alls"),
        (["--judge", "{house}/other.txt:judge"], "the file cannot be run (SyntaxError: "),
        (["--judge", "{house}/broken.py:judge"], "the file cannot be run (ZeroDivisionError: division by zero)"),
        (
            ["--judge", "{house}/own.py:short"],
            "must return True, False or a dict of the same facts and numbers for each of 3 pictures",
        ),
        (["--prompts_file", "{house}/none.txt"], "none.txt: cannot be read"),
        (["--student", "{house}/none"], "is not a folder"),
        (["--teacher_path", "{house}/none"], "there is no such file or folder"),
        (["--vae_path", "{house}"], "has no VAE"),
    ],
)
def test_mistakes_are_answered_in_one_line(house, tmp_path, capsys, flags, message):
    argv = ["--student", str(house / "of" / "student"), "--prompts_file", str(house / "world.txt")]
    argv += ["--output", str(tmp_path / "out"), *[flag.format(house=house) for flag in flags]]
    with contextlib.suppress(SystemExit):
        assert run_command(lambda: evaluate_student.main(argv)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
