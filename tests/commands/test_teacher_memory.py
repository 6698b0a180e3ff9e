"""A teacher in less memory works as a person runs it: --teacher_dtype and --teacher_offload from the command line.

An offloaded teacher must teach bit for bit what one that stays does. All of it runs on a CPU, where copies stand for
the moves to a device; swaps are counted by hand.

pytest tests/projection/test_fitting.py
"""

import json
import re

import pytest
import torch

from support.runs import (
    IDENTITY_CONFIG,
    PRUNED_CONFIG,
    read_metrics,
    snapshot,
    weights_of,
)
from wandistiller.model.fp8 import FP8, fp8_linears
from wandistiller.run import build


def record_of(folder) -> dict:
    return json.loads((folder / "student_config.json").read_text(encoding="utf-8"))["distillation"]


@pytest.fixture
def built(monkeypatch) -> list:
    """The teachers that runs build, each with the values of its weights before training."""
    found, build_teacher = [], build.build_teacher

    def watched(*args):
        teacher = build_teacher(*args)
        found.append((teacher, [tensor.float() for tensor in tensors_of(teacher)]))
        return teacher

    monkeypatch.setattr(build, "build_teacher", watched)
    return found


def tensors_of(teacher) -> list[torch.Tensor]:
    return [tensor for expert in teacher.experts.values() for tensor in expert.parameters()]


@pytest.mark.parametrize("flags, recorded", [([], "fp32"), (["--teacher_dtype", "bf16"], "bf16"), (["--dtype", "bf16"], "bf16")])  # fmt: skip
def test_how_the_teacher_is_kept_follows_dtype_and_is_recorded(train, teachers, built, tmp_path, flags, recorded):
    outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 1, *flags)
    assert outcome.code == 0, outcome.err
    assert record_of(tmp_path / "out")["teacher_dtype"] == recorded
    ((teacher, _),) = built
    assert str(teacher.experts["high"].proj_out.weight.dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[recorded]  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_student_learns_from_a_frozen_fp8_teacher(train, teachers, built, tmp_path, dtype):
    before = snapshot(teachers.two)
    flags = ("--teacher_dtype", "fp8", "--dtype", dtype, "--lr", 1e-2, "--max_steps", 40, "--states", "noise")
    outcome = train(teachers.two, PRUNED_CONFIG, *flags)
    assert outcome.code == 0, outcome.err
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "out")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert record_of(tmp_path / "out")["teacher_dtype"] == "fp8"
    ((teacher, values),) = built
    for expert in teacher.experts.values():
        layers = fp8_linears(expert)
        assert len(layers) == 30 and all(layer.weight.dtype == FP8 for layer in layers.values())
    assert all(torch.equal(a.float(), b) for a, b in zip(tensors_of(teacher), values, strict=True))
    assert all(tensor.grad is None for tensor in tensors_of(teacher))
    assert snapshot(teachers.two) == before, "the teacher's files changed"


def test_a_student_of_the_teachers_own_weights_errs_by_the_rounding_alone(train, teachers, tmp_path):
    flags = ("--guidance_scale", 1, "--max_steps", 1, "--teacher_dtype", "fp8", "--feature_loss_weight", 1)
    assert train(teachers.one, IDENTITY_CONFIG, *flags).code == 0
    (entry,) = read_metrics(tmp_path / "out")
    # Velocities of this teacher are near unit size; an error of 0.08 of it, squared. Without fp8 the loss is below 1e-9.
    assert 1e-6 < entry["loss"] < 0.08**2
    assert 0 < entry["feature_loss"] < 0.08**2


def test_offloading_changes_no_bit_of_the_student(train, teachers, tmp_path):
    flags = ("--max_steps", 30, "--replay", 1, "--calls_per_expert", 4)
    folders = tmp_path / "stays", tmp_path / "offloaded"
    outcomes = [
        train(teachers.two, PRUNED_CONFIG, *flags, *more, output_dir=folder)
        for folder, more in zip(folders, ([], ["--teacher_offload"]), strict=True)
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    stays, offloaded = map(weights_of, folders)
    assert all(torch.equal(stays[name], offloaded[name]) for name in stays)
    swaps = [re.search(r"with (\d+) swaps of its experts", outcome.out)[1] for outcome in outcomes]
    assert swaps[0] == swaps[1] and 0 < int(swaps[0]) < 30


def test_taking_turns_swaps_far_less_often_than_both_in_every_batch(train, teachers, tmp_path):
    counts = []
    for calls in (0, 16):
        outcome = train(
            teachers.two,
            PRUNED_CONFIG,
            "--teacher_offload",
            "--max_steps",
            60,
            "--replay",
            1,
            "--calls_per_expert",
            calls,
        )
        assert outcome.code == 0, outcome.err
        counts.append(int(re.search(r"with (\d+) swaps", outcome.out)[1]))
    both, in_turns = counts
    assert both > 30 and in_turns < both / 3


def test_offloading_one_expert_is_said_to_be_of_no_use_and_trains(train, teachers):
    outcome = train(teachers.one, PRUNED_CONFIG, "--teacher_offload", "--max_steps", 1)
    assert outcome.code == 0, outcome.err
    assert "--teacher_offload is of no use" in outcome.out and "swaps" not in outcome.out


def test_a_run_and_a_teacher_cache_hold_on_to_their_fp8_teacher(train, teachers, tmp_path):
    fp8, cache = ("--teacher_dtype", "fp8"), ("--teacher_cache", tmp_path / "answers")
    assert train(teachers.one, PRUNED_CONFIG, *fp8, *cache, "--max_steps", 2).code == 0
    other = train(teachers.one, PRUNED_CONFIG, *cache, "--max_steps", 2, output_dir=tmp_path / "other")
    assert other.code == 2 and "teacher_dtype 'fp8'" in other.err

    run = ("--save_every", 2, "--max_steps", 2)
    assert train(teachers.one, PRUNED_CONFIG, *fp8, *run, output_dir=tmp_path / "run").code == 0
    resumed = train(teachers.one, PRUNED_CONFIG, *run, output_dir=tmp_path / "run")
    assert resumed.code == 2 and "teacher_dtype 'fp8'" in resumed.err
