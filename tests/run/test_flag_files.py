"""A preset stands for the flags of a real run: it is printed, a typed flag goes before it, and its page has its figures.

pytest tests/run/test_presets.py
"""

import json
import re

import pytest

import train_distillation
from benchmarks import pages, recipes
from support.runs import PROMPTS, PRUNED_CONFIG, ROOT
from support.wan_folders import write_hollow_a14b
from wandistiller import StudentConfig
from wandistiller.projection.selection import check_fits
from wandistiller.run.flags import parse_args
from wandistiller.run.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_exactly_its_flags_and_fits_its_teacher(name):
    flags, plain = parse_args(["--preset", name]), parse_args(["--teacher_path", "somewhere"])
    values, usual = flags.as_dict(), plain.as_dict()
    assert {flag: values[flag] for flag in PRESETS[name]} == dict(PRESETS[name])
    assert {flag for flag in values if values[flag] != usual[flag]} <= {*PRESETS[name], "preset"}
    config = StudentConfig.load(ROOT / flags.student.student_config)
    check_fits(recipes.released(name).config, config)
    assert flags.optimization.batch_size * flags.optimization.grad_accum_steps == 32


def test_a_typed_flag_goes_before_a_preset_wherever_it_stands():
    words = ["--teacher_calls", "7", "--preset", "A14B-1B", "--teacher-dtype=bf16", "--teacher_path", "elsewhere"]
    flags = parse_args(words)
    assert flags.optimization.teacher_calls == 7 and flags.performance.teacher_dtype == "bf16"
    assert flags.data.teacher_path == "elsewhere"
    assert flags.states.replay == PRESETS["A14B-1B"]["replay"]


@pytest.mark.parametrize(("flag", "value", "steps"), [("--max_steps", 12, 12), ("--num_epochs", 14, 28)])
def test_a_length_that_is_typed_in_steps_or_epochs_is_the_length(train, teachers, tmp_path, flag, value, steps):
    prompts = tmp_path / "few.txt"
    prompts.write_text("\n".join(f"a picture of {number} cats" for number in range(4)), encoding="utf-8")
    flags = [flag, value, "--batch_size", 1, "--grad_accum_steps", 2, "--data_path", prompts]
    outcome = train(teachers.one, PRUNED_CONFIG, "--preset", "1.3B-0.5B", *flags, "--dry_run")
    assert outcome.code == 0 and f"Steps: {steps} of 2 samples" in outcome.out, outcome.err


def test_a_run_prints_what_the_preset_sets_and_resumes_with_the_values(train, teachers, tmp_path):
    typed = [
        "--teacher_calls",
        2,
        "--batch_size",
        2,
        "--grad_accum_steps",
        2,
        "--save_every",
        4,
        "--replay",
        4,
        "--student_steps",
        "none",
    ]
    first = train(teachers.one, PRUNED_CONFIG, "--preset", "1.3B-0.5B", *typed)
    assert first.code == 0, first.err
    line = next(line for line in first.out.splitlines() if line.startswith("Preset 1.3B-0.5B: "))
    assert "--replay 4" in line and "--eval_prompts data/heldout_prompts.txt" in line
    assert "the preset is meant for 40,000 or more" in first.out
    record = json.loads((tmp_path / "out" / "student_config.json").read_text(encoding="utf-8"))["distillation"]
    assert record["replay"] == 4 and record["num_train_steps"] == 8 and record["num_teacher_batches"] == 2
    # The same values without the preset are the same run; another value of a preset is not:
    longer = [*typed, "--teacher_calls", 3]
    assert "Resuming from step 8" in train(teachers.one, PRUNED_CONFIG, *longer).out
    other = train(teachers.one, PRUNED_CONFIG, "--preset", "1.3B-0.5B", *longer, "--replay", 5)
    assert other.code == 2 and "replay 4, now 5" in other.err


def test_the_dry_run_of_a_preset_says_what_the_page_does(run_main, tmp_path):
    folder = tmp_path / "Wan2.2-T2V-A14B-Diffusers"
    write_hollow_a14b(folder)
    outcome = run_main(
        train_distillation.main, "--preset", "A14B-1B", "--teacher_path", folder, "--data_path", PROMPTS, "--dry_run",
        "--output_dir", tmp_path / "out", "--prompt_cache", tmp_path / "cache", "--assume_gpu_gib", 80, "--save_every", 0,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "144,000 steps of 32 prompts, about 12,0" in outcome.out
    peak = float(re.search(r"^  peak +([\d.]+)", outcome.out, re.MULTILINE)[1])
    assert peak == pytest.approx(recipes.planned("A14B-1B").peak_gib, rel=0.02)  # the texts are others


def test_the_pages_hold_exactly_the_tables_of_the_presets():
    texts = [page.read_text(encoding="utf-8") for page in recipes.PAGES]
    assert [pages.with_tables(text, recipes.TABLES) for text in texts] == texts, "python benchmarks/recipes.py --write"
    assert set(re.findall(r"<!-- table: (\w+) -->", "".join(texts))) == set(recipes.TABLES)


def test_hours_of_a_preset_reckoned_by_hand():
    tokens, (width, ffn, layers) = 32 * 32, (5120, 13824, 40)
    guided = 2 * layers * (2 * tokens * (6 * width**2 + 2 * width * ffn) + 4 * tokens**2 * width)
    width, ffn, layers = 1536, 8960, 20
    student = 3 * layers * (2 * tokens * (6 * width**2 + 2 * width * ffn) + 4 * tokens**2 * width)
    run = recipes.planned("A14B-1B", "--student_steps", "none")
    muon = run.workload.num_steps * 35.7e12  # of a step: Newton-Schulz of all matrices
    assert run.flops == pytest.approx(12_000 * 32 * guided + 96_000 * 32 * student + muon, rel=0.05)
