"""A run starts from another student or Wan: of its own shape as it is, of a larger one cut as a teacher is; what fits not is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train_distillation
from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG, weights_of
from support.wan_folders import write_pipeline_folder
from wandistiller import StudentConfig
from wandistiller.projection.selection_record import read_made_of
from wandistiller.wan.layouts import open_wan_files

STILL = ("--max_steps", 1, "--lr", 1e-12, "--ema_decay", 0)
WIDE = IDENTITY_CONFIG | {"depth": 2}


def is_near(folder, other) -> bool:
    ours, theirs = weights_of(folder), weights_of(other)
    return all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def report_of(folder) -> dict:
    return json.loads((folder / "projection_report.json").read_text(encoding="utf-8"))


def test_a_finished_student_goes_on_with_other_prompts_and_another_teacher(
    train, run_main, flags_of, teachers, tmp_path
):
    first, second, prompts = tmp_path / "first", tmp_path / "second", tmp_path / "other.txt"
    prompts.write_text("a red cat\na blue dog\n", encoding="utf-8")
    train(teachers.one, PRUNED_CONFIG, "--max_steps", 4, output_dir=first).ok()
    teacher = tmp_path / "teacher"
    write_pipeline_folder(teacher, seed=9)  # of the same shape, so that hidden states are compared
    flags = ["--init_from", first, "--data_path", prompts, *STILL, "--batch_size", 2]
    words = flags_of("second", *flags, teacher=teacher)
    at = words.index("--student_config")  # which is that of the student where it is left out
    done = run_main(train_distillation.main, *words[:at], *words[at + 2 :])
    assert done.code == 0 and "Hidden states are not compared" not in done.out, done.err
    assert is_near(second, first)
    record = StudentConfig.load(second).distillation
    assert record["init_from"] == str(first) and record["num_train_steps"] == 1
    # What it has of the teacher is what the first student had, so that a teacher's LoRA can still be cut for it:
    config = StudentConfig.load(first)
    (_, ours), (_, theirs) = read_made_of(second, config), read_made_of(first, config)
    assert ours.layers == theirs.layers and ours.axes.keys() == theirs.axes.keys()
    assert all(torch.equal(ours.axes[name], theirs.axes[name]) for name in ours.axes)


def test_a_student_is_cut_again_and_its_report_leads_to_the_teacher(train, teachers, tmp_path):
    """A student of whole layers, cut again, has the weights of its teacher at the places that its report names."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(teachers.one, WIDE, *STILL, output_dir=first).ok()
    train(teachers.one, PRUNED_CONFIG, "--init_from", first, *STILL, output_dir=second).ok()
    teacher, part = read_made_of(second, StudentConfig.load(second))
    assert (teacher.depth, part.layers) == (3, [0, 2])
    whole = load_file(teachers.one / "transformer" / "diffusion_pytorch_model.safetensors")
    for block, layer in enumerate(part.layers):
        rows, columns = part.axes[f"neurons.{layer}"], part.axes["channels"]
        expected = whole[f"blocks.{layer}.ffn.net.0.proj.weight"][rows][:, columns]
        assert torch.allclose(weights_of(second)[f"blocks.{block}.ffn.net.0.proj.weight"], expected, atol=1e-6)


@pytest.mark.parametrize("layout", ["one", "single_file"])
def test_a_smaller_wan_than_the_teacher_is_a_start_and_no_hidden_states_are_compared(
    train, teachers, write_config, tmp_path, layout
):
    """As a released 1.3B under a 14B; the student is that Wan, in files of any layout."""
    source = getattr(teachers, layout)
    teacher, shape = tmp_path / "teacher", dict(IDENTITY_CONFIG)
    if layout == "one":
        write_pipeline_folder(teacher, layers=4)
    else:
        config = open_wan_files(source).config
        shape |= {name: getattr(config, name) for name in ("hidden_size", "depth", "num_heads", "ffn_dim")}
        shape["text_encoder_output_dim"] = config.text_encoder_output_dim
        teacher = "mock"
    assert "Hidden states are not compared" in train(teacher, shape, "--init_from", source, *STILL).ok().out
    statuses = {entry["status"] for entry in report_of(tmp_path / "out")["student"].values()}
    assert statuses == {"exact"}


def test_what_does_not_fit_is_refused_with_both_shapes_and_a_run_does_not_start_from_itself(train, teachers, tmp_path):
    small = tmp_path / "small"
    train(teachers.one, PRUNED_CONFIG, *STILL, output_dir=small).ok()
    larger = train(teachers.one, IDENTITY_CONFIG, "--init_from", small, *STILL)
    assert larger.code == 2 and "hidden_size 12, depth 2" in larger.err and "hidden_size 24, depth 3" in larger.err
    itself = train(teachers.one, PRUNED_CONFIG, "--init_from", small, *STILL, "--overwrite", output_dir=small)
    assert itself.code == 2 and "--init_from: is the folder that this run writes to" in itself.err
    nowhere = train(teachers.one, PRUNED_CONFIG, "--init_from", tmp_path / "nowhere", *STILL)
    assert nowhere.code == 2 and "there is no such file or folder" in nowhere.err
    lite = IDENTITY_CONFIG | {"block": "lite", "patch_size": 1, "ffn_dim": 96, "freq_dim": 24}
    assert "starts from random values" in train(teachers.one, lite, "--init_from", small, *STILL).err
