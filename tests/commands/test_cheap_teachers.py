"""A teacher of four steps without guidance, and one that is guided at some noise levels, from the command line to the pictures.

pytest tests/commands/test_cheap_teachers.py
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate_student
import generate_images
import train_distillation
from support.forked import run_forked
from support.runs import PROMPTS, PRUNED_CONFIG, ROOT, read_metrics, weights_of
from wandistiller import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.run.observers import RunObserver

FEW = ["--teacher_steps", 4, "--guidance_scale", 1]


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The flags of a short run on the demo teacher; relative paths of the student's record lead into the clone."""
    monkeypatch.chdir(ROOT)
    prompts = tmp_path / "prompts.txt"
    lines = (ROOT / "data" / "demo_prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts.write_text("\n".join(lines[:12]), encoding="utf-8")

    def flags(output: Path, *more: object) -> list[str]:
        words = [
            "--data_path", prompts, "--eval_prompts", prompts, "--prompt_cache", tmp_path / "cache", "--device", "cpu",
            "--num_samples", 2, "--sample_every", 0, "--batch_size", 4, "--max_steps", 12, "--save_every", 5,
            "--output_dir", output, *FEW, *more,
        ]  # fmt: skip
        return [str(word) for word in words]

    return flags


@pytest.mark.slow
def test_four_steps_of_the_demo_teacher_from_training_over_a_kill_to_pictures(demo, run_main, tmp_path, monkeypatch):
    straight = run_main(train_distillation.main, *demo(tmp_path / "straight"))
    assert straight.code == 0, straight.err
    assert "Teacher's 4 noise levels, and no others: 1, 0.9, 0.75, 0.5" in straight.out
    assert "Drawing 2 prompts with teacher and student, 4 steps" in straight.out

    # Killed in its eighth step, three after the checkpoint, and typed again:
    def step(self, metrics, original=RunObserver.step):
        original(self, metrics)
        if metrics.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(RunObserver, "step", step)
        assert run_forked(train_distillation.main, demo(tmp_path / "killed"), tmp_path).code == -signal.SIGKILL
    resumed = run_main(train_distillation.main, *demo(tmp_path / "killed"))
    assert resumed.code == 0 and "Resuming from step 5" in resumed.out
    expected = weights_of(tmp_path / "straight")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(tmp_path / "killed").items())

    record = StudentConfig.load(tmp_path / "killed").distillation
    assert (record["num_inference_steps"], record["teacher_sampler"], record["guidance_scale"]) == (4, "euler", 1.0)
    common = ["--student", tmp_path / "killed", "--prompt_cache", tmp_path / "cache", "--device", "cpu"]
    drawn = run_main(generate_images.main, *common, "--prompt", "a", "--output", tmp_path / "p")
    assert drawn.code == 0 and "Warning" not in drawn.out, drawn.err
    (picture,) = [file for file in (tmp_path / "p").iterdir() if file.name.startswith("000")]
    assert Image.open(picture).text["num_inference_steps"] == "4"
    measured = run_main(
        evaluate_student.main, *common, "--prompts_file", ROOT / "data" / "demo_heldout_prompts.txt",
        "--num_prompts", 2, "--num_seeds", 1, "--output", tmp_path / "evaluation",
    )  # fmt: skip
    assert measured.code == 0, measured.err
    assert "teacher 4 steps, student 4" in measured.out


def test_the_teacher_is_asked_once_for_each_answer_and_at_its_levels_alone(train, teachers, monkeypatch):
    asked = []
    original = WanLiteStudent.forward

    def forward(self, latents, timestep, *rest, **options):
        if not latents.is_meta and self.config.depth == 3:  # the teacher, not the student
            asked.append((len(latents), sorted({round(float(value), 2) for value in timestep})))
        return original(self, latents, timestep, *rest, **options)

    monkeypatch.setattr(WanLiteStudent, "forward", forward)
    flags = ["--batch_size", 4, "--teacher_calls", 12, "--eval_every", 0, "--shift", 5]
    outcome = train(teachers.one, PRUNED_CONFIG, *FEW, *flags)
    assert outcome.code == 0, outcome.err
    assert [rows for rows, _ in asked] == [4] * 12
    assert {level for _, levels in asked for level in levels} == {1000.0, 937.5, 833.33, 625.0}


def calls_of(train, teacher: Path, *flags: object) -> str:
    outcome = train(teacher, PRUNED_CONFIG, "--batch_size", 4, "--replay", 1, "--teacher_calls", 10, *flags)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_a_student_of_two_steps_learns_from_a_teacher_of_four(train, teachers, run_main, tmp_path):
    out = calls_of(train, teachers.one, *FEW, "--student_steps", 2)
    assert "5 of 4 samples" in out, "each of ten calls is one of the two steps of a target"
    record = StudentConfig.load(tmp_path / "out").distillation
    assert record["student_steps"] == 2 and record["segment_sigmas"] == pytest.approx([1.0, 0.75, 0.0])  # at shift 3
    uneven = train(teachers.one, PRUNED_CONFIG, *FEW, "--student_steps", 3, "--overwrite")
    assert uneven.code == 2 and "--student_steps 3" in uneven.err and "allowed: 1, 2, 4" in uneven.err


# ---- one run is not another ----


@pytest.mark.parametrize(
    "changed, name",
    [
        (["--teacher_sampler", "unipc"], "teacher_sampler"),
        (["--teacher_steps", 8], "num_inference_steps"),
        (["--guidance_range", 0.3, 0.9], "guidance_range"),
    ],
)
def test_a_run_or_a_cache_of_another_teacher_is_refused(train, teachers, tmp_path, changed, name):
    base = ["--teacher_steps", 4, "--guidance_range", 0.2, 0.9, "--max_steps", 4, "--save_every", 2]
    assert train(teachers.one, PRUNED_CONFIG, *base, "--teacher_cache", tmp_path / "cache").code == 0
    record = StudentConfig.load(tmp_path / "out").distillation
    assert record["guidance_range"] == [0.2, 0.9]
    resumed = train(teachers.one, PRUNED_CONFIG, *base, "--teacher_cache", tmp_path / "other", *changed)
    assert resumed.code == 2 and f"{name} " in resumed.err and "--overwrite" in resumed.err
    cached = train(
        teachers.one, PRUNED_CONFIG, *base, "--teacher_cache", tmp_path / "cache", *changed, output_dir=tmp_path / "new"
    )
    assert cached.code == 2 and f"{name} " in cached.err and "--teacher_cache" in cached.err


def test_without_the_flags_nothing_of_them_is_recorded(train, teachers, tmp_path):
    assert train(teachers.one, PRUNED_CONFIG, "--max_steps", 1).code == 0
    record = json.loads((tmp_path / "out" / "student_config.json").read_text(encoding="utf-8"))["distillation"]
    assert not {"teacher_sampler", "guidance_range", "teacher_steps"} & set(record)
    assert read_metrics(tmp_path / "out")[-1]["teacher_calls"] == 1


# ---- what is refused, and what is told of ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--guidance_range", 0.9, 0.3], "--guidance_range: LOW 0.9 must be below HIGH 0.3"),
        (["--guidance_range", 0.3, 0.9, "--guidance_scale", 1], "--guidance_range: there is no guidance here"),
        (["--teacher_sampler", "dpm++"], "'unipc', 'euler'"),
        (["--teacher_steps", 0], "--teacher_steps"),
        ([*FEW, "--states", "noise", "--sigma_range", 0.1, 0.2], "holds none of the teacher's noise levels, 1, 0.9,"),
        (["--sampler", "euler"], "here it is called --teacher_sampler"),
        (["--num_inference_steps", 4], "here it is called --teacher_steps"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line(train, teachers, flags, words):
    outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 1, *flags)
    assert outcome.code == 2 and words in outcome.err, outcome.err
    assert len(outcome.err) < 500 and "Traceback" not in outcome.err


def test_the_dry_run_counts_one_pass_where_there_is_no_guidance(run_main, write_config, teachers, tmp_path):
    def flops(*flags: object) -> tuple[float, str]:
        outcome = run_main(
            train_distillation.main, "--teacher_path", teachers.one, "--student_config", write_config(PRUNED_CONFIG),
            "--data_path", PROMPTS, "--prompt_cache", teachers.prompt_cache, "--output_dir", tmp_path / "out",
            "--dry_run", "--replay", 1, "--max_steps", 20, "--shift", 5, "--states", "noise", *flags,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        number, prefix = re.search(r"a step: teacher ([\d.]+) ([MG])", outcome.out).groups()
        return float(number) * {"M": 1e6, "G": 1e9}[prefix], outcome.out

    guided, out = flops("--guidance_scale", 4)
    assert "a second pass" not in out
    plain, _ = flops("--guidance_scale", 1)
    # Evenly spread before the shift: u of sigma 0.5 at shift 5 is 1/6, so that five sixths lie above.
    above, out = flops("--guidance_scale", 4, "--guidance_range", 0.5, 1)
    assert "a second pass of the teacher, at about 83% of its answers" in out
    assert above == pytest.approx(plain + (guided - plain) * 5 / 6, rel=0.01)
