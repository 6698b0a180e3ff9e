"""A run measures its held-out error: seldom, at states that are drawn once, and without a trace in what it trains.

Weights, losses and checkpoints of runs with and without it are compared bit for bit, also where the run is stopped, cached,
offline, sharded, of few steps, or of a teacher whose two experts take turns on the device.
"""

import shutil

import pytest
import torch

from support.runs import PRUNED_CONFIG, as_if_stopped_after, checkpoint_tensors, read_metrics, weights_of

# 60 calls of 64 answers, of which 16 paths of 4 steps are 1.7 %
COMMON = ["--guidance_scale", 1, "--lr", 1e-3, "--replay", 1]
LONG = ["--max_steps", 60, "--batch_size", 64, *COMMON]
SHORT = ["--max_steps", 12, "--batch_size", 4, "--teacher_steps", 10, *COMMON]


def errors_of(folder) -> dict[int, dict]:
    return {line["step"]: line["held_out"] for line in read_metrics(folder) if line["held_out"]}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_it_comes_six_times_where_it_is_cheap(train, teachers, tmp_path):
    outcome = train(teachers.one, PRUNED_CONFIG, *LONG).ok()
    assert list(errors_of(tmp_path / "out")) == [10, 20, 30, 40, 50, 60]
    assert all(0 < errors["velocity_error"] < 2 for errors in errors_of(tmp_path / "out").values())
    assert "held out  relative velocity error" in outcome.out


@pytest.mark.parametrize(
    "recipe",
    [
        ["--calls_per_expert", 4, "--teacher_offload"],
        ["--sigma_range", 0.8, 1],
        ["--image_sizes", "32x32", "48x32", "32x48"],
        ["--student_steps", 2],
    ],
    ids=["offload", "range", "sizes", "few steps"],
)
def test_weights_losses_and_checkpoints_are_those_of_a_run_without_it(train, teachers, tmp_path, recipe):
    flags = [*SHORT, "--guidance_scale_2", 1, "--save_every", 12, *recipe]
    measured, plain = tmp_path / "measured", tmp_path / "plain"
    # The plain run comes first, because a random number that was drawn while measuring would be missing in both after it.
    train(teachers.two, PRUNED_CONFIG, *flags, "--eval_every", 0, output_dir=plain).ok()
    train(teachers.two, PRUNED_CONFIG, *flags, "--eval_every", 5, output_dir=measured).ok()
    found = errors_of(measured)
    assert [step for step in found if step % 5 == 0 or step == 12] == [5, 10, 12] and not errors_of(plain)
    assert ("endpoint" in found[12]) == ("--sigma_range" not in recipe), "a part of the noise levels draws nothing"
    if "--student_steps" in recipe:  # the velocity in the first stage alone, pictures in both
        assert ("velocity_error" in found[5], found[5]["steps"]) == (True, 10)
        assert ("velocity_error" in found[12], found[12]["steps"]) == (False, 2)
    assert_same(weights_of(measured), weights_of(plain))
    assert_same(checkpoint_tensors(measured), checkpoint_tensors(plain))
    assert [line["loss"] for line in read_metrics(measured)] == [line["loss"] for line in read_metrics(plain)]


def test_a_run_that_resumes_measures_at_the_same_states(train, teachers, tmp_path):
    flags = [*SHORT, "--eval_every", 4, "--save_every", 4, "--lr_scheduler", "constant"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(teachers.one, PRUNED_CONFIG, *flags, output_dir=whole).ok()
    shutil.copytree(whole, stopped)
    as_if_stopped_after(stopped, 8)
    assert "Resuming from step 8" in train(teachers.one, PRUNED_CONFIG, *flags, output_dir=stopped).ok().out
    assert errors_of(stopped) == errors_of(whole)


def test_sharded_processes_measure_together_and_train_as_without_it(flags_of, launch, tmp_path):
    flags = ["--max_steps", 4, "--batch_size", 4, "--replay", 1, "--shard", "--teacher_steps", 10]
    for name, every in (("measured", 2), ("plain", 0)):
        codes, said = launch(2, flags_of(name, *flags, "--eval_every", every))
        assert codes == [0, 0], said
        assert said.count("Held-out states") == (name == "measured")
    assert list(errors_of(tmp_path / "measured")) == [2, 4]
    assert_same(weights_of(tmp_path / "measured"), weights_of(tmp_path / "plain"))
