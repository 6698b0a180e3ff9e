"""train_distillation.py works as a person runs it, on tiny checkpoints by diffusers, real files and real signals.

A student that is its teacher must have loss zero at every noise level. What is shown while a run goes on is tested in tests/reports/.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import train_distillation
from support.processes import exit_code, fork, run_and_exit
from support.runs import IDENTITY_CONFIG, PROMPTS, PRUNED_CONFIG, ROOT, read_metrics, same_weights, snapshot, weights_of
from support.wan_folders import write_pipeline_folder
from wandistiller import WanLiteStudent

CELL = 160 + 8  # pixels of a drawn prompt in the side-by-side picture, with its margin
STUDENT_FILES = {"student_config.json", "diffusion_model.safetensors"}
RUN_FILES = {"run.yaml", "metrics.jsonl", "projection_report.json", "loss.png"}

# The command line is a contract: other people's scripts hold these flags.
FLAGS = """
    teacher_path teacher_path_low teacher_lora teacher_lora_low text_encoder_path vae_path data_path caption_column
    prompt_per num_prompts prompt_cache student_config init_from init_expert layers image_sizes train lora_rank lora_alpha
    teacher_steps teacher_sampler teacher_levels config preset guidance_scale guidance_scale_2 boundary_ratio negative_prompt shift
    sigma_range calls_per_expert replay teacher_cache offline_teacher cache_part
    feature_loss_weight student_steps num_epochs max_steps teacher_calls batch_size grad_accum_steps optimizer lr
    lr_scheduler lr_warmup_steps ema_decay max_grad_norm weight_decay seed device dtype shard gradient_checkpointing
    compile teacher_dtype teacher_offload output_dir save_every keep_checkpoints overwrite eval_every eval_prompts
    sample_prompts sample_seed num_samples dry_run assume_gpu sample_every report
"""
DEMO_DEFAULTS = {
    "teacher_path": "data/demo_teacher",
    "data_path": "data/demo_prompts.txt",
    "student_config": "config/demo_student_config.json",
    "teacher_calls": 320,
    "batch_size": 64,
    "output_dir": "outputs/demo",
    "eval_prompts": "data/demo_heldout_prompts.txt",
    "num_samples": 8,
    "sample_every": 200,
}


def record_of(folder: Path) -> dict:
    return json.loads((folder / "student_config.json").read_text(encoding="utf-8"))["distillation"]


def files_of(folder: Path) -> set[str]:
    """All but TensorBoard's, whose names hold the time."""
    return {name for name in snapshot(folder) if not name.startswith("tensorboard/")}


# ---- the whole path, for real ----


def test_a_pipeline_folder_of_two_experts_trains_from_the_shell_and_the_identity_student_has_loss_zero(
    teachers, write_config, tmp_path
):
    before = snapshot(teachers.two)
    words = [
        sys.executable, ROOT / "train_distillation.py", "--teacher_path", teachers.two, "--student_config",
        write_config(IDENTITY_CONFIG), "--data_path", PROMPTS, "--prompt_cache", teachers.prompt_cache, "--device", "cpu",
        "--output_dir", tmp_path / "out", "--save_every", 0, "--guidance_scale", 1, "--sigma_range", 0.875, 1,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    metrics = read_metrics(tmp_path / "out")
    assert metrics[0]["step"] == 1 and metrics[0]["loss"] < 1e-9
    assert len(metrics) == 14  # ceil(55 / 4)
    assert "Prompts: 55" in done.stdout and "high + low" in done.stdout
    assert files_of(tmp_path / "out") == STUDENT_FILES | RUN_FILES
    assert snapshot(teachers.two) == before, "the teacher's files changed"


@pytest.mark.parametrize(
    "flags, is_its_teacher",
    [
        (("--guidance_scale", 1, "--sigma_range", 0.875, 1), True),
        (("--guidance_scale", 1, "--sigma_range", 0.875, 1, "--init_expert", "low"), False),  # the other expert answers
        (("--guidance_scale", 3, "--sigma_range", 0.875, 1), False),  # guidance is not the student's own answer
    ],
)
def test_loss_is_zero_exactly_where_the_expert_that_the_student_was_made_of_answers_alone(
    train, teachers, tmp_path, flags, is_its_teacher
):
    train(teachers.two, IDENTITY_CONFIG, *flags, "--max_steps", 1).ok()
    loss = read_metrics(tmp_path / "out")[0]["loss"]
    assert loss < 1e-9 if is_its_teacher else loss > 1e-3


def test_a_pruned_student_learns_and_its_file_says_how(train, teachers, tmp_path):
    before = snapshot(teachers.two)
    train(
        teachers.two, PRUNED_CONFIG, "--guidance_scale", 4, "--guidance_scale_2", 3, "--shift", 5,
        "--sigma_range", 0.1, 1, "--lr", 1e-2, "--num_epochs", 4, "--seed", 3, "--layers", "1,2",
    ).ok()  # fmt: skip
    assert snapshot(teachers.two) == before, "the teacher's files changed"

    losses = [entry["loss"] for entry in read_metrics(tmp_path / "out")]
    assert len(losses) == 4 * 14
    assert mean(losses[-20:]) < 0.8 * mean(losses[:20])

    record = record_of(tmp_path / "out")
    vae = json.loads((teachers.two / "vae" / "config.json").read_text(encoding="utf-8"))
    expected = {
        "teacher_path": str(teachers.two), "shift": 5.0, "guidance_scale": 4.0, "guidance_scale_2": 3.0,
        "boundary_ratio": 0.875, "sigma_range": [0.1, 1.0], "num_train_steps": 56, "seed": 3, "lr": 1e-2,
        "batch_size": 4, "num_prompts": 55, "init_expert": "high", "layers": [1, 2],
        "latents_mean": vae["latents_mean"], "latents_std": vae["latents_std"], "vae_scale_factor": 8,
        "final_loss": losses[-1],
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected

    student = WanLiteStudent.from_pretrained(tmp_path / "out")
    shape = {key: getattr(student.config, key) for key in PRUNED_CONFIG}
    assert shape == PRUNED_CONFIG
    with torch.no_grad():
        velocity = student(torch.zeros(1, 16, 4, 4), torch.tensor([500.0]), torch.zeros(1, 3, 20), torch.tensor([3]))
    assert velocity.shape == (1, 16, 4, 4) and velocity.isfinite().all()


@pytest.mark.parametrize("layout", ["original", "single_file"])
def test_other_layouts_train_with_the_parts_of_another_folder(train, teachers, tmp_path, layout):
    """A file has no config.json: heads of 128 are assumed; without a VAE the released one's statistics are."""
    is_file = layout == "single_file"
    config = IDENTITY_CONFIG | ({"hidden_size": 256, "depth": 2} if is_file else {})
    flags = ["--text_encoder_path", teachers.one, "--guidance_scale", 1, "--max_steps", 1]
    flags += ["--vae_path", teachers.two / "vae", "--num_samples", 1] if is_file else []
    assert ("Teacher above, student below" in train(getattr(teachers, layout), config, *flags).ok().out) == is_file
    assert read_metrics(tmp_path / "out")[0]["loss"] < 1e-9
    record = record_of(tmp_path / "out")
    assert record["text_encoder_path"] == str(teachers.one) and len(record["latents_mean"]) == 16
    own = json.loads((teachers.two / "vae" / "config.json").read_text(encoding="utf-8"))
    assert (record["latents_std"] == own["latents_std"]) == is_file


def test_a_teacher_of_48_channels_trains_behind_its_vae_of_factor_16(train, tmp_path):
    write_pipeline_folder(tmp_path / "ti2v", channels=48)
    flags = ("--guidance_scale", 1, "--max_steps", 1)
    outcome = train(tmp_path / "ti2v", IDENTITY_CONFIG | {"num_channels": 48, "image_size": 64}, *flags).ok()
    assert "64 px = 48x4x4 latents" in outcome.out
    assert read_metrics(tmp_path / "out")[0]["loss"] < 1e-9
    assert record_of(tmp_path / "out")["vae_scale_factor"] == 16


@pytest.mark.parametrize(
    "flags",
    [("--eval_every", 1, "--num_samples", 1), ("--student_steps", 2, "--teacher_cache", "cache")],
    ids=["measured and drawn", "few steps and a cache"],
)
def test_every_part_of_a_run_works_behind_the_teachers_own_vae(train, teachers, tmp_path, monkeypatch, flags):
    from diffusers import AutoencoderKLWan

    monkeypatch.chdir(tmp_path)
    shutil.copytree(teachers.one, tmp_path / "fine", ignore=shutil.ignore_patterns("vae"))
    stages = {"dim_mult": [1, 1, 1], "temperal_downsample": [False, True], "scale_factor_spatial": 4}
    AutoencoderKLWan(base_dim=8, num_res_blocks=1, **stages).save_pretrained(tmp_path / "fine" / "vae")
    outcome = train(tmp_path / "fine", PRUNED_CONFIG | {"image_size": 24}, "--max_steps", 1, *flags)
    assert outcome.code == 0 and "24 px = 16x6x6 latents" in outcome.out, outcome.err


def test_the_mock_teacher_needs_no_files_and_products_in_bf16_leave_weights_in_fp32(train, tmp_path):
    flags = ["--max_steps", 2, "--prompt_cache", tmp_path / "no_cache", "--dtype", "bf16"]
    train("mock", PRUNED_CONFIG, *flags).ok()
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {torch.float32}
    assert not (tmp_path / "no_cache").exists()


def test_prompts_that_are_cut_are_counted(train, teachers):
    outcome = train(teachers.one, PRUNED_CONFIG | {"text_max_length": 8}, "--guidance_scale", 1, "--max_steps", 1)
    assert outcome.code == 0 and "Warning: 55 prompts take all 8 tokens; longer ones were cut" in outcome.out, (
        outcome.err
    )


# ---- reproducible, and as long as asked ----


def test_the_same_seed_gives_the_same_weights_bit_for_bit(train, teachers, tmp_path):
    seeds = {"first": 1, "second": 1, "other": 2}
    for name, seed in seeds.items():
        flags = ("--seed", seed, "--max_steps", 6, "--lr", 1e-2)
        train(teachers.two, PRUNED_CONFIG, *flags, output_dir=tmp_path / name).ok()
    assert same_weights(tmp_path / "first", tmp_path / "second")
    assert not same_weights(tmp_path / "first", tmp_path / "other")


@pytest.mark.parametrize(
    "flags, num_steps",
    [
        (("--batch-size", 20, "--num-epochs", 2), 6),
        (("--batch_size", 200), 1),
        (("--batch_size", 2, "--num_epochs", 9, "--max_steps", 3), 3),
    ],
)
def test_an_epoch_is_every_prompt_once_and_max_steps_overrides_it(train, teachers, tmp_path, flags, num_steps):
    train(teachers.one, PRUNED_CONFIG, "--guidance_scale", 1, *flags).ok()
    assert [entry["step"] for entry in read_metrics(tmp_path / "out")] == list(range(1, num_steps + 1))
    assert record_of(tmp_path / "out")["num_train_steps"] == num_steps


# ---- sample pictures ----


def sample_rows(folder: Path, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's and the student's row of the picture that a run ends with, without captions."""
    picture = Image.open(folder / "samples" / f"step_{num_steps:06d}.png")
    assert picture.info["seed"] == "0" and int(picture.info["num_inference_steps"]) > 0
    cells = np.asarray(picture)[-2 * CELL :, -3 * CELL :]
    return cells[:CELL], cells[CELL:]


def test_a_run_ends_with_teacher_and_student_side_by_side(train, teachers, tmp_path):
    flags = ("--guidance_scale", 1, "--num_samples", 3, "--max_steps", 2)
    train(teachers.one, IDENTITY_CONFIG, *flags, "--lr", 1e-12, output_dir=tmp_path / "same").ok()
    above, below = sample_rows(tmp_path / "same", 2)
    assert np.ptp(above.reshape(-1, 3), axis=0).min() > 50, "nothing was drawn"
    assert np.abs(above.astype(int) - below).max() <= 2
    train(teachers.one, IDENTITY_CONFIG, *flags, "--init_from", "random", output_dir=tmp_path / "other").ok()
    again, below = sample_rows(tmp_path / "other", 2)
    np.testing.assert_array_equal(above, again)
    assert (below != again).mean() > 0.1


def test_a_teacher_without_a_vae_is_trained_from_and_the_reason_for_no_picture_told(train, teachers, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(teachers.one, bare, ignore=shutil.ignore_patterns("vae"))
    outcome = train(bare, PRUNED_CONFIG, "--num_samples", 1, "--max_steps", 1).ok()
    assert "No sample pictures" in outcome.out and "--vae_path" in outcome.out
    shutil.rmtree(tmp_path / "out")
    flags = ("--num_samples", 1, "--max_steps", 1, "--vae_path", teachers.one / "vae")
    train(bare, PRUNED_CONFIG, *flags).ok()
    assert (tmp_path / "out" / "samples" / "step_000001.png").is_file()


# ---- where the student starts ----


def test_a_random_student_inherits_nothing_and_repeats_with_its_seed(train, teachers, tmp_path):
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        flags = ("--init_from", "random", "--seed", seed, "--max_steps", 1, "--lr", 1e-12)
        train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / name).ok()
    report = json.loads((tmp_path / "a" / "projection_report.json").read_text(encoding="utf-8"))
    assert {entry["status"] for entry in report["student"].values()} == {"initialised"}
    assert {entry["status"] for entry in report["teacher"].values()} == {"dropped"}
    assert record_of(tmp_path / "a")["init_from"] == "random"
    assert same_weights(tmp_path / "a", tmp_path / "again") and not same_weights(tmp_path / "a", tmp_path / "b")


# ---- measuring ----


def test_the_held_out_error_is_measured_when_asked(train, teachers, tmp_path):
    outcome = train(
        teachers.one, IDENTITY_CONFIG, "--guidance_scale", 1, "--max_steps", 5, "--eval_every", 2, "--lr", 1e-12
    )
    errors = [line["held_out"] for line in read_metrics(tmp_path / "out")]
    assert [error is not None for error in errors] == [False, True, False, True, True]
    # The student is its teacher, so there is no error:
    assert all(0 <= error[name] < 1e-4 for error in errors if error for name in ("velocity_error", "endpoint"))
    assert "relative velocity error" in outcome.err


# ---- the teacher's answers on disk ----


def test_a_student_learns_the_same_from_a_cache_that_is_built_now_and_one_that_is_found(train, teachers, tmp_path):
    flags = ["--max_steps", 8, "--replay", 2, "--teacher_cache", tmp_path / "cache", "--offline_teacher", "--lr", 1e-3]
    first = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "one")
    assert first.code == 0 and "Asking the teacher for 4 batches" in first.out, first.err
    second = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "two")
    assert second.code == 0 and "Asking" not in second.out and "came from" in second.out, second.err
    assert same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("sizes", [[], ["--image_sizes", "32x32", "48x32"]], ids=["one size", "two sizes"])
def test_a_cache_that_was_filled_part_by_part_in_any_order_is_trained_from(train, teachers, tmp_path, sizes):
    flags = ["--max_steps", 8, "--replay", 1, "--teacher_cache", tmp_path / "cache", *sizes]
    for part, state in (("2/3", "other parts are missing"), ("1/3", "missing"), ("3/3", "the cache is complete")):
        outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--cache_part", part)
        assert outcome.code == 0 and state in outcome.out, outcome.err
    assert not (tmp_path / "out").exists()
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--offline_teacher")
    assert outcome.code == 0 and "Asking" not in outcome.out, outcome.err


# ---- the command line ----


def test_the_flags_are_exactly_these_with_hyphens_too_and_the_demo_has_these_defaults(run_main):
    defaults = vars(train_distillation.parse_args([]))
    assert set(defaults) == set(FLAGS.split())
    assert DEMO_DEFAULTS.items() <= defaults.items()
    words = ["--max_steps", "3", "--image_sizes", "64x64", "3:2", "--gradient_checkpointing"]
    hyphenated = [word.replace("_", "-") for word in words]
    assert train_distillation.parse_args(words) == train_distillation.parse_args(hyphenated)
    assert train_distillation.parse_args(["--max-steps=3"]) == train_distillation.parse_args(["--max_steps", "3"])
    assert set(FLAGS.split()) <= set(re.findall(r"--(\w+)", run_main(train_distillation.main, "--help").out))


def test_another_teacher_gets_the_general_defaults():
    values = vars(train_distillation.parse_args(["--teacher_path", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]))
    general = {"data_path": "data/static_prompts.txt", "teacher_calls": None, "batch_size": 4, "eval_prompts": None}
    assert {name: values[name] for name in general} == general


# ---- what a run leaves alone ----


def test_a_second_run_does_not_encode_again(train, teachers, tmp_path):
    cache = ("--prompt_cache", tmp_path / "cache", "--max_steps", 1)
    assert "Encoding prompts: 56/56" in train(teachers.one, PRUNED_CONFIG, *cache).ok().out
    assert "Encoding" not in train(teachers.one, PRUNED_CONFIG, *cache).ok().out


def test_a_student_that_was_there_is_moved_aside_intact(train, teachers, tmp_path):
    folder = tmp_path / "out"
    for number in range(3):
        before = snapshot(folder)
        outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 2, "--seed", number).ok()
        aside = [place for place in folder.glob("replaced-*") if str(place) in outcome.out]
        assert len(aside) == (number > 0)
        kept = snapshot(aside[0]) if aside else {}
        assert kept == {name: entry for name, entry in before.items() if not name.startswith(("replaced-", "notes"))}
        assert snapshot(folder).get("notes.txt") == before.get("notes.txt")
        (folder / "notes.txt").write_text("mine", encoding="utf-8")


# ---- stopped by a person ----


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_was_learned_and_exits_130(flags_of, tmp_path, number):
    argv, log, folder = flags_of("out", "--max_steps", 1_000_000), tmp_path / "log.txt", tmp_path / "out"
    process = fork(
        run_and_exit, lambda: exit_code(train_distillation.main, argv), os.open(log, os.O_CREAT | os.O_WRONLY)
    )
    while not (folder / "metrics.jsonl").is_file() or (folder / "metrics.jsonl").read_text().count("\n") < 5:
        time.sleep(0.02)
        assert process.is_alive(), log.read_text()
    os.kill(process.pid, number)
    process.join()
    said, num_steps = log.read_text(), record_of(folder)["num_train_steps"]
    assert process.exitcode == 130 and "Traceback" not in said and f"Interrupted after {num_steps} steps" in said, said
    assert [entry["step"] for entry in read_metrics(folder)] == list(range(1, num_steps + 1))
    assert files_of(folder) == STUDENT_FILES | RUN_FILES
    student = WanLiteStudent.from_pretrained(folder)
    assert all(parameter.isfinite().all() for parameter in student.parameters())


# ---- not a number ----


def test_a_teacher_with_a_broken_weight_is_refused_by_its_name_and_nothing_is_saved(train, teachers, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(teachers.one, broken)
    path = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.ffn.net.0.proj.bias"][3] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    outcome = train(broken, PRUNED_CONFIG, "--max_steps", 3)
    assert outcome.code == 2 and "blocks.1.ffn.net.0.proj.bias holds numbers that are not finite" in outcome.err
    assert not STUDENT_FILES & set(snapshot(tmp_path / "out"))


def test_a_learning_rate_that_explodes_stops_the_run_in_words_and_leaves_the_student_that_was_there(
    train, teachers, tmp_path
):
    folder = tmp_path / "out"
    train(teachers.one, PRUNED_CONFIG, "--max_steps", 1).ok()
    before = snapshot(folder)
    outcome = train(teachers.one, PRUNED_CONFIG, "--lr", "1e9")
    (message,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 1 and "Traceback" not in outcome.err and re.search(r"step \d+", message)
    assert all(cause in message for cause in ("--lr", "teacher's weights", "--dtype"))
    (aside,) = folder.glob("replaced-*")
    assert snapshot(aside) == before and not STUDENT_FILES & set(snapshot(folder))
