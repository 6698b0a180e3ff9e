"""evaluate_student.py works end to end.

A student that equals its teacher must score perfectly, and results must not depend on the batch.

pytest tests/commands/test_evaluate_student.py
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

import evaluate_student
from support.scorer_models import save_scorer
from support.students import train_student, write_teacher
from wandistiller.command_line import run_command
from wandistiller.evaluation.scorers import MODEL_TYPES
from wandistiller.model.transformer import WanLiteStudent

JUDGE = f"{Path(__file__).parents[2] / 'tools' / 'demo_judge.py'}:judge_all"
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


@pytest.fixture(scope="module")
def scorers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scorers")
    assert list(MODEL_TYPES) == evaluate_student.SCORER_KINDS
    for kind in MODEL_TYPES:
        save_scorer(kind, root / kind)
    return {kind: root / kind for kind in MODEL_TYPES}


def given(scorers: dict[str, Path]) -> list[str]:
    return [word for kind, folder in scorers.items() for word in ("--scorer", f"{kind}={folder}")]


def test_table_json_and_picture(house, tmp_path, capsys):
    results = evaluate(
        house / "of" / "student",
        house / "world.txt",
        tmp_path,
        "--num_prompts",
        "3",
        "--num_seeds",
        "2",
        "--judge",
        JUDGE,
    )
    printed = capsys.readouterr().out
    assert results["num_inference_steps"] == 6 and results["guidance_scale"] == 3.0
    buckets = results["velocity_error"]["by_sigma"]
    assert sum(bucket["count"] for bucket in buckets) == 3 * 2 * 6
    rows = [(row["who"], row["steps"]) for row in results["frontier"]["rows"]]
    assert rows == [*(("student", n) for n in (1, 2, 4, 6)), *(("teacher", n) for n in (1, 2, 3, 4, 5, 6))]
    last, recommended = results["frontier"]["rows"][3], results["frontier"]["recommended_steps"]
    assert last["endpoint"] == pytest.approx(results["endpoint"]["latent_relative_error"]) and last["right"] is not None
    assert last["cost"] == pytest.approx(results["cost"]["step_flops"]["ratio"])
    assert f"In {recommended} step" in printed
    facts = {"present", "shape", "colour", "size", "place", "background", "makeable", "correct"}
    assert set(results["accuracy"]["student"]) == set(results["accuracy"]["teacher"]) == facts
    assert results["accuracy"]["num_pictures"] == 6
    cost = results["cost"]
    assert cost["parameters"]["student"] == sum(
        parameter.numel() for parameter in WanLiteStudent.from_pretrained(house / "of" / "student").parameters()
    )
    assert 0 < cost["parameters"]["ratio"] < 1
    for words in (
        "prompt drawn right",
        "as teacher in",
        "sigma 0.9 to 1.0",
        "what the noise decides: gain",
    ):
        assert words in printed
    noise = results["noise"]
    assert noise["num_noises"] == 2
    in_quadrature = math.hypot(noise["mean_error"], noise["noise_error"])
    assert noise["mean_error"] == 0 or in_quadrature == pytest.approx(results["endpoint"]["latent_relative_error"])
    assert noise["meaning"][:40] in printed
    image = Image.open(tmp_path / "teacher_vs_student.png")
    assert image.width > 3 * 160 and image.height > 2 * 160
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation.json",
        "frontier.png",
        "gallery.html",
        "teacher_vs_student.png",
    ]


def test_a_student_equal_to_its_teacher_scores_perfectly(house, tmp_path, scorers):
    """The teacher's own shape, no guidance and no learning to speak of: every measure must say equal."""
    shape = {"hidden_size": 24, "depth": 3, "num_heads": 2, "ffn_dim": 40}
    flags = ["--guidance_scale", "1", "--lr", "1e-12"]
    student = train_student(tmp_path / "same", house / "teacher", *flags, **shape)
    judge = f"{house / 'own.py'}:bright"
    results = evaluate(student, house / "other.txt", tmp_path / "out", "--judge", judge, *given(scorers))
    for kind in ("clip", "siglip"):
        found = results["scores"][kind]
        assert found["student"] == pytest.approx(found["teacher"], abs=1e-3)
    assert results["scores"]["dino"]["cosine"] == pytest.approx(1, abs=1e-3)
    assert results["cmmd"]["value"] == pytest.approx(0, abs=1e-3)
    assert results["accuracy"]["student"] == results["accuracy"]["teacher"] and results["accuracy"]["ratio"] == 1
    assert results["velocity_error"]["mean"] < 1e-5
    assert results["endpoint"]["latent_relative_error"] < 1e-4
    assert results["endpoint"]["psnr_db"] > 60
    assert results["high_frequency_energy"]["ratio"] == pytest.approx(1, abs=1e-3)
    for name in ("norm_ratio", "cosine", "gain"):
        assert results["noise"][name] == pytest.approx(1, abs=1e-3)
    assert results["noise"]["noise_error"] < 1e-4
    for name in ("parameters", "step_flops"):
        assert results["cost"][name]["ratio"] == 1


def test_a_student_of_few_steps_is_drawn_in_these_alone_and_the_frontier_may_be_left_out(house, tmp_path):
    student = train_student(tmp_path / "few", house / "teacher", "--student_steps", "2", "--max_steps", "3")
    results = evaluate(student, house / "world.txt", tmp_path / "out")
    assert "accuracy" not in results, "no record of a teacher or student names a judge"
    student_rows = [row for row in results["frontier"]["rows"] if row["who"] == "student"]
    assert [(row["steps"], row["sampler"]) for row in student_rows] == [(2, "Euler")]
    assert results["frontier"]["recommended_steps"] == 2
    assert "frontier" not in evaluate(student, house / "world.txt", tmp_path / "none", "--frontier_prompts", "0")
    assert not (tmp_path / "none" / "frontier.png").exists()


def test_results_do_not_depend_on_the_batch(house, tmp_path):
    one, many = (
        evaluate(house / "of" / "student", house / "world.txt", tmp_path / size, "--batch_size", size)
        for size in ("1", "16")
    )
    assert one["endpoint"]["latent_relative_error"] == pytest.approx(
        many["endpoint"]["latent_relative_error"], rel=1e-3
    )
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
        (["--judge", "{house}/other.txt:judge"], "is not a Python file"),
        (["--judge", "{house}/broken.py:judge"], "the file cannot be run (ZeroDivisionError: division by zero)"),
        (
            ["--judge", "{house}/own.py:short"],
            'must return True, False or a dict with "correct" for each of 3 pictures',
        ),
        (["--prompts_file", "{house}/none.txt"], "none.txt: cannot be read"),
        (["--student", "{house}/none"], "there is no such folder"),
        (["--teacher_path", "{house}/none"], "there is no such file or folder"),
        (["--vae_path", "{house}"], "holds no VAE"),
        (["--scorer", "fid={house}"], "must be KIND=ID_OR_FOLDER, of the kinds clip, siglip, dino"),
        (["--scorer", "clip={house}", "--scorer", "clip={house}"], "one kind is given twice"),
        (["--scorer", "siglip={house}/teacher"], "holds no config.json"),
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


# ---- scorers ----


def test_scorers_are_in_table_json_and_card(house, tmp_path, capsys, scorers):
    student = shutil.copytree(house / "of" / "student", tmp_path / "of" / "student")
    plain = evaluate(student, house / "world.txt", tmp_path / "plain", "--num_seeds", "2")
    capsys.readouterr()
    results = evaluate(student, house / "world.txt", student, "--num_seeds", "2", *given(scorers))
    printed, card = capsys.readouterr().out, (student / "README.md").read_text(encoding="utf-8")
    assert set(results["scores"]) == {"clip", "siglip", "dino"}
    assert "scores" not in plain and "cmmd" not in plain  # and nothing else is changed by being scored
    measured = {name: value for name, value in results.items() if name not in ("scores", "cmmd", "cost", "frontier")}
    assert measured == {name: value for name, value in plain.items() if name not in ("cost", "frontier")}
    clip, dino = results["scores"]["clip"], results["scores"]["dino"]
    assert clip["num_prompts"] == 3 and clip["model"] == str(scorers["clip"])
    assert results["cmmd"]["num_pictures"] == 6 and results["cmmd"]["value"] > 0
    for shown in (f"{clip['student']:.4g}", f"{dino['cosine']:.4g}", f"{results['cmmd']['value']:.4g}"):
        assert shown in printed and shown in card
    assert str(scorers["clip"]) not in card
    for words in (
        "clip is clip",
        "siglip: cosine to the prompt",
        "dino: cosine to the teacher's picture",
        "CMMD (6 pictures)",
    ):
        assert words in printed and words in card
