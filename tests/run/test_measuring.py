"""A run measures its held-out error by itself: seldom, on few states, once answered, and without a trace in what it trains.

Weights, losses and checkpoints of runs with and without it are compared bit for bit, also where the run is stopped, cached,
offline, sharded, of few steps, or of a teacher whose two experts take turns on the device.

pytest tests/run/test_measuring.py
"""

import re

import pytest
import torch
from safetensors.torch import load_file

import train_distillation
from support.runs import PRUNED_CONFIG, read_metrics, weights_of
from wandistiller.evaluation.held_out import PathErrors
from wandistiller.reports.metrics import Rise, rise_of_held_out
from wandistiller.run import held_out, measuring
from wandistiller.run.measuring import MOST_ANSWERS, expected_calls, plan_measuring
from wandistiller.sampling.sampler import StudentField
from wandistiller.sampling.teacher import Teacher

# The smallest runs that are measured by themselves: 960 answers of the teacher.
LONG = ["--max_steps", 60, "--batch_size", 16, "--guidance_scale", 1, "--lr", 1e-3, "--replay", 1]


def errors_of(folder) -> dict[int, dict]:
    return {line["step"]: line["velocity_error"] for line in read_metrics(folder) if line["velocity_error"]}


def checkpoint_tensors(folder) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoints").glob("step_*/*.safetensors"))
    assert files
    return {f"{file.parent.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---- how often, and on how much ----


def flags_of(*words: object):
    return train_distillation.parse_args(["--teacher_path", "y", "--replay", "1", *map(str, words)])


@pytest.mark.parametrize("student_steps", [None, 1, 4])
@pytest.mark.parametrize("replay", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 6, 64])
def test_it_costs_a_small_share_of_the_answers_and_comes_about_six_times(batch_size, replay, student_steps):
    few = ["--student_steps", student_steps] if student_steps else []
    flags = flags_of("--replay", replay, "--batch_size", batch_size, *few)
    was_measured = []
    for num_steps in (1, 30, 300, 3000, 30_000):
        plan = plan_measuring(flags, 50, num_steps, batch_size, 16)
        was_measured.append(plan.is_default)
        if not plan.is_default:
            assert plan.every == 0
            continue
        asked = plan.num_paths * plan.num_steps
        assert asked <= min(MOST_ANSWERS, 0.02 * batch_size * expected_calls(flags, 50, num_steps))
        assert plan.num_paths >= 2 and plan.num_steps == plan.num_levels * plan.segment_steps
        assert plan.num_levels == student_steps or (student_steps is None and plan.segment_steps == 1)
        times = -(-num_steps // plan.every)
        assert 5 <= times <= 6
        assert plan.num_paths < batch_size or plan.num_paths % batch_size == 0, (
            "a batch of another size is compiled anew"
        )
    assert was_measured == sorted(was_measured) and was_measured[-1] and not was_measured[0]


def test_a_segment_has_as_many_steps_of_the_teacher_as_the_run_teaches_it_with():
    flags = flags_of("--student_steps", 3, "--batch_size", 64, "--replay", 1)
    assert plan_measuring(flags, 50, 1000, 64, 16).segment_steps == expected_calls(flags, 50, 1000) // 1000 == 17


def test_eval_every_has_the_last_word():
    for given in (0, 7):
        plan = plan_measuring(flags_of("--eval_every", given), 50, 10_000, 4, 16)
        assert (plan.every, plan.is_default) == (given, False)
    assert plan_measuring(flags_of(), 50, 10_000, 4, 0).every == 0, "there are no prompts"


def test_the_noise_part_is_measured_where_eval_every_is_given_and_the_run_can_afford_it():
    flags = flags_of("--eval_every", 10, "--batch_size", 64)
    found = []
    for num_steps in (10, 200, 300, 500, 1000, 10_000):
        count = plan_measuring(flags, 50, num_steps, 64, 16).num_noise_prompts
        found.append(count)
        assert count * measuring.NUM_NOISES * 50 <= 0.05 * 64 * num_steps
    assert found == [0, 0, 4, 8, 8, 8]
    assert plan_measuring(flags, 50, 10_000, 64, 3).num_noise_prompts == 0, "three prompts tell too little"
    assert plan_measuring(flags_of(), 50, 10_000, 64, 16).num_noise_prompts == 0


def test_the_dry_run_counts_what_is_then_asked(train, teachers, tmp_path, monkeypatch):
    asked = {"teacher": 0, "student": 0}
    for name, kind in (("teacher", Teacher), ("student", StudentField)):
        plain = kind.velocity

        def counted(self, latents, *rest, name=name, plain=plain):
            asked[name] += len(latents)
            return plain(self, latents, *rest)

        monkeypatch.setattr(kind, "velocity", counted)
    for flags in ([], ["--eval_every", 40], ["--eval_every", 60, "--verbose"]):
        if "--verbose" in flags:
            monkeypatch.setattr(measuring, "MOST_NOISE_SHARE", 1.0)
        asked.update(teacher=0, student=0)
        folder = tmp_path / f"out {len(flags)}"
        assert train(teachers.one, PRUNED_CONFIG, *LONG, *flags, output_dir=folder).code == 0
        said = train(teachers.one, PRUNED_CONFIG, *LONG, *flags, "--dry_run", output_dir=folder).out
        calls, states = re.search(r"for the held-out error: ([\d.,]+) calls, .* answers ([\d,]+) states", said).groups()
        assert float(calls.replace(",", "")) == pytest.approx(asked["teacher"] / 16, abs=0.05)
        assert int(states.replace(",", "")) == asked["student"] > 0
    off = train(teachers.one, PRUNED_CONFIG, *LONG, "--eval_every", 0, "--dry_run").out
    assert "the job" in off and "held-out" not in off


# ---- nothing else changes ----


@pytest.mark.parametrize(
    "recipe",
    [
        ["--replay", 2, "--max_steps", 120],
        ["--calls_per_expert", 4, "--teacher_offload"],
        ["--sigma_range", 0.6, 1],
        ["--student_steps", 8],
    ],
    ids=["replay", "offload", "range", "few steps"],
)
def test_weights_losses_and_checkpoints_are_those_of_a_run_without_it(train, teachers, tmp_path, recipe):
    flags = [*LONG, "--guidance_scale_2", 1, "--save_every", 60, *recipe]
    measured, plain = tmp_path / "measured", tmp_path / "plain"
    # The plain run comes first, because a random number that was drawn while measuring would be missing in both after it.
    assert train(teachers.two, PRUNED_CONFIG, *flags, "--eval_every", 0, output_dir=plain).code == 0
    outcome = train(teachers.two, PRUNED_CONFIG, *flags, output_dir=measured)
    assert outcome.code == 0, outcome.err
    steps = list(errors_of(measured))
    assert len(steps) in (5, 6) and steps[-1] == len(read_metrics(measured)) and not errors_of(plain)
    assert all(
        set(errors) == {"teacher_states"} and errors["teacher_states"] > 0 for errors in errors_of(measured).values()
    )
    assert_same(weights_of(measured), weights_of(plain))
    assert_same(checkpoint_tensors(measured), checkpoint_tensors(plain))
    assert [line["loss"] for line in read_metrics(measured)] == [line["loss"] for line in read_metrics(plain)]
    assert "relative velocity error" in outcome.out and not list((plain / "checkpoints").glob("held_out*"))
    (file,) = (measured / "checkpoints").glob("held_out*")
    assert load_file(file)["sigma"].min() > (0.6 if "--sigma_range" in recipe else 0.1)


def test_what_the_noise_decides_is_measured_shown_and_leaves_training_as_it_was(train, teachers, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(measuring, "MOST_NOISE_SHARE", 1.0)  # of 960 answers, where 800 are needed
    folder, plain = tmp_path / "measured", tmp_path / "plain"
    assert train(teachers.one, PRUNED_CONFIG, *LONG, "--eval_every", 0, "--save_every", 60, output_dir=plain).code == 0
    outcome = train(teachers.one, PRUNED_CONFIG, *LONG, "--eval_every", 30, "--save_every", 60, output_dir=folder)
    assert outcome.code == 0, outcome.err
    parts = {line["step"]: line["noise_part"] for line in read_metrics(folder) if line["noise_part"]}
    assert list(parts) == [30, 60] and set(parts[60]) >= {"norm_ratio", "cosine", "gain", "endpoint"}
    scale = {name: value for name, value in parts[60].items() if name.startswith("teacher_at")}
    assert len(scale) == 2 and all(parts[30][name] == value > 0 for name, value in scale.items())
    assert f"distance of pictures from the teacher's: {parts[60]['endpoint']:.3f}" in outcome.err
    assert all(part["gain"] == pytest.approx(part["norm_ratio"] * part["cosine"]) for part in parts.values())
    assert parts[60] != parts[30] and 0 < parts[60]["gain"] < 1
    shown = f"size {parts[60]['norm_ratio']:.2f}, cosine {parts[60]['cosine']:.2f}, gain {parts[60]['gain']:.2f}"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(shown in text for text in (outcome.out, outcome.err, card))
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("noise_part/gain")] == [30, 60]
    assert_same(checkpoint_tensors(folder), checkpoint_tensors(plain))


def test_a_run_that_resumes_measures_at_the_same_states_and_asks_nobody_again(train, teachers, tmp_path, monkeypatch):
    flags = [*LONG, "--save_every", 30, "--lr_scheduler", "constant"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=whole).code == 0
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=stopped).code == 0
    for file in (stopped / "checkpoints").glob("step_00000060*.json"):  # as if it had been killed after step 30
        file.unlink()

    def refuse(*values):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(held_out, "draw_path_states", refuse)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=stopped)
    assert outcome.code == 0 and "Resuming from step 30" in outcome.out, outcome.err
    assert errors_of(stopped) == errors_of(whole) and list(errors_of(whole)) == [10, 20, 30, 40, 50, 60]
    assert_same(weights_of(stopped), weights_of(whole))
    # A longer run would have more states by itself, and keeps to those that it began with:
    assert train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 240, output_dir=stopped).code == 0
    assert errors_of(stopped)[60] == errors_of(whole)[60] and max(errors_of(stopped)) == 240


@pytest.mark.parametrize("content", [b"", b"not safetensors"])
def test_states_that_are_damaged_are_asked_for_again(train, teachers, tmp_path, content):
    flags = [*LONG, "--save_every", 60]
    assert train(teachers.one, PRUNED_CONFIG, *flags).code == 0
    (file,) = (tmp_path / "out" / "checkpoints").glob("held_out*")
    before = {
        name: tensor.clone() for name, tensor in load_file(file).items()
    }  # not a map of the file, which is cut short
    file.write_bytes(content)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, "--max_steps", 62)
    assert outcome.code == 0 and "Held-out states: " in outcome.out, outcome.err
    assert_same(load_file(file), before)


def test_other_prompts_to_measure_on_are_other_states(train, teachers, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lone prompt\n", encoding="utf-8")
    outcome = train(teachers.one, PRUNED_CONFIG, *LONG, "--save_every", 60)
    assert "prompts of the run with noises of their own" in outcome.out
    outcome = train(
        teachers.one, PRUNED_CONFIG, *LONG, "--save_every", 60, "--max_steps", 62, "--eval_prompts", prompts
    )
    assert outcome.code == 0 and "Held-out states: " in outcome.out and "noises of their own" not in outcome.out
    assert len(list((tmp_path / "out" / "checkpoints").glob("held_out*"))) == 2


def test_an_offline_teacher_is_asked_before_it_leaves_and_not_missed_later(train, teachers, tmp_path, monkeypatch):
    flags = [*LONG, "--teacher_cache", tmp_path / "cache", "--offline_teacher"]
    first = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "one")
    assert first.code == 0 and len(errors_of(tmp_path / "one")) == 6, first.err

    def refuse(*values):
        raise AssertionError("a teacher was made")

    monkeypatch.setattr(Teacher, "__init__", refuse)
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "two").code == 0
    assert errors_of(tmp_path / "two") == errors_of(tmp_path / "one")
    (kept,) = (tmp_path / "cache").glob("held_out*")
    kept.unlink()  # as in a cache of an earlier version
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "three")
    assert outcome.code == 0 and not errors_of(tmp_path / "three"), outcome.err
    assert_same(weights_of(tmp_path / "three"), weights_of(tmp_path / "one"))


def test_sharded_processes_measure_together_and_train_as_without_it(flags_of, launch, tmp_path):
    flags = ["--max_steps", 60, "--batch_size", 16, "--replay", 1, "--shard"]
    for name, extra in (("measured", []), ("plain", ["--eval_every", 0])):
        codes, said = launch(2, flags_of(name, *flags, *extra))
        assert codes == [0, 0], said
        assert said.count("Held-out states") == (name == "measured")
    assert len(errors_of(tmp_path / "measured")) == 6
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


def test_only_errors_at_the_same_kinds_of_states_are_compared():
    lines = lines_of([5, 4, 3, 2], [0.5, 0.3, 0.31, 0.33])
    lines[1]["velocity_error"]["student_states"] = 0.3
    assert rise_of_held_out(lines) is None


def test_steps_whose_lines_lack_a_loss_are_no_hindrance():
    lines = lines_of([5, 4, 3, 2], [0.5, 0.3, 0.31, 0.33])
    for line in lines[2:]:
        del line["loss"]
    assert rise_of_held_out(lines) is None


@pytest.mark.parametrize("replay", [1, 2])
def test_a_run_that_learns_by_heart_ends_with_what_to_do(train, teachers, monkeypatch, replay):
    errors = iter([0.5, 0.2, 0.21, 0.22, 0.23, 0.24])
    monkeypatch.setattr(PathErrors, "__call__", lambda *_: {"teacher_states": next(errors)})
    outcome = train(teachers.one, PRUNED_CONFIG, *LONG, "--replay", replay, "--max_steps", 60 * replay)
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if "learns its answers by heart" in line]
    assert f"from 0.200 at step {20 * replay} to 0.240 at step {60 * replay}" in line and "more prompts" in line
    assert ("--replay than 2" in line) == (replay == 2)


def test_a_run_that_only_learns_says_nothing_of_the_kind(train, teachers):
    outcome = train(teachers.one, PRUNED_CONFIG, *LONG)
    assert "held out  relative velocity error" in outcome.out and "by heart" not in outcome.out
