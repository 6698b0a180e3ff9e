"""run_production_test.py prints what it checked, keeps what it is told to keep, and fails with the right exit code.

A real teacher's headers and a failure of the product are given to the public command.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest

import run_production_test
from support.runs import IDENTITY_CONFIG, PROMPTS, PRUNED_CONFIG, ROOT, file_size_limited, snapshot
from wandistiller import StudentConfig, WanLiteStudent

LITE = ROOT / "config" / "student_config_lite.json"


@pytest.fixture
def few(tmp_path):
    """Flags of a pre-flight of seconds: six prompts and the demo's small student."""
    prompts = tmp_path / "few.txt"
    prompts.write_text("\n".join(f"a picture of {number} cats" for number in range(6)), encoding="utf-8")
    return "--student_config", ROOT / "config" / "demo_student_config.json", "--data_path", prompts


@pytest.fixture
def preflight(run_main, monkeypatch, tmp_path):
    """Run in-process, with a temporary folder of its own that shows what is left behind."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))

    def run(*flags: object):
        return run_main(run_production_test.main, *flags)

    run.scratch = scratch
    return run


def assert_passed(outcome) -> None:
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "Production Test PASSED"
    assert "FAILED" not in outcome.out


def test_the_lite_config_with_55_prompts_passes_from_the_shell_and_prints_what_it_checked(tmp_path):
    words = [sys.executable, ROOT / "run_production_test.py", "--student_config", LITE, "--data_path", PROMPTS]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    expected = [
        r"Prompts found: 55 in .*static_prompts\.txt",
        r"Config found: .*student_config_lite\.json",
        r"Config adjusted: model_type WanLiteStudent, block lite, hidden_size 1024 -> 256, depth 16 -> 4",
        r"Student parameters: 4,752,132",
        r"Done: 14 steps",
        r"Resuming from step 14",
        r"Held-out states: 16 paths of the teacher",
        r"Done: 28 steps",
        r"Steps completed: 28 of 28, average loss \d+\.\d+",
        r"Files saved: .*diffusion_model\.safetensors .*student_config\.json",
        r"Reloaded from disk: every weight is finite",
        r"Production Test PASSED",
    ]
    position = 0
    for pattern in expected:
        match = re.compile(pattern).search(done.stdout, position)
        assert match, f"{pattern!r} is missing, or comes too early, in:\n{done.stdout}"
        position = match.end()
    assert list(tmp_path.iterdir()) == []


def test_the_default_config_shrinks_and_leaves_nothing_behind(preflight, few, monkeypatch):
    monkeypatch.chdir(ROOT)  # the defaults are relative to the repository
    outcome = preflight(*few[2:])
    assert_passed(outcome)
    assert "Config found: config/student_config.json" in outcome.out
    assert "block wan, hidden_size 1536 -> 256, depth 20 -> 4, num_heads 2" in outcome.out
    assert "Steps completed: 3 of 3" in outcome.out
    assert not list(preflight.scratch.glob("wandistiller-*"))


def test_output_dir_keeps_a_student_that_loads_and_moves_another_one_aside(preflight, few, tmp_path):
    """With the config of other channels."""
    kept, config = tmp_path / "kept", ROOT / "config" / "student_config_5B.json"
    WanLiteStudent(StudentConfig(**PRUNED_CONFIG)).save_pretrained(kept)
    before = snapshot(kept)
    assert_passed(preflight("--student_config", config, *few[2:], "--output_dir", kept))
    names = {"student_config.json", "diffusion_model.safetensors", "metrics.jsonl", "projection_report.json"}
    assert set(snapshot(kept)) > names
    assert WanLiteStudent.from_pretrained(kept).config.distillation["teacher_path"] == "mock"
    (aside,) = kept.glob("replaced-*")
    assert snapshot(aside) == before


def test_it_takes_the_flags_of_the_trainer_and_tests_the_recipe_that_was_typed(preflight, few):
    recipe = "--preset A14B-1B --teacher_path mock --teacher_dtype fp8 --compile --student_steps none --optimizer adamw"
    outcome = preflight(*few, *recipe.split())
    assert_passed(outcome)
    assert "adamw at" in outcome.out


@pytest.fixture
def hollow_teacher(teachers, tmp_path):
    """Every weight is NaN behind intact headers: nothing that uses one can go unnoticed."""
    folder = tmp_path / "hollow"
    shutil.copytree(teachers.two, folder)
    for path in folder.rglob("*.safetensors"):
        raw = path.read_bytes()
        header = 8 + int.from_bytes(raw[:8], "little")
        path.write_bytes(raw[:header] + b"\xff" * (len(raw) - header))
    return folder


def test_a_real_teacher_is_planned_for_with_the_very_command_by_its_headers_alone(
    preflight, few, write_config, hollow_teacher
):
    words = ["--teacher_path", hollow_teacher, "--replay", 4, "--assume_gpu", 80]
    outcome = preflight(*few, "--student_config", write_config(PRUNED_CONFIG), *words)
    assert_passed(outcome)
    assert "(high + low)" in outcome.out and "Fits: about" in outcome.out and "config.json fits " in outcome.out


def test_where_the_command_would_be_refused_the_preflight_fails_too(preflight, few, write_config, hollow_teacher):
    config = write_config(PRUNED_CONFIG)
    words = ["--student_config", config, "--teacher_path", hollow_teacher, "--assume_gpu", 1e-4]
    outcome = preflight(*few, *words).refused("Does not fit")
    assert outcome.out.splitlines()[-1] == "Production Test FAILED"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_channels": 48, "image_size": 64}, ['edit the line to "num_channels": 16']),
        ({"depth": 9}, ["depth=9", "use 3 or less"]),
    ],
)
def test_a_config_that_does_not_fit_the_real_teacher_is_refused_with_the_line_to_edit(
    preflight, write_config, hollow_teacher, changes, words
):
    config = write_config(PRUNED_CONFIG | changes)
    outcome = preflight("--student_config", config, "--data_path", PROMPTS, "--teacher_path", hollow_teacher).refused()
    assert outcome.out.splitlines()[-1] == "Production Test FAILED"
    (message,) = outcome.err.strip().splitlines()
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert "Student parameters" not in outcome.out, "work began before the answer"


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"block": "wan",}', ["line 1"]),
        (json.dumps(IDENTITY_CONFIG | {"num_heads": 5}), ["hidden_size=24", "num_heads"]),
    ],
)
def test_a_broken_config_fails_with_one_message_and_exit_2(preflight, write_config, tmp_path, text, words):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine", encoding="utf-8")
    before = snapshot(kept)
    outcome = preflight("--student_config", write_config(text), "--data_path", PROMPTS, "--output_dir", kept).refused()
    (message,) = outcome.err.strip().splitlines()
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert outcome.out.splitlines()[-1] == "Production Test FAILED"
    assert snapshot(kept) == before
    assert not list(preflight.scratch.glob("wandistiller-*"))


def test_a_disk_that_fills_is_told_with_exit_1(preflight, few):
    with file_size_limited(10_000):
        outcome = preflight(*few)
    assert outcome.code == 1 and "cannot be written (File too large)" in outcome.err
    assert outcome.out.splitlines()[-1] == "Production Test FAILED"
    assert not list(preflight.scratch.glob("wandistiller-*"))
