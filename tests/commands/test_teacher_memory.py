"""A teacher in less memory: --teacher_dtype and --teacher_offload.

An offloaded teacher must teach bit for bit what one that stays does. All of it runs on a CPU, where copies stand for the moves to a
device.
"""

import json
import re

import pytest
import torch

from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG, read_metrics, snapshot, weights_of


# The teacher's precision, and the range of a loss that is its rounding alone: its velocities are near unit size. With --dtype the
# student computes in that precision too.
@pytest.mark.parametrize(
    "flags, recorded, least, most",
    [
        ([], "fp32", 0, 1e-9),
        (["--teacher_dtype", "bf16"], "bf16", 1e-9, 0.02**2),
        (["--dtype", "bf16"], "bf16", 0, 1e-9),
        (["--teacher_dtype", "fp8"], "fp8", 1e-6, 0.08**2),
    ],
)
def test_a_student_of_the_teachers_own_weights_errs_by_the_rounding_alone(
    train, teachers, tmp_path, flags, recorded, least, most
):
    flags = ["--guidance_scale", 1, "--max_steps", 1, "--feature_loss_weight", 1, *flags]
    train(teachers.one, IDENTITY_CONFIG, *flags).ok()
    (entry,) = read_metrics(tmp_path / "out")
    assert least <= entry["loss"] <= most and least <= entry["feature_loss"] <= most
    config = json.loads((tmp_path / "out" / "student_config.json").read_text(encoding="utf-8"))
    assert config["distillation"]["teacher_dtype"] == recorded


def test_a_student_learns_from_a_frozen_fp8_teacher(train, teachers, tmp_path):
    before = snapshot(teachers.two)
    flags = ("--teacher_dtype", "fp8", "--dtype", "bf16", "--lr", 1e-2, "--max_steps", 40, "--student_steps", "none")
    train(teachers.two, PRUNED_CONFIG, *flags).ok()
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "out")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert snapshot(teachers.two) == before, "the teacher's files changed"


def test_offloading_changes_no_bit_of_the_student(train, teachers, tmp_path):
    flags = ("--max_steps", 12, "--replay", 1, "--calls_per_expert", 3)
    ways = {"stays": [], "experts": ["--teacher_offload"], "blocks": ["--teacher_offload", "blocks"]}
    outcomes = [
        train(teachers.two, PRUNED_CONFIG, *flags, *more, output_dir=tmp_path / way) for way, more in ways.items()
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    stays, *others = (weights_of(tmp_path / way) for way in ways)
    assert all(torch.equal(stays[name], other[name]) for other in others for name in stays)
    swaps = {re.search(r"with (\d+) swaps of its experts", outcome.out)[1] for outcome in outcomes}
    assert len(swaps) == 1 and 0 < int(swaps.pop()) < 12


def test_taking_turns_swaps_far_less_often_than_both_in_every_batch(train, teachers, tmp_path):
    counts = []
    for calls in (0, 10):
        flags = ("--teacher_offload", "--max_steps", 30, "--replay", 1, "--calls_per_expert", calls)
        outcome = train(teachers.two, PRUNED_CONFIG, *flags).ok()
        counts.append(int(re.search(r"with (\d+) swaps", outcome.out)[1]))
    both, in_turns = counts
    assert both > 15 and in_turns < both / 3


@pytest.mark.parametrize(
    "compiled", [[], pytest.param(["--compile"], marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_blocks_of_one_expert_teach_by_way_of_a_cache_too(train, teachers, tmp_path, compiled):
    cache = ("--teacher_cache", tmp_path / "answers", "--offline_teacher", "--teacher_offload", "blocks")
    train(teachers.one, PRUNED_CONFIG, *cache, "--teacher_dtype", "fp8", "--max_steps", 1, *compiled).ok()
