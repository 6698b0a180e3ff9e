"""Teachers of few steps: of four without guidance, and one that noises its x_0 anew at levels of its own."""

import re
from pathlib import Path

import pytest

import export_student
import generate_images
import train_distillation
from support.asked import questions
from support.runs import IDENTITY_CONFIG, PROMPTS, PRUNED_CONFIG
from wandistiller import StudentConfig

FEW = ["--teacher_steps", 4, "--guidance_scale", 1]


def test_the_teacher_is_asked_once_for_each_answer_at_its_levels_alone_and_the_student_records_it(
    train, teachers, tmp_path
):
    flags = ["--batch_size", 4, "--teacher_calls", 12, "--eval_every", 0, "--shift", 5]
    with questions(IDENTITY_CONFIG["hidden_size"]) as asked:
        outcome = train(teachers.one, PRUNED_CONFIG, *FEW, *flags)
    assert outcome.code == 0, outcome.err
    assert [len(latents) for latents, _ in asked] == [4] * 12
    assert {round(float(value), 2) for _, timestep in asked for value in timestep} == {1000.0, 937.5, 833.33, 625.0}
    assert "Teacher's 4 noise levels, and no others: 1, 0.9375, 0.8333, 0.625" in outcome.out
    record = StudentConfig.load(tmp_path / "out").distillation
    assert (record["num_inference_steps"], record["teacher_sampler"], record["guidance_scale"]) == (4, "euler", 1.0)


def test_a_teacher_that_noises_anew_teaches_at_its_own_levels_and_its_student_draws_at_them(
    train, teachers, tmp_path, run_main
):
    flags = ["--teacher_levels", 1000, 757, 522, "--guidance_scale", 1, "--batch_size", 4, "--teacher_calls", 6]
    with questions(IDENTITY_CONFIG["hidden_size"]) as asked:
        outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--eval_every", 4)
    assert outcome.code == 0, outcome.err
    assert {round(float(value)) for _, timestep in asked for value in timestep} == {1000, 757, 522}
    assert "3 noise levels, and no others: 1, 0.757, 0.522 (--teacher_sampler renoise)" in outcome.out
    record = StudentConfig.load(tmp_path / "out").distillation
    assert record["teacher_levels"] == [1000, 757, 522] and record.get("student_steps") is None
    with questions(PRUNED_CONFIG["hidden_size"]) as asked:
        words = ["--student", tmp_path / "out", "--prompt", "a cat", "--output", tmp_path / "drawn", "--num_images", 2]
        drawn = run_main(generate_images.main, *words)
    assert drawn.code == 0, drawn.err
    assert [round(float(timestep[0])) for _, timestep in asked] == [1000, 757, 522]
    export = run_main(
        export_student.main, "--student", tmp_path / "out", "--format", "pipeline", "--output", tmp_path / "pipeline"
    )
    assert export.code == 2 and "FlowMatchLCMScheduler" in export.err


def calls_of(train, teacher: Path, *flags: object) -> str:
    outcome = train(teacher, PRUNED_CONFIG, "--batch_size", 4, "--replay", 1, "--teacher_calls", 10, *flags).ok()
    return outcome.out


def test_a_student_of_two_steps_learns_from_a_teacher_of_four(train, teachers, tmp_path):
    out = calls_of(train, teachers.one, *FEW, "--student_steps", 2)
    assert "5 of 4 samples" in out, "each of ten calls is one of the two steps of a target"
    record = StudentConfig.load(tmp_path / "out").distillation
    assert record["student_steps"] == 2 and record["segment_sigmas"] == pytest.approx([1.0, 0.75, 0.0])  # at shift 3
    uneven = train(teachers.one, PRUNED_CONFIG, *FEW, "--student_steps", 3, "--overwrite")
    assert uneven.code == 2 and "--student_steps 3" in uneven.err and "allowed: 1, 2, 4" in uneven.err


def test_a_cache_of_another_teacher_is_refused(train, teachers, tmp_path):
    flags = ["--teacher_steps", 4, "--max_steps", 2, "--teacher_cache", tmp_path / "cache"]
    train(teachers.one, PRUNED_CONFIG, *flags).ok()
    for changed, name in (
        (["--teacher_sampler", "unipc"], "teacher_sampler "),
        (["--teacher_steps", 8], "num_inference_steps "),
        (["--teacher_dtype", "fp8"], "now 'fp8'"),
    ):
        cached = train(teachers.one, PRUNED_CONFIG, *flags, *changed, output_dir=tmp_path / "new")
        cached.refused(name, "--teacher_cache")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--teacher_sampler", "dpm++"], "'unipc', 'euler'"),
        (["--teacher_steps", 0], "--teacher_steps"),
        (["--teacher_levels", 900, 500], "--teacher_levels 900 500: allowed: falling numbers above 0, the first 1000"),
        (
            ["--teacher_levels", 1000, 500, "--teacher_sampler", "euler"],
            "--teacher_sampler: teachers of --teacher_levels",
        ),
        (["--teacher_levels", 1000, 500, "--student_steps", 2], "--student_steps: this teacher, and so its student"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line(train, teachers, flags, words):
    assert len(train(teachers.one, PRUNED_CONFIG, "--max_steps", 1, *flags).refused(words).err) < 500


def test_the_dry_run_counts_one_pass_where_there_is_no_guidance(run_main, write_config, teachers, tmp_path):
    def flops(*flags: object) -> float:
        outcome = run_main(
            train_distillation.main, "--teacher_path", teachers.one, "--student_config", write_config(PRUNED_CONFIG),
            "--data_path", PROMPTS, "--prompt_cache", teachers.prompt_cache, "--output_dir", tmp_path / "out",
            "--dry_run", "--replay", 1, "--max_steps", 20, "--shift", 5, *flags,
        ).ok()  # fmt: skip
        number, prefix = re.search(r"a step: teacher ([\d.]+) ([MG])", outcome.out).groups()
        return float(number) * {"M": 1e6, "G": 1e9}[prefix]

    guided, plain = flops("--guidance_scale", 4), flops("--guidance_scale", 1)
    assert 1.3 * plain < guided < 2 * plain  # what both passes share is counted once
