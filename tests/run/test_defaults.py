"""Flags that are left out get values by teacher, student and batch, and a flag far from them is told of."""

import pytest

from support.runs import PRUNED_CONFIG, read_metrics
from wandistiller import StudentConfig
from wandistiller.run.resolve import MAX_REPLAY, MIN_REPLAY, suggested_lr, suggested_replay, suggested_warmup


def test_the_learning_rate_falls_with_the_width_and_with_the_root_of_the_samples():
    at_128 = suggested_lr("muon", 128, 64)
    assert suggested_lr("muon", 256, 64) == pytest.approx(at_128 / 2, rel=0.02)
    assert suggested_lr("muon", 128, 16) == pytest.approx(at_128 / 2, rel=0.02)
    assert suggested_lr("muon", 64, 512) == at_128, "nothing larger was measured"
    assert 1e-5 < suggested_lr("muon", 1536, 4) < 1e-3


def test_the_warm_up_is_a_small_part_of_the_steps():
    assert [suggested_warmup(steps) for steps in (1, 1000, 10**6)] == [0, 40, 500]


def wan(hidden_size: int, depth: int) -> StudentConfig:
    return StudentConfig(
        block="wan", hidden_size=hidden_size, depth=depth, num_heads=hidden_size // 64, ffn_dim=4 * hidden_size,
        num_channels=16, image_size=256, text_encoder_output_dim=64,
    )  # fmt: skip


def test_replay_grows_with_what_an_answer_costs_and_is_bounded():
    def replay(teacher: StudentConfig, student: StudentConfig, **options) -> int:
        return suggested_replay(teacher, student, 32, **{"is_guided": True} | options)

    assert replay(wan(128, 2), wan(128, 2)) == MIN_REPLAY
    assert replay(wan(1024, 8), wan(128, 2)) == MAX_REPLAY
    # Two passes of a model nine times as large, against three of the student:
    assert replay(wan(128, 18), wan(128, 2)) == 6
    assert replay(wan(128, 18), wan(128, 2), is_guided=False) == MIN_REPLAY


def test_a_run_says_what_was_chosen_and_the_student_records_it(train, teachers, tmp_path):
    outcome = train(teachers.one, PRUNED_CONFIG, "--student_steps", 4, "--teacher_calls", 3, "--batch_size", 4).ok()
    record = StudentConfig.load(tmp_path / "out").distillation
    assert record["optimizer"] == "muon" and record["replay"] == MIN_REPLAY and record["num_train_steps"] == 18
    assert record["lr"] == suggested_lr("muon", PRUNED_CONFIG["hidden_size"], 4)
    assert record["num_teacher_batches"] == 3 and read_metrics(tmp_path / "out")[-1]["teacher_calls"] == 3
    assert "Steps: 18 of 4 samples" in outcome.out and "muon at lr 0.001" in outcome.out
    assert "Hint: 18 steps are enough to try things out" in outcome.out
