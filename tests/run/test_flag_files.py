"""Flags in a YAML file: read as if they were typed, under those that are; a run writes its own, which repeats it.

A preset is such a file, of a real run: it fits its teacher, and its page has its figures.
"""

import json
import re
from dataclasses import replace

import pytest

import train_distillation
from benchmarks import pages, recipes
from support.processes import exit_code
from support.runs import PROMPTS, PRUNED_CONFIG, ROOT, same_weights
from support.wan_folders import write_hollow_a14b
from wandistiller import StudentConfig
from wandistiller.projection.selection import check_fits
from wandistiller.run.flags import PRESETS, flags_of, parse_args


def in_file(tmp_path, text: str, *typed: str):
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    return parse_args(["--config", str(tmp_path / "my.yaml"), *typed])


def test_a_file_is_read_as_if_its_flags_were_typed(tmp_path):
    """Also what YAML itself would read as something else: 4:3 is 243 there, 1e-3 text, and no is false."""
    text = """
        image-sizes: [1:1, 4:3]   # a comment
        layers: [0, 2, 5]
        lr: 1e-3
        sigma_range: [0, 1]
        student_steps: none
        negative_prompt: no
        compile: yes
        teacher_offload: on
        gradient_checkpointing: false
        eval_every: ~
        teacher_lora: [a.safetensors:0.5, b.safetensors]
        teacher_path: elsewhere
    """
    words = """--image_sizes 1:1 4:3 --layers 0,2,5 --lr 1e-3 --sigma_range 0 1 --student_steps none --negative_prompt no --compile --teacher_offload
        --teacher_lora a.safetensors:0.5 --teacher_lora b.safetensors --teacher_path elsewhere"""
    read = vars(in_file(tmp_path, text))
    assert read | {"config": None} == vars(parse_args(words.split()))


def test_typed_flags_go_before_a_file_and_a_file_before_a_preset(tmp_path):
    text = "replay: 3\nteacher_calls: 5\npreset: A14B-1B\nteacher_lora: [a, b]\n"
    flags = in_file(tmp_path, text, "--teacher_calls", "7", "--teacher-dtype=bf16", "--teacher_lora", "c")
    assert (flags.teacher_calls, flags.replay, flags.teacher_dtype) == (7, 3, "bf16")
    assert flags.grad_accum_steps == 8 and flags.teacher_lora == [("c", 1.0)]


def test_what_a_preset_turns_on_is_turned_off_by_a_file_by_hand_and_from_python(tmp_path):
    preset = "A14B-1B-24GB"
    assert in_file(tmp_path, f"preset: {preset}").gradient_checkpointing
    off = in_file(tmp_path, f"preset: {preset}\ngradient_checkpointing: false\nteacher_offload: off")
    assert (off.gradient_checkpointing, off.teacher_offload) == (False, None)
    typed = parse_args(["--preset", preset, "--gradient_checkpointing", "false", "--teacher_offload", "off"])
    assert (typed.gradient_checkpointing, typed.teacher_offload) == (False, None)
    off = flags_of(preset=preset, gradient_checkpointing=False, teacher_offload=False)
    assert (off.gradient_checkpointing, off.teacher_offload) == (False, None)
    assert flags_of(preset=preset, teacher_offload=None).teacher_offload == "blocks"  # which is left out


DEEP = "a: " + "[" * 5000 + "]" * 5000
BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("batchsize: 3", "my.yaml: unknown flag --batchsize; did you mean --batch_size?"),
        ("learning_rate: 3", "my.yaml: unknown flag --learning_rate; here it is called --lr"),
        ("batch_size: 0", "my.yaml: argument --batch_size: '0' must be a whole number at least 1"),
        ("compile: maybe", "my.yaml: argument --compile: 'maybe'; allowed: true, false"),
        ("seed: !!int abc", "cannot be read as YAML"),
        ("seed: !!bool maybe", "cannot be read as YAML"),
        ("seed: !!timestamp abc", "cannot be read as YAML"),
        ('data_path: "a\\0b"', "data_path holds U+0000"),
        ('data_path: "a\\ud800"', "data_path holds U+0000 or half of a surrogate pair"),
        ("hidden_size: 12\ndepth: 3", "looks like a student's shape; that is --student_config"),
        ('{"hidden_size": 12}', "looks like a student's shape; that is --student_config"),
        ("seed: 1\nseed: 2", "my.yaml: names --seed twice"),
        ("seed: 1\n  lr: 2", 'read as YAML (mapping values are not allowed here in "my.yaml", line 2'),
        ("seed: {a: 1}", "my.yaml: seed holds lists or keys of its own"),
        ("seed: !!python/object/apply:os.system [echo]", "read as YAML (could not determine a constructor"),
        ("a red circle", "holds no flags; write one `flag: value` a line"),
        ("config: other.yaml", "names another file as its config"),
        (DEEP, "cannot be read as YAML"),
        (BOMB, "holds lists or keys of its own"),
        ("#" * 2**17, "is longer than 65,536 letters"),
        ("seed: \0", "cannot be read as YAML"),
    ],
    ids=lambda value: value[:20],
)
def test_a_mistake_in_a_file_is_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    def main(argv: list[str]) -> None:
        in_file(tmp_path, text)

    code = exit_code(main, [])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1 and len(error) < 700


def test_a_run_writes_the_file_that_repeats_it(run_main, flags_of, tmp_path):
    flags = flags_of(
        "out", "--max_steps", 3, "--lr", "1e-3", "--image_sizes", "1:1", "--negative_prompt", "静态: a 'b'"
    )
    run_main(train_distillation.main, *flags).ok()
    file = tmp_path / "out" / "run.yaml"
    run_main(train_distillation.main, "--config", file, "--output_dir", tmp_path / "again").ok()
    assert same_weights(tmp_path / "out", tmp_path / "again")
    written = [(tmp_path / name / "run.yaml").read_text(encoding="utf-8") for name in ("out", "again")]
    assert written[0].replace(f"{tmp_path}/out", f"{tmp_path}/again") == written[1] and "静态" in written[0]


def test_a_run_yaml_that_a_person_wrote_is_left_alone(run_main, flags_of, tmp_path):
    own = tmp_path / "out" / "run.yaml"
    own.parent.mkdir()
    own.write_text("max_steps: 2\n", encoding="utf-8")
    assert "Done: 2 steps" in run_main(train_distillation.main, "--config", own, *flags_of("out")).ok().out
    assert own.read_text(encoding="utf-8") == "max_steps: 2\n"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_file_that_fits_its_teacher(name):
    flags = parse_args(["--preset", name])
    assert replace(flags, preset=None, config=str(PRESETS[name])) == parse_args(["--config", str(PRESETS[name])])
    check_fits(recipes.released(name).config, StudentConfig.load(ROOT / flags.student_config))
    assert flags.batch_size * flags.grad_accum_steps == 32


@pytest.mark.parametrize(("flag", "value", "steps"), [("--max_steps", 12, 12), ("--num_epochs", 14, 28)])
def test_a_length_that_is_typed_in_steps_or_epochs_is_the_length(train, teachers, tmp_path, flag, value, steps):
    prompts = tmp_path / "few.txt"
    prompts.write_text("\n".join(f"a picture of {number} cats" for number in range(4)), encoding="utf-8")
    flags = [flag, value, "--batch_size", 1, "--grad_accum_steps", 2, "--data_path", prompts]
    outcome = train(teachers.one, PRUNED_CONFIG, "--preset", "1.3B-0.5B", *flags, "--dry_run")
    assert outcome.code == 0 and f"Steps: {steps} of 2 samples" in outcome.out, outcome.err


def test_a_run_writes_down_what_a_preset_sets_and_resumes_with_the_values(train, teachers, tmp_path):
    typed = ["--teacher_calls", 2, "--batch_size", 2, "--grad_accum_steps", 2, "--save_every", 4, "--replay", 4]
    first = train(teachers.one, PRUNED_CONFIG, "--preset", "1.3B-0.5B", *typed).ok()
    assert "eval_prompts: data/heldout_prompts.txt" in (tmp_path / "out" / "run.yaml").read_text(encoding="utf-8")
    assert "55 prompts of the 40,000 of --num_prompts" in first.out
    record = json.loads((tmp_path / "out" / "student_config.json").read_text(encoding="utf-8"))["distillation"]
    assert record["replay"] == 4 and record["num_train_steps"] == 8 and record["num_teacher_batches"] == 2
    # The same values without the preset are the same run; another value is not:
    longer = [*typed, "--teacher_calls", 3]
    assert "Resuming from step 8" in train(teachers.one, PRUNED_CONFIG, *longer).out
    train(teachers.one, PRUNED_CONFIG, "--preset", "1.3B-0.5B", *longer, "--replay", 5).refused("replay 4, now 5")


def test_the_dry_run_of_a_preset_says_what_the_page_does(run_main, tmp_path):
    folder = tmp_path / "Wan2.2-T2V-A14B-Diffusers"
    write_hollow_a14b(folder)
    outcome = run_main(
        train_distillation.main, "--preset", "A14B-1B", "--teacher_path", folder, "--data_path", PROMPTS, "--dry_run",
        "--output_dir", tmp_path / "out", "--prompt_cache", tmp_path / "cache", "--assume_gpu", 80, "--save_every", 0,
    ).ok()  # fmt: skip
    assert "144,000 steps of 32 prompts, about 12,0" in outcome.out
    peak = float(re.search(r"^  peak +([\d.]+)", outcome.out, re.MULTILINE)[1])
    assert peak == pytest.approx(recipes.planned("A14B-1B").peak_gib, rel=0.02)  # the texts are others


def test_a_preset_of_two_experts_refuses_one_and_names_the_flag_of_the_other(train, teachers):
    outcome = train(teachers.one, PRUNED_CONFIG, "--preset", "A14B-1B", "--dry_run")
    assert (
        outcome.code == 2
        and "is one; give the folder of both, or the low-noise one as --teacher_path_low" in outcome.err
    )


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
