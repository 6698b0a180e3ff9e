"""From typed flags to settings: what every flag that was left out becomes, what is corrected with a line, and what is refused.

Whatever is resolved here is what the dry run, the messages, the record and a resumed run read.
"""

import pytest

from support.runs import PROMPTS, PRUNED_CONFIG
from wandistiller.errors import UserError, differences
from wandistiller.run.flags import parse_args
from wandistiller.run.inputs import read_inputs
from wandistiller.run.resolve import resolve
from wandistiller.training.checkpoints import Checkpoints


@pytest.fixture
def resolved(write_config, teachers):
    """Settings of a command line, for a teacher of one expert unless another is given."""

    def run(*flags: object, teacher=None, config: dict = PRUNED_CONFIG):
        words = ["--teacher_path", teacher or teachers.one, "--student_config", write_config(config), "--device", "cpu"]
        given = parse_args([str(word) for word in (*words, "--data_path", PROMPTS, *flags)])
        return resolve(given, read_inputs(given))

    return run


@pytest.mark.parametrize("flags", [["--teacher_cache", "x"], ["--feature_loss_weight", "0"]])
def test_hidden_states_are_compared_wherever_the_teacher_has_some(resolved, flags):
    assert resolved().feature_loss_weight == 1.0 and resolved(*flags).feature_loss_weight == 0.0


@pytest.mark.parametrize(
    "flags, calls_per_expert",
    [([], 64), (["--calls_per_expert", "8"], 8), (["--calls_per_expert", "0"], 0)],
)
def test_an_offloaded_teacher_answers_in_turns_unless_something_speaks_against_it(
    resolved, teachers, flags, calls_per_expert
):
    assert resolved("--teacher_offload", *flags, teacher=teachers.two).calls_per_expert == calls_per_expert


def test_an_offload_of_one_expert_is_left_out_with_a_line_and_changes_nothing(resolved, capsys):
    found = resolved("--teacher_offload")
    assert not found.teacher_offload and found.calls_per_expert == 0
    assert "--teacher_offload is of no use here" in capsys.readouterr().out


def test_the_length_is_that_of_steps_else_epochs_else_calls(resolved):
    assert resolved("--batch_size", 20, "--num_epochs", 2).num_steps == 6
    assert resolved("--num_epochs", 2, "--max_steps", 5).num_steps == 5
    assert resolved("--teacher_calls", 2, "--max_steps", 5).num_steps == 5
    assert resolved("--teacher_calls", 2, "--num_epochs", 3, "--batch_size", 20).num_steps == 9
    found = resolved("--teacher_calls", 7, "--replay", 3, "--student_steps", "none")
    assert (found.num_steps, found.num_calls, found.replay) == (21, 7, 3)


def test_a_third_of_the_steps_teach_few_steps_unless_the_teacher_has_few_or_a_part_of_the_noise_levels(resolved):
    found = resolved("--max_steps", 30, "--replay", 4)
    assert (found.student_steps, found.first_stage_steps, found.num_calls) == (4, 20, 5)
    by_calls = resolved("--teacher_calls", 5, "--replay", 4, "--student_steps", 2)
    assert (by_calls.student_steps, by_calls.first_stage_steps) == (2, 20)
    assert (by_calls.num_steps, by_calls.num_calls) == (30, 5)
    for typed in (["--student_steps", "none"], ["--teacher_steps", 4], ["--sigma_range", 0.5, 1]):
        found = resolved("--max_steps", 30, *typed)
        assert found.student_steps is None and found.first_stage_steps == found.num_steps


def test_a_run_measures_itself_about_six_times_where_that_is_cheap(resolved):
    # of 60 calls of 64, 16 paths of 4 steps are 1.7 %
    cheap = ["--student_steps", "none", "--batch_size", 64, "--guidance_scale", 1, "--replay", 1]
    assert resolved(*cheap, "--max_steps", 60).eval_every == 10
    assert resolved(*cheap, "--max_steps", 30).eval_every == 0
    assert resolved("--max_steps", 30, "--eval_every", 7).eval_every == 7


@pytest.mark.parametrize("steps, sampler", [(4, "euler"), (8, "euler"), (9, "unipc")])
def test_a_teacher_of_few_steps_is_one_of_few_noise_levels(resolved, steps, sampler):
    found = resolved("--teacher_steps", steps)
    assert found.teacher.teacher_sampler == sampler
    assert len(found.teacher_levels) == (steps + 1 if sampler == "euler" else 0)  # with the 0 that they end in


def test_the_precision_is_that_of_the_device_and_of_the_gpu_that_a_dry_run_plans_for(resolved):
    assert (resolved().dtype, resolved().teacher_dtype) == ("fp32", "fp32")
    planned = resolved("--dry_run", "--assume_gpu", 80)
    assert (planned.dtype, planned.teacher_dtype, planned.is_for_gpu) == ("bf16", "bf16", True)
    assert resolved("--dtype", "bf16", "--teacher_dtype", "fp8").teacher_dtype == "fp8"


def test_so_many_prompts_are_drawn_once_and_more_of_them_begin_with_the_same(resolved):
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    few, more = resolved("--num_prompts", 5).prompts, resolved("--num_prompts", 9).prompts
    assert len(set(few)) == 5 and more[:5] == few and set(more) <= set(lines)
    assert resolved("--num_prompts", 5, "--seed", 1).prompts != few
    assert len(resolved().prompts) == 55


def test_sample_pictures_are_of_held_out_prompts_unless_others_are_named(resolved, tmp_path):
    held_out, own = tmp_path / "held_out.txt", tmp_path / "own.txt"
    held_out.write_text("a\nb\nc\n", encoding="utf-8")
    own.write_text("# mine\na cat --w 832 --d 3\na dog\n", encoding="utf-8")
    assert resolved("--eval_prompts", held_out, "--num_samples", 2).sample_prompts == ["a", "b"]
    named = resolved("--sample_prompts", own, "a red bird", "--sample_seed", 7)
    assert (named.sample_prompts, named.sample_seed) == (["a cat", "a dog", "a red bird"], 7)
    for text, message in (("cats.txt", "is no file here"), (" ", "is empty")):
        with pytest.raises(UserError, match=message):
            resolved("--sample_prompts", text)
    with pytest.raises(UserError, match="are 65 prompts; allowed: at most 64"):
        resolved("--sample_prompts", *map(str, range(65)))


def test_a_message_names_the_files_of_digests_and_tells_what_changed():
    had = {"prompts": "a1", "teacher": "b2", "seed": 0, "about": {"prompts": "55 of a.txt", "teacher": "Wan"}}
    has = {"prompts": "a3", "teacher": "b4", "seed": 0, "about": {"prompts": "2 of b.txt", "teacher": "Wan"}}
    assert differences(had, has) == [
        "prompts '55 of a.txt', now '2 of b.txt'",
        "teacher 'Wan', whose contents are others now",
    ]
    assert differences({"prompts": "a1", "about": [3]}, {"prompts": "a3"}) == ["prompts 'a1', now 'a3'"]


def test_a_setting_that_a_checkpoint_lacks_counts_as_its_neutral_value(tmp_path):
    neutral = {"replay": 1, "calls_per_expert": 0}
    checkpoints = Checkpoints(tmp_path, {"seed": 3}, in_background=False)
    checkpoints.save(1, {})
    assert Checkpoints(tmp_path, {"seed": 3, "replay": 1}, neutral=neutral).newest().step == 1
    with pytest.raises(UserError, match="replay 1, now 2"):
        Checkpoints(tmp_path, {"seed": 3, "replay": 2}, neutral=neutral).newest()
