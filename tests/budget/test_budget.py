"""A budget agrees with what it is about (projected weights, stores, checkpoints, replays), and its advice helps.

Nothing here knows a GPU: benchmarks/bench_memory.py holds the budget against one.

pytest tests/budget/test_budget.py
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import train_distillation
from support.measures import LiveBytes, count_flops
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.budget.machine import GIB
from wandistiller.budget.memory import checkpoint_bytes, memory_budget, peak_bytes
from wandistiller.budget.report import hints, memory_lines, verdict
from wandistiller.budget.workload import Workload, guided_fraction, step_flops
from wandistiller.device import DTYPES
from wandistiller.model.sizes import transformer_flops, weight_bytes
from wandistiller.projection.project import project_teacher
from wandistiller.run.dry_run import workload_of
from wandistiller.run.inputs import read_inputs
from wandistiller.run.resolve import resolve
from wandistiller.sampling.flow import shift_sigma, unshift_sigma
from wandistiller.training.optimizer import OptimizationOptions, make_optimizer
from wandistiller.wan.mock import mock_wan_files
from wandistiller.wan.settings import resolve_settings

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
        ["--states", "noise", "--ema_decay", 0],
        ["--student_steps", 2],
        ["--image_sizes", "32x32", "48x32"],
    ],
    ids=lambda flags: flags[0],
)
def test_bytes_of_a_checkpoint_on_disk(flags_of, run_main, tmp_path, flags):
    words = flags_of("out", "--max_steps", 6, "--save_every", 6, "--batch_size", 4, *flags)
    outcome = run_main(train_distillation.main, *words)
    assert outcome.code == 0, outcome.err
    files = (tmp_path / "out" / "checkpoints").glob("step_00000006/*.safetensors")
    saved = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    given = train_distillation.parse_args(words)
    expected = checkpoint_bytes(workload_of(resolve(given, read_inputs(given)), "fp32"))
    # Beside it counters; and of several sizes each counts as the largest:
    assert expected == pytest.approx(saved, abs=0.15 * saved if "--image_sizes" in flags else 40_000)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [STUDENT.replace(hidden_size=96, depth=2, ffn_dim=560, num_heads=4), LITE])
def test_moments_workspace_and_flops_of_muon(config, dtype):
    run = Workload(teacher=config, student=config, latent_size=4, optimizer="muon", dtype=dtype)
    student = WanLiteStudent(config)
    optimizer = make_optimizer(student, OptimizationOptions(lr=1e-3, optimizer="muon"), "cpu", DTYPES[dtype])
    for weight in student.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert count_flops(optimizer.step) == step_flops(run).orthogonalization > 0
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim]
    num_bytes = sum(tensor.nbytes for tensor in moments)
    assert sizes(run)["optimizer moments"] == num_bytes
    assert checkpoint_bytes(replace(run, latents_per_slot=0, ema=False)) == num_bytes + 4 * config.num_parameters
    with LiveBytes([*student.parameters(), *(weight.grad for weight in student.parameters()), *moments]) as live:
        optimizer.step()
    assert sizes(run)["orthogonalisation"] == pytest.approx(live.peak, rel=0.02)


# ---- the sum ----


@pytest.mark.parametrize(
    "shift, guidance_range, sigma_range", [(5.0, (0.5, 1.0), (0.0, 1.0)), (12.0, (0.3, 0.9), (0.2, 0.95))]
)
def test_the_fraction_of_guided_answers_is_that_of_noise_levels_as_they_are_drawn(shift, guidance_range, sigma_range):
    given = {"shift": shift, "guidance_scale": 4.0, "guidance_range": guidance_range}
    low, high = unshift_sigma(torch.tensor(sigma_range, dtype=torch.float64), shift)
    sigma = shift_sigma(low + (high - low) * (torch.arange(4096) + 0.5) / 4096, shift)
    drawn = ((guidance_range[0] <= sigma) & (sigma <= guidance_range[1])).double().mean()
    settings = resolve_settings(mock_wan_files(LITE), **given)
    assert guided_fraction(settings, sigma_range) == pytest.approx(float(drawn), abs=0.001)
    assert guided_fraction(replace(settings, guidance_range=None)) == 1.0
    assert guided_fraction(replace(settings, guidance_scale=1.0)) == 0.0


@pytest.mark.parametrize(
    "changes, name, factor",
    [
        ({"teacher_offload": "experts"}, "teacher weights", 0.5145),
        ({"optimizer": "adamw8bit"}, "optimizer moments", 1 / 4),
        ({"optimizer": "muon"}, "optimizer moments", 0.537),
        ({"guided_fraction": 0.0}, "teacher activations", 1 / 2),
        ({"batch_size": 8}, "student activations", 2),
        ({"batch_size": 8}, "feature targets", 2),
        ({"latents_per_slot": 18}, "training states", 9),
        ({"num_processes": 4, "shard_student": True}, "optimizer moments", 1 / 4),
        ({"num_processes": 4, "shard_student": True}, "average of weights", 1 / 4),
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
    assert step_flops(replace(A14B, guided_fraction=0.0)).teacher == 4 * one
    assert step_flops(replace(A14B, guided_fraction=0.5)).teacher == (guided + 4 * one) / 2
    assert step_flops(replace(A14B, calls_per_step=0.25, grad_accum_steps=3)).teacher == 3 / 4 * guided
    again = step_flops(replace(A14B, gradient_checkpointing=True))
    assert again.recompute == again.student_forward and again.student_backward == 2 * again.student_forward


def test_streamed_blocks_are_in_pinned_host_memory_and_little_of_it_is_lost():
    assert not any("host memory" in line for line in memory_lines(A14B))
    (line,) = [line for line in memory_lines(replace(A14B, teacher_offload="blocks")) if "host memory" in line]
    assert 1.0 < float(line.split()[2]) / (sizes(A14B)["teacher weights"] / GIB) < 1.1


# ---- verdicts and hints ----

STEP = "--gradient_checkpointing --batch_size 1 --grad_accum_steps 4"
ROUNDED, OFFLOADED = "--teacher_dtype fp8", "--teacher_offload blocks"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [STEP, ROUNDED, OFFLOADED]),
        ({"teacher_dtype": "fp8", "teacher_offload": "experts"}, [STEP, OFFLOADED]),
        ({"teacher_dtype": "fp8", "teacher_offload": "blocks"}, [STEP]),
        ({"gradient_checkpointing": True, "batch_size": 6}, ["--batch_size 1 --grad_accum_steps 6", ROUNDED, OFFLOADED]),
        ({"gradient_checkpointing": True, "batch_size": 1, "num_experts": 1}, [ROUNDED, OFFLOADED]),
        ({"num_processes": 8}, [STEP, "--shard both"]),
        ({"num_processes": 8, "teacher_dtype": "fp8"}, [STEP, "--shard student"]),
        ({"num_processes": 8, "optimizer": "adamw8bit"}, [STEP]),
    ],
)  # fmt: skip
def test_hints_are_those_that_the_run_has_not_taken_and_can_take(changes, expected):
    assert list(hints(replace(A14B, **changes))) == expected


def test_every_hint_is_accepted_by_the_trainer_keeps_the_samples_of_a_step_and_leads_to_the_peak_that_is_told():
    before, told = peak_bytes(memory_budget(A14B)), verdict(A14B, 70 * GIB)
    assert not told.fits and "all of these: " in told.sentence and "more memory" not in told.sentence
    for flags, changes in hints(A14B).items():
        train_distillation.parse_args(["--teacher_path", "y", *flags.split()])
        changed = replace(A14B, **changes)
        after = peak_bytes(memory_budget(changed))
        assert changed.global_batch_size == A14B.global_batch_size and after < before
        assert f"{flags}: {after / GIB:.2f} GiB" in told.sentence


@pytest.mark.parametrize(("memory", "fits", "is_certain"), [(140, True, False), (84, False, False), (2, False, True)])
def test_a_verdict_is_certain_only_below_what_is_needed_at_least(memory, fits, is_certain):
    about = verdict(A14B, memory * GIB)
    assert (about.fits, about.is_certain_not_to_fit) == (fits, is_certain)
    assert about.sentence.startswith("Fits: about " if fits else "Does not" if is_certain else "May not")
    assert ("GPU with more memory" in about.sentence) == is_certain


def test_a_text_encoder_that_the_prompt_cache_may_spare_makes_nothing_certain():
    small = replace(A14B, teacher=STUDENT, student=STUDENT.replace(depth=1), num_experts=1, num_features=0)
    about = verdict(small, 10 * GIB)
    assert not about.fits and not about.is_certain_not_to_fit and about.sentence.startswith("May not fit: the text")
    assert "--prompt_cache" in about.sentence
