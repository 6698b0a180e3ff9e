"""A run measures its held-out error: seldom, at states that are drawn once, and without a trace in what it trains.

Weights, losses and checkpoints of runs with and without it are compared bit for bit, also where the run is stopped, cached,
offline, sharded, of few steps, or of a teacher whose two experts take turns on the device.

pytest tests/run/test_measuring.py
"""

import re

import pytest
import torch
from safetensors.torch import load_file

from support.runs import PRUNED_CONFIG, read_metrics, weights_of
from wandistiller.reports.metrics import Rise, rise_of_held_out
from wandistiller.sampling.sampler import StudentField
from wandistiller.sampling.teacher import Teacher

# 60 calls of 64 answers, of which 16 paths of 4 steps are 1.7 %
LONG = ["--max_steps", 60, "--batch_size", 64, "--guidance_scale", 1, "--lr", 1e-3, "--replay", 1]
SHORT = ["--max_steps", 12, "--batch_size", 4, "--guidance_scale", 1, "--lr", 1e-3, "--replay", 1]


def errors_of(folder) -> dict[int, dict]:
    return {line["step"]: line["velocity_error"] for line in read_metrics(folder) if line["velocity_error"]}


def checkpoint_tensors(folder) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints").glob("step_*/*.safetensors"))
    assert files
    return {f"{file.parent.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def states_of(folder) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("held_out*")
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


# ---- how often ----


def test_it_comes_six_times_where_it_is_cheap_and_never_where_it_is_not(train, teachers, tmp_path):
    outcome = train(teachers.one, PRUNED_CONFIG, *LONG)
    assert outcome.code == 0, outcome.err
    assert list(errors_of(tmp_path / "out")) == [10, 20, 30, 40, 50, 60]
    assert all(0 < errors["teacher_states"] < 2 for errors in errors_of(tmp_path / "out").values())
    assert "held out  relative velocity error" in outcome.out and "by heart" not in outcome.out
    for flags in ([*LONG, "--max_steps", 30], [*LONG, "--eval_every", 0]):
        assert "held-out" not in train(teachers.one, PRUNED_CONFIG, *flags, "--dry_run").out


def test_the_dry_run_counts_what_is_then_asked(train, teachers, monkeypatch):
    asked = {"teacher": 0, "student": 0}
    for name, kind in (("teacher", Teacher), ("student", StudentField)):
        plain = kind.velocity

        def counted(self, latents, *rest, name=name, plain=plain):
            asked[name] += len(latents)
            return plain(self, latents, *rest)

        monkeypatch.setattr(kind, "velocity", counted)
    flags = [*SHORT, "--eval_every", 5]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    said = train(teachers.one, PRUNED_CONFIG, *flags, "--dry_run").out
    calls, states = re.search(r"for the held-out error: ([\d.,]+) calls, .* answers ([\d,]+) states", said).groups()
    assert float(calls) == asked["teacher"] / 4 == 16
    assert int(states) == asked["student"] == 3 * 64


# ---- nothing else changes ----


@pytest.mark.parametrize(
    "recipe",
    [
        ["--replay", 2],
        ["--calls_per_expert", 4, "--teacher_offload"],
        ["--sigma_range", 0.8, 1],
        ["--student_steps", 8],
        ["--image_sizes", "32x32", "48x32", "32x48"],
    ],
    ids=["replay", "offload", "range", "few steps", "sizes"],
)
def test_weights_losses_and_checkpoints_are_those_of_a_run_without_it(train, teachers, tmp_path, recipe):
    flags = [*SHORT, "--guidance_scale_2", 1, "--save_every", 12, *recipe]
    measured, plain = tmp_path / "measured", tmp_path / "plain"
    # The plain run comes first, because a random number that was drawn while measuring would be missing in both after it.
    assert train(teachers.two, PRUNED_CONFIG, *flags, "--eval_every", 0, output_dir=plain).code == 0
    outcome = train(teachers.two, PRUNED_CONFIG, *flags, "--eval_every", 5, output_dir=measured)
    assert outcome.code == 0, outcome.err
    assert list(errors_of(measured)) == [5, 10, 12] and not errors_of(plain)
    assert_same(weights_of(measured), weights_of(plain))
    assert_same(checkpoint_tensors(measured), checkpoint_tensors(plain))
    assert [line["loss"] for line in read_metrics(measured)] == [line["loss"] for line in read_metrics(plain)]
    kept = states_of(measured / "checkpoints")
    assert sum(value.shape[1] for name, value in kept.items() if name.endswith("latents")) == 16
    if "--sigma_range" in recipe:
        assert kept["0.sigma"].min() >= 0.8


def test_a_run_that_resumes_measures_at_the_same_states_and_asks_nobody_again(train, teachers, tmp_path):
    flags = [*SHORT, "--eval_every", 4, "--save_every", 4, "--lr_scheduler", "constant"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=whole).code == 0
    assert train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 8, output_dir=stopped).code == 0
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=stopped)
    assert outcome.code == 0 and "Resuming from step 8" in outcome.out and "Held-out states" not in outcome.out
    assert states_of(stopped / "checkpoints").keys() == states_of(whole / "checkpoints").keys()
    assert list(errors_of(stopped)) == [4, 8, 12]


@pytest.mark.parametrize("content", [b"", b"not safetensors"])
def test_states_that_are_damaged_are_drawn_again(train, teachers, tmp_path, content):
    flags, kept = [*SHORT, "--eval_every", 12, "--save_every", 12], tmp_path / "out" / "checkpoints"
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    before = states_of(kept)
    next(kept.glob("held_out*")).write_bytes(content)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 13)
    assert outcome.code == 0 and "Held-out states: " in outcome.out, outcome.err
    assert_same(states_of(kept), before)


def test_other_prompts_to_measure_on_are_other_states(train, teachers, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lone prompt\n", encoding="utf-8")
    flags = [*SHORT, "--eval_every", 12, "--save_every", 12]
    assert "see --eval_prompts" in train(teachers.one, PRUNED_CONFIG, *flags).out
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 13, "--eval_prompts", prompts)
    assert outcome.code == 0 and "Held-out states: " in outcome.out and "see --eval_prompts" not in outcome.out
    assert len(list((tmp_path / "out" / "checkpoints").glob("held_out*"))) == 2


def test_an_offline_teacher_is_asked_before_it_leaves_and_not_missed_later(train, teachers, tmp_path, monkeypatch):
    flags = [*SHORT, "--eval_every", 6, "--teacher_cache", tmp_path / "cache", "--offline_teacher"]
    first = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "one")
    assert first.code == 0 and len(errors_of(tmp_path / "one")) == 2, first.err

    def refuse(*values):
        raise AssertionError("a teacher was made")

    monkeypatch.setattr(Teacher, "__init__", refuse)
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "two").code == 0
    assert errors_of(tmp_path / "two") == errors_of(tmp_path / "one")
    next((tmp_path / "cache").glob("held_out*")).unlink()
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "three")
    assert outcome.code == 0 and not errors_of(tmp_path / "three"), outcome.err
    assert "Held-out error: not measured" in outcome.out
    assert_same(weights_of(tmp_path / "three"), weights_of(tmp_path / "one"))


def test_sharded_processes_measure_together_and_train_as_without_it(flags_of, launch, tmp_path):
    flags = ["--max_steps", 6, "--batch_size", 4, "--replay", 1, "--shard"]
    for name, every in (("measured", 3), ("plain", 0)):
        codes, said = launch(2, flags_of(name, *flags, "--eval_every", every))
        assert codes == [0, 0], said
        assert said.count("Held-out states") == (name == "measured")
    assert list(errors_of(tmp_path / "measured")) == [3, 6]
    assert_same(weights_of(tmp_path / "measured"), weights_of(tmp_path / "plain"))


# ---- a student that learns by heart ----


def lines_of(losses: list[float], errors: list[float | None]) -> list[dict]:
    return [
        {"step": step, "loss": loss, "velocity_error": error and {"teacher_states": error}}
        for step, (loss, error) in enumerate(zip(losses, errors, strict=True), start=1)
    ]


@pytest.mark.parametrize(
    "losses, errors, rise",
    [
        ([5, 4, 3, 2], [0.5, 0.3, 0.31, 0.33], Rise(0.3, 2, 0.33, 4)),
        ([5, 4, 3, 2], [0.5, 0.3, 0.33, 0.31], Rise(0.3, 2, 0.31, 4)),  # not lower than two measurements ago
        ([5, 4, 3, 2], [0.5, 0.4, 0.3, 0.33], None),  # one measurement alone
        ([5, 4, 3, 2], [0.5, 0.3, 0.301, 0.302], None),  # not worth a word
        ([5, 2, 3, 4], [0.5, 0.3, 0.31, 0.33], None),  # the loss rose too, so the states have become harder
        ([5, 4, 3, 2], [None, 0.3, None, 0.33], None),
        ([5, 4, 3, 2], [None, None, None, None], None),
        ([9, 5, 9, 4, 1, 3, 1, 2], [None, 0.3, None, 0.3, None, 0.31, None, 0.4], Rise(0.3, 2, 0.4, 8)),
    ],
)
def test_a_rise_over_two_measurements_is_told_where_the_loss_fell(losses, errors, rise):
    assert rise_of_held_out(lines_of(losses, errors)) == rise
    lines = lines_of(losses, errors)
    for line in lines[2:]:
        del line["loss"]
    assert rise_of_held_out(lines) is None, "lines without a loss are no hindrance"
