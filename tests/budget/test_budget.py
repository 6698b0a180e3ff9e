"""A budget agrees with what it is about (projected weights, stores, checkpoints, replays), and its advice helps.

Nothing here knows a GPU: benchmarks/bench_memory.py holds the budget against one.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train_distillation
from benchmarks import shapes
from support.measures import LiveBytes, count_flops
from support.runs import ROOT, read_metrics
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.budget.cards import GIB, card
from wandistiller.budget.memory import checkpoint_bytes, disk_budget, host_budget, memory_budget, peak_bytes
from wandistiller.budget.report import (
    Verdict,
    compute_lines,
    conclusion,
    disk_verdict,
    hints,
    host_verdict,
    step_seconds,
    verdict,
)
from wandistiller.budget.workload import Workload, step_flops
from wandistiller.device import DTYPES
from wandistiller.model.sizes import transformer_flops, weight_bytes
from wandistiller.projection.project import project_teacher
from wandistiller.run.dry_run import with_texts, workload_of
from wandistiller.run.inputs import read_inputs
from wandistiller.run.resolve import resolve
from wandistiller.training.optimizer import OptimizationOptions, make_optimizers

TEACHER = StudentConfig(
    block="wan", hidden_size=5120, depth=40, num_heads=40, ffn_dim=13824, num_channels=16, image_size=512
)
STUDENT = StudentConfig(
    block="wan", hidden_size=1536, depth=20, num_heads=12, ffn_dim=8960, num_channels=16, image_size=512
)
LITE = StudentConfig(block="lite", hidden_size=64, depth=2, num_heads=4, num_channels=4, image_size=32)
A14B = Workload(teacher=TEACHER, student=STUDENT, latent_size=64, num_experts=2, batch_size=4, num_features=20)


def sizes(workload: Workload) -> dict[str, int]:
    return {part.name: part.num_bytes for part in memory_budget(workload)}


# ---- against the things themselves ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_projected_teacher(teachers, dtype):
    model, _ = project_teacher(teachers.one, dtype=dtype)
    expected = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes(model.config, "bf16" if dtype == torch.bfloat16 else "fp32") == expected


@pytest.mark.parametrize(
    "flags",
    [
        ["--replay", 1],
        ["--replay", 3, "--optimizer", "adamw"],
        ["--student_steps", "none", "--ema_decay", 0],
        ["--student_steps", 2],
        ["--image_sizes", "32x32", "48x32"],
    ],
    ids=lambda flags: flags[0],
)
def test_bytes_of_a_checkpoint_on_disk(flags_of, run_main, tmp_path, flags):
    words = flags_of("out", "--max_steps", 6, "--save_every", 6, "--batch_size", 4, *flags)
    run_main(train_distillation.main, *words).ok()
    files = (tmp_path / "out" / "checkpoints").glob("step_00000006/*.safetensors")
    saved = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    given = train_distillation.parse_args(words)
    expected = checkpoint_bytes(replace(workload_of(resolve(given, read_inputs(given))), dtype="fp32"))
    # Beside it counters; and of several sizes each counts as the largest:
    assert expected == pytest.approx(saved, abs=0.15 * saved if "--image_sizes" in flags else 40_000)


def test_caches_on_disk_and_memory_of_a_run_in_a_process_of_its_own(flags_of, tmp_path):
    prompts, answers = tmp_path / "prompts", tmp_path / "answers"
    words = flags_of("out", "--max_steps", 6, "--batch_size", 4, "--prompt_cache", prompts, "--teacher_cache", answers)
    subprocess.run([sys.executable, ROOT / "train_distillation.py", *words], check=True, capture_output=True, cwd=ROOT)
    given = train_distillation.parse_args(words)
    settings = resolve(given, read_inputs(given))
    run = with_texts(settings, workload_of(settings))
    planned = {part.name: part.num_bytes for part in disk_budget(run)}
    for name, files in {
        "prompt cache": prompts.rglob("*.safetensors"),
        "teacher cache": answers.glob("answers_*"),
    }.items():
        written = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
        assert planned[name] == pytest.approx(written, rel=0.1), name
    taken, peak = read_metrics(tmp_path / "out")[-1]["memory_bytes"], peak_bytes(memory_budget(run))
    assert 0.4 * peak < taken <= peak  # libraries, most of all


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [STUDENT.replace(hidden_size=96, depth=2, ffn_dim=560, num_heads=4), LITE])
def test_moments_workspace_and_flops_of_muon(config, dtype):
    run = Workload(teacher=config, student=config, latent_size=4, optimizer="muon", dtype=dtype)
    student = WanLiteStudent(config)
    optimizers = make_optimizers(student, OptimizationOptions(lr=1e-3, optimizer="muon"), "cpu", DTYPES[dtype])
    for weight in student.parameters():
        weight.grad = torch.ones_like(weight)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    assert count_flops(step) == step_flops(run).orthogonalization > 0
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    moments = [tensor for state in states for tensor in state.values() if tensor.ndim]
    num_bytes = sum(tensor.nbytes for tensor in moments)
    assert sizes(run)["optimizer moments"] == num_bytes
    assert checkpoint_bytes(replace(run, latents_per_slot=0, ema=False)) == num_bytes + 4 * sum(
        weight.numel() for weight in student.parameters()
    )
    with LiveBytes([*student.parameters(), *(weight.grad for weight in student.parameters()), *moments]) as live:
        step()
    assert sizes(run)["orthogonalisation"] == pytest.approx(live.peak, rel=0.02)


# ---- the sum ----


@pytest.mark.parametrize(
    "changes, name, factor",
    [
        ({"teacher_offload": "experts"}, "teacher weights", 0.5145),
        ({"optimizer": "muon"}, "optimizer moments", 0.537),
        ({"is_guided": False}, "teacher activations", 1 / 2),
        ({"batch_size": 8}, "student activations", 2),
        ({"batch_size": 8}, "feature targets", 2),
        ({"latents_per_slot": 18}, "training states", 9),
        ({"num_processes": 4, "shard_student": True}, "optimizer moments", 1 / 4),
        ({"num_processes": 4, "shard_student": True}, "average of weights", 1 / 4),
        ({"num_processes": 16, "processes_per_machine": 8, "shard_student": True}, "average of weights", 1 / 8),
        ({"num_processes": 4}, "optimizer moments", 1),
    ],
)
def test_what_a_flag_does_to_its_component(changes, name, factor):
    assert sizes(replace(A14B, **changes))[name] == pytest.approx(factor * sizes(A14B)[name], rel=0.01)


def test_flops_of_a_step_count_guidance_replay_and_accumulation():
    one, negative = (
        transformer_flops(TEACHER, 32 * 32, tokens) for tokens in (A14B.text_tokens, A14B.negative_text_tokens + 1)
    )
    guided = step_flops(A14B).teacher
    assert 4 * (one + negative) * (1 - 1 / TEACHER.depth) < guided < 4 * (one + negative)  # less of one block is shared
    assert step_flops(replace(A14B, is_guided=False)).teacher == 4 * one
    assert step_flops(replace(A14B, calls_per_step=0.25, grad_accum_steps=3)).teacher == 3 / 4 * guided
    again = step_flops(replace(A14B, gradient_checkpointing=True))
    assert again.recompute == again.student_forward and again.student_backward == 2 * again.student_forward


def test_streamed_blocks_are_in_pinned_host_memory_of_each_process_and_little_of_it_is_lost():
    def host(**changes):
        return {part.name: part.num_bytes for part in host_budget(replace(A14B, **changes))}

    assert "teacher blocks" not in host()
    pinned = host(teacher_offload="blocks")["teacher blocks"]
    assert 1.0 < pinned / sizes(A14B)["teacher weights"] < 1.1
    assert host(teacher_offload="blocks", num_processes=16, processes_per_machine=8)["teacher blocks"] == 8 * pinned


# ---- verdicts and hints ----

CHECKPOINTS, SMALLER = "--gradient_checkpointing", "a smaller --batch_size with more --grad_accum_steps"
ROUNDED, OFFLOADED = "--teacher_dtype fp8", "--teacher_offload blocks"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [CHECKPOINTS, SMALLER, ROUNDED, OFFLOADED]),
        ({"teacher_dtype": "fp8", "teacher_offload": "experts"}, [CHECKPOINTS, SMALLER, OFFLOADED]),
        ({"gradient_checkpointing": True, "batch_size": 1}, [ROUNDED, OFFLOADED]),
        ({"num_processes": 8}, [CHECKPOINTS, SMALLER, "--shard both"]),
        ({"num_processes": 8, "teacher_dtype": "fp8"}, [CHECKPOINTS, SMALLER, "--shard student"]),
    ],
)
def test_hints_are_those_that_the_run_has_not_taken_and_can_take(changes, expected):
    assert hints(replace(A14B, **changes)) == expected
    assert all(hint in verdict(replace(A14B, **changes), GIB).sentence for hint in expected)


@pytest.mark.parametrize(("memory", "fits", "is_certain"), [(140, True, False), (84, False, False), (2, False, True)])
def test_a_verdict_is_certain_only_below_what_is_needed_at_least(memory, fits, is_certain):
    about = verdict(A14B, memory * GIB)
    assert (about.fits, about.is_certain_not_to_fit) == (fits, is_certain)
    assert about.sentence.startswith("Fits: about " if fits else "Does not" if is_certain else "May not")


FITTING = Verdict(True, False, "Fits: all of it.")


def test_a_run_fits_only_where_host_and_disks_have_room_too_and_else_is_told_what_mends_it():
    streamed = replace(A14B, teacher_offload="blocks", text_encoder_parameters=0)
    needed = peak_bytes(host_budget(streamed))
    room, short = host_verdict(streamed, needed + GIB), host_verdict(streamed, needed - 2 * GIB)
    assert room.fits and not short.fits and "--teacher_dtype fp8" in short.sentence
    assert peak_bytes(host_budget(replace(streamed, teacher_dtype="fp8"))) < 0.6 * needed
    copied = host_verdict(replace(A14B, text_encoder_parameters=0), GIB)
    assert not copied.fits and "--save_every 0" in copied.sentence
    reading = host_verdict(replace(A14B, keep_checkpoints=0), 12 * GIB)
    assert not reading.fits and "while prompts are encoded" in reading.sentence and "--prompt_cache" in reading.sentence

    parts = disk_budget(replace(A14B, num_prompts=10**6))
    disks = [disk_verdict(parts, 10**12), disk_verdict(parts, 2**30)]
    assert [disk.fits for disk in disks] == [True, False] and "fewer --num_prompts" in disks[1].sentence
    assert conclusion(FITTING, [room, disks[0]]).startswith("Fits: all of it; host memory, ")
    for others in ([short, disks[0]], [room, disks[1]]):
        (line,) = conclusion(FITTING, others).splitlines()
        assert line.startswith("May not fit: ")


def test_eight_gpus_are_more_than_seven_times_as_fast_as_one():
    one = replace(shapes.run_of("Wan2.1 1.3B", 512), grad_accum_steps=8, calls_per_step=1 / 6)
    eight = replace(one, num_processes=8, grad_accum_steps=1)
    assert step_flops(one).total > 7 * step_flops(eight).total


def test_the_prompt_cache_is_counted_in_the_precision_of_the_device():
    there, here = (
        next(
            part.num_bytes
            for part in disk_budget(replace(A14B, is_gpu=is_gpu, dtype="fp32"))
            if part.name == "prompt cache"
        )
        for is_gpu in (True, False)
    )
    assert here == 2 * there == 4 * 64 * 4096  # tokens of a prompt, channels


def test_hours_are_those_of_the_data_sheet_and_of_copies_that_no_answer_hides():
    gpu = card("rtx-4090")
    computing = pytest.approx(step_flops(A14B).total / (0.33 * 165e12))
    assert step_seconds(A14B, gpu) == (computing, 0)
    streamed = replace(A14B, teacher_offload="blocks")
    assert step_seconds(streamed, gpu) == (computing, 0)  # four guided answers of 14B take seconds
    one = replace(streamed, batch_size=1, is_guided=False)
    answer, copies = step_flops(one).teacher / (0.33 * 165e12), 40 * 351.5e6 * 2 / 25e9
    assert step_seconds(one, gpu)[1] == pytest.approx(copies - answer, rel=0.01)
    (*_, hint, _) = compute_lines(one, gpu)
    assert "wait for the teacher's blocks; a larger --batch_size hides them" in hint


def test_a_text_encoder_that_the_prompt_cache_may_spare_makes_nothing_certain():
    small = replace(A14B, teacher=STUDENT, student=STUDENT.replace(depth=1), num_experts=1, num_features=0)
    about = verdict(small, 10 * GIB)
    assert not about.fits and not about.is_certain_not_to_fit and about.sentence.startswith("May not fit: the text")
    assert "--prompt_cache" in about.sentence
