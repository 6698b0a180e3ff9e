"""run_production_test.py prints what it checked, keeps what it is told to keep, and fails with the right exit code.

A trained student's config, a real teacher's headers and a failure of the product are all given to the public command.

pytest tests/commands/test_run_production_test.py
"""

import json
import re
import subprocess
import sys

import pytest

import run_production_test
from support.runs import (
    IDENTITY_CONFIG,
    PROMPTS,
    PRUNED_CONFIG,
    ROOT,
    read_metrics,
    snapshot,
)
from wandistiller import StudentConfig, WanLiteStudent

LITE = ROOT / "config" / "student_config_lite.json"
SMALL = ("--student_config", ROOT / "config" / "demo_student_config.json", "--data_path", PROMPTS, "--batch_size", 20)

# (flag, a value, default)
FLAGS = [
    ("student_config", "x", "config/student_config.json"),
    ("data_path", "x", "data/static_prompts.txt"),
    ("caption_column", "x", None),
    ("teacher_path", "x", "mock"),
    ("teacher_path_low", "x", None),
    ("teacher_lora", "x:0.5", None),
    ("teacher_lora_low", "x", None),
    ("num_epochs", "3", 1),
    ("batch_size", "5", 2),
    ("output_dir", "x", None),
]


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


# ---- as a person runs it ----


def test_the_lite_config_with_55_prompts_passes_from_the_shell_and_prints_what_it_checked(tmp_path):
    words = [sys.executable, ROOT / "run_production_test.py", "--student_config", LITE, "--data_path", PROMPTS]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    expected = [
        r"Prompts found: 55 in .*static_prompts\.txt",
        r"Config found: .*student_config_lite\.json",
        r"Config adjusted: model_type WanLiteStudent, block lite, hidden_size 1024 -> 256, depth 16 -> 4",
        r"Student parameters: 4,752,132 total, 4,752,132 trainable",
        r"Teacher ready: mock, [\d,]+ parameters, frozen",
        r"Optimizer: AdamW.*28 steps of batch 2",
        r"Steps completed: 28 of 28, average loss \d+\.\d+",
        r"Files saved: .*diffusion_model\.safetensors .*student_config\.json",
        r"Reloaded from disk: predicts the same",
        r"Production Test PASSED",
    ]
    position = 0
    for pattern in expected:
        match = re.compile(pattern).search(done.stdout, position)
        assert match, f"{pattern!r} is missing, or comes too early, in:\n{done.stdout}"
        position = match.end()
    losses = re.findall(r"step (\d\d)/28 .*loss (\d+\.?\d*(?:e[-+]\d+)?)", done.stderr)
    assert [int(step) for step, _ in losses] == list(range(1, 29)), "every loss is shown as it comes"
    average = float(re.search(r"average loss (\S+)", done.stdout)[1])
    assert average == pytest.approx(sum(float(loss) for _, loss in losses) / 28, rel=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_the_default_config_passes_and_leaves_nothing_behind(preflight, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # the defaults are relative to the repository
    outcome = preflight("--batch-size", 55, "--num-epochs", 2)
    assert_passed(outcome)
    assert "Config found: config/student_config.json" in outcome.out
    assert "block wan, hidden_size 1536 -> 256, depth 20 -> 4, num_heads 2" in outcome.out
    assert "Steps completed: 2 of 2" in outcome.out
    assert not list(preflight.scratch.glob("wandistiller-*"))


def test_output_dir_keeps_a_student_that_loads(preflight, tmp_path):
    outcome = preflight(*SMALL, "--output_dir", tmp_path / "kept")
    assert_passed(outcome)
    names = {"student_config.json", "diffusion_model.safetensors", "metrics.jsonl", "projection_report.json"}
    assert set(snapshot(tmp_path / "kept")) == names
    assert all(name in outcome.out for name in names)
    assert WanLiteStudent.from_pretrained(tmp_path / "kept").config.distillation["teacher_path"] == "mock"
    assert len(read_metrics(tmp_path / "kept")) == 3
    assert not list(preflight.scratch.glob("wandistiller-*"))


def test_a_student_that_was_in_output_dir_is_moved_aside_intact(preflight, tmp_path):
    kept = tmp_path / "kept"
    assert_passed(preflight(*SMALL, "--output_dir", kept))
    before = snapshot(kept)
    outcome = preflight(*SMALL, "--output_dir", kept, "--num_epochs", 2)
    assert_passed(outcome)
    (aside,) = kept.glob("replaced-*")
    assert snapshot(aside) == before and str(aside) in outcome.out


# ---- flags ----


def test_the_flags_are_exactly_these_with_these_defaults():
    defaults = vars(run_production_test.parse_args([]))
    assert defaults == {name: default for name, _, default in FLAGS}


@pytest.mark.parametrize("name, value, default", FLAGS, ids=[name for name, _, _ in FLAGS])
def test_every_flag_is_taken_with_underscores_and_with_hyphens(name, value, default):
    teacher = ["--teacher_path", "y"] if name == "teacher_path_low" else []
    underscored = vars(run_production_test.parse_args([*teacher, f"--{name}", value]))
    assert underscored == vars(run_production_test.parse_args([*teacher, f"--{name.replace('_', '-')}", value]))
    assert underscored[name] != default


# ---- shrinking ----


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"hidden_size": 1536, "num_heads": 12}, {"hidden_size": 256, "num_heads": 2}),
        ({"hidden_size": 5120, "num_heads": 40}, {"hidden_size": 256, "num_heads": 2}),
        ({"hidden_size": 384, "num_heads": 32}, {"hidden_size": 256, "num_heads": 4}),  # heads of 12 do not fill 256
        ({"hidden_size": 128, "num_heads": 2, "depth": 2}, {"hidden_size": 128, "num_heads": 2, "depth": 2}),
        ({"hidden_size": 1536, "num_heads": 12, "num_channels": 48, "image_size": 512}, {"image_size": 128}),
        ({"hidden_size": 1536, "num_heads": 12, "patch_size": 4, "image_size": 512}, {"image_size": 64}),
        ({"block": "lite", "hidden_size": 300, "num_heads": 15, "ffn_dim": None, "patch_size": None, "freq_dim": None},
         {"hidden_size": 256, "num_heads": 8, "ffn_dim": 1024}),
        ({"block": "lite", "hidden_size": 64, "num_heads": 8, "ffn_dim": None, "patch_size": None, "freq_dim": None},
         {"hidden_size": 64, "num_heads": 8, "ffn_dim": 256}),
    ],
)  # fmt: skip
def test_any_config_shrinks_to_a_small_one_of_its_kind(changes, expected):
    config = StudentConfig(**(IDENTITY_CONFIG | {"depth": 20, "image_size": 512} | changes))
    small = run_production_test.shrink(config)
    assert {name: getattr(small, name) for name in expected} == expected
    assert small.hidden_size <= 256 and small.depth <= 4 and small.block == config.block
    assert small.num_channels == config.num_channels


def test_a_trained_students_config_shrinks_too():
    record = {"vae_scale_factor": 4}
    config = StudentConfig(**IDENTITY_CONFIG | {"image_size": 24, "distillation": record})
    assert run_production_test.shrink(config).latent_size % config.patch_size == 0


# ---- a real teacher ----


def without_weights(folder):
    """Overwrite every weight by NaN behind intact headers: nothing that uses one can go unnoticed."""
    for path in folder.rglob("*.safetensors"):
        raw = path.read_bytes()
        header = 8 + int.from_bytes(raw[:8], "little")
        path.write_bytes(raw[:header] + b"\xff" * (len(raw) - header))


@pytest.fixture
def hollow_teacher(teachers, tmp_path):
    import shutil

    folder = tmp_path / "hollow"
    shutil.copytree(teachers.two, folder)
    without_weights(folder)
    return folder


def test_a_real_teacher_is_held_against_the_given_config_by_its_headers_alone(preflight, write_config, hollow_teacher):
    outcome = preflight(
        "--student_config", write_config(PRUNED_CONFIG), "--data_path", PROMPTS, "--teacher_path", hollow_teacher,
        "--batch_size", 20,
    )  # fmt: skip
    assert_passed(outcome)
    assert "headers read, high + low: hidden_size 24, depth 3, num_heads 2, ffn_dim 40, 16 channels" in outcome.out
    assert "fits this teacher" in outcome.out


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_channels": 48, "image_size": 64}, ['edit the line to "num_channels": 16']),
        ({"text_encoder_output_dim": 4096}, ['edit the line to "text_encoder_output_dim": 20']),
        ({"depth": 9}, ["depth=9", "use 3 or less"]),
        ({"hidden_size": 48, "num_heads": 4}, ["hidden_size=48", "use 24 or less"]),
        ({"hidden_size": 24, "num_heads": 1}, ["heads of 24", "hidden_size=24 with num_heads=2"]),
    ],
)
def test_a_config_that_does_not_fit_the_real_teacher_is_refused_with_the_line_to_edit(
    preflight, write_config, hollow_teacher, changes, words
):
    config = write_config(PRUNED_CONFIG | changes)
    outcome = preflight("--student_config", config, "--data_path", PROMPTS, "--teacher_path", hollow_teacher)
    assert outcome.code == 2
    assert outcome.out.splitlines()[-1] == "Production Test FAILED"
    (message,) = outcome.err.strip().splitlines()
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert "Student parameters" not in outcome.out, "work began before the answer"


def test_the_lite_config_is_refused_for_a_teacher_of_other_channels(preflight, teachers):
    outcome = preflight("--student_config", LITE, "--data_path", PROMPTS, "--teacher_path", teachers.one)
    assert outcome.code == 2
    assert '"num_channels": 16' in outcome.err and "Production Test FAILED" in outcome.out


# ---- failing ----


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"block": "wan",}', ["line 1"]),
        (json.dumps(IDENTITY_CONFIG | {"hiden_size": 3}), ["hiden_size", "hidden_size"]),
        (json.dumps(IDENTITY_CONFIG | {"num_heads": 5}), ["hidden_size=24", "num_heads"]),
    ],
)
def test_a_broken_config_fails_with_one_message_and_exit_2(preflight, write_config, tmp_path, text, words):
    kept = tmp_path / "kept"
    assert_passed(preflight(*SMALL, "--output_dir", kept))
    before = snapshot(kept)
    outcome = preflight("--student_config", write_config(text), "--data_path", PROMPTS, "--output_dir", kept)
    assert outcome.code == 2
    (message,) = outcome.err.strip().splitlines()
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert outcome.out.splitlines()[-1] == "Production Test FAILED"
    assert snapshot(kept) == before
    assert not list(preflight.scratch.glob("wandistiller-*"))


def test_a_prompts_file_without_prompts_fails_with_exit_2_and_makes_no_folder(preflight, tmp_path):
    (tmp_path / "prompts.txt").write_text("# nothing yet\n", encoding="utf-8")
    outcome = preflight("--data_path", tmp_path / "prompts.txt", "--output_dir", tmp_path / "new")
    assert outcome.code == 2 and "holds no prompt" in outcome.err
    assert "Production Test FAILED" in outcome.out
    assert not (tmp_path / "new").exists()


def test_a_failure_of_the_product_shows_its_traceback_and_exit_1(preflight, monkeypatch):
    def fail(self, folder, state_dict=None):
        raise OSError("no space left on device")

    monkeypatch.setattr(WanLiteStudent, "save_pretrained", fail)
    outcome = preflight(*SMALL)
    assert outcome.code == 1
    assert "Traceback" in outcome.err and "no space left on device" in outcome.err
    assert outcome.out.splitlines()[-1] == "Production Test FAILED"
    assert not list(preflight.scratch.glob("wandistiller-*"))


def test_a_student_that_reloads_as_another_fails(preflight, monkeypatch):
    load = WanLiteStudent.from_pretrained

    def load_damaged(folder):
        student = load(folder)
        student.proj_out.bias.data.add_(1.0)
        return student

    monkeypatch.setattr(WanLiteStudent, "from_pretrained", load_damaged)
    outcome = preflight(*SMALL)
    assert outcome.code == 1
    assert "does not predict what the one in memory predicts" in outcome.err
