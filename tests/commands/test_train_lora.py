"""--train lora: the student stays as it is, and a LoRA learns what a LoRA of its teacher changes.

Oracles: the teacher's LoRA cut for the student, which training begins with; and diffusers, which loads the
written file onto the exported student of before and must answer as the student that the run has saved.
"""

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import export_student
from support.loras import comfyui_keys, diffusers_keys, random_differences, random_pairs, write
from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG, as_if_stopped_after, read_metrics, same_weights, weights_of
from support.wan_folders import oracle_velocity, relative_error, write_pipeline_folder
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.projection.lora import cut_loras, write_lora
from wandistiller.projection.selection_record import read_made_of
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.lora import open_lora

STILL = ("--max_steps", 1, "--lr", 1e-12, "--ema_decay", 0)


@pytest.fixture
def source(train, teachers, tmp_path):
    """A student of two steps, and LoRAs of its teacher: rank 3, and the same with a difference of a bias."""
    folder = tmp_path / "source"
    train(teachers.one, PRUNED_CONFIG, "--student_steps", 2, "--max_steps", 3, output_dir=folder).ok()
    model = WanTransformer3DModel.from_pretrained(teachers.one, subfolder="transformer")
    pairs = random_pairs(model)
    (tmp_path / "loras").mkdir()
    write(tmp_path / "loras" / "style.safetensors", diffusers_keys(pairs))
    bias = random_differences(model, ["blocks.0.ffn.net.2.bias"])
    write(tmp_path / "loras" / "other.safetensors", comfyui_keys(random_pairs(model, seed=3), differences=bias))
    return folder


@pytest.fixture
def train_lora(train, teachers, source, tmp_path):
    def run(*flags: object, output: str = "out", lora: str = "loras/style.safetensors"):
        return train(
            teachers.one, PRUNED_CONFIG, "--student_steps", 2, "--train", "lora", "--init_from", source,
            "--teacher_lora", tmp_path / lora, *flags, output_dir=tmp_path / output,
        )  # fmt: skip

    return run


def test_it_begins_with_the_cut_of_the_teachers_lora_whatever_its_rank_and_alpha(
    train_lora, source, teachers, tmp_path
):
    cut, config = tmp_path / "cut.safetensors", StudentConfig.load(source)
    shapes = open_wan_files(teachers.one).expert("high").shapes
    lora = open_lora(tmp_path / "loras" / "style.safetensors", 1.0, shapes)
    write_lora(cut_loras([lora], read_made_of(source, config)[1], config), cut, "diffusers")
    for name, flags in (
        ("padded", ("--lora_alpha", 4)),
        ("exact", ("--lora_rank", 3)),
        ("truncated", ("--lora_rank", 1)),
    ):
        train_lora(*flags, *STILL, output=name).ok()
        found, expected = load_file(tmp_path / name / "lora.safetensors"), load_file(cut)
        assert found.keys() == expected.keys()
        for key in (key for key in expected if key.endswith("lora_A.weight")):
            change, whole = (tensors[key.replace("lora_A", "lora_B")] @ tensors[key] for tensors in (found, expected))
            nearest = whole
            if name == "truncated":
                u, s, vh = torch.linalg.svd(whole)
                nearest = s[0] * u[:, :1] @ vh[:1]
            assert torch.allclose(change, nearest, atol=1e-5)


@pytest.mark.parametrize("lora", ["style", "other"])
def test_diffusers_answers_with_the_file_as_the_student_that_was_saved(train_lora, source, run_main, tmp_path, lora):
    done = train_lora("--max_steps", 4, lora=f"loras/{lora}.safetensors").ok()
    assert ("begins without what changes no matrix of a block (1, such as blocks.0.ffn.net.2.bias)" in done.out) == (
        lora == "other"
    )
    before, after = weights_of(source), weights_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 20 and all(name.startswith("blocks.") and name.endswith(".weight") for name in changed)
    exported = tmp_path / "exported"
    run_main(export_student.main, "--student", source, "--format", "diffusers", "--output", exported).ok()
    model = WanTransformer3DModel.from_pretrained(exported)
    model.load_lora_adapter(load_file(tmp_path / "out" / "lora.safetensors"), prefix="transformer")
    student = WanLiteStudent.from_pretrained(tmp_path / "out")
    inputs = torch.randn(2, 16, 4, 4), torch.tensor([900.0, 300.0]), torch.randn(2, 512, 20)
    with torch.no_grad():
        assert relative_error(oracle_velocity(model, *inputs), student(*inputs)) < 1e-5
    # ComfyUI's file holds the same products:
    ours, theirs = (load_file(tmp_path / "out" / name) for name in ("lora.safetensors", "lora_comfyui.safetensors"))
    assert sorted(float(one.sum()) for one in ours.values()) == sorted(float(one.sum()) for one in theirs.values())


def test_the_student_is_sampled_as_it_was_trained(train_lora, source, tmp_path):
    config = StudentConfig.load(source)
    record = config.distillation | {"shift": 12.0, "guidance_scale": 6.0, "image_sizes": ["32x48"]}
    (source / "student_config.json").write_text(config.replace(distillation=record).to_json())
    train_lora(*STILL).ok()
    found = StudentConfig.load(tmp_path / "out").distillation
    assert (found["shift"], found["guidance_scale"], found["image_sizes"]) == (12.0, 6.0, ["32x48"])
    train_lora(*STILL, "--shift", 3, output="other").refused("draws at shift 12; leave it out")


def test_the_steps_are_the_students_and_the_teachers_calls_are_counted(train_lora, tmp_path):
    train_lora("--teacher_calls", 20, "--teacher_steps", 10).ok()
    lines, record = read_metrics(tmp_path / "out"), StudentConfig.load(tmp_path / "out").distillation
    assert record["student_steps"] == 2 and record["train"] == "lora" and record["lora_rank"] == 16
    # Each answer is a segment of five of the teacher's steps:
    assert len(lines) == 20 // 5 * record["replay"] and lines[-1]["teacher_calls"] == 20
    assert {line["stage"] for line in lines} == {2}


def test_a_stopped_run_goes_on_bit_for_bit(train_lora, tmp_path):
    flags = ("--max_steps", 4, "--save_every", 2, "--keep_checkpoints", 9)
    train_lora(*flags, output="whole").ok()
    train_lora(*flags, output="stopped").ok()
    as_if_stopped_after(tmp_path / "stopped", 2)
    assert "Resuming from step 2" in train_lora(*flags, output="stopped").ok().out
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    train_lora("--lora_rank", 4, *flags, output="stopped").refused()


def test_a_folder_of_loras_makes_a_student_and_a_lora_of_each(train_lora, tmp_path):
    train_lora("--max_steps", 1, lora="loras").ok()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"style", "other"}
    assert not same_weights(tmp_path / "out" / "style", tmp_path / "out" / "other")


def test_a_student_that_is_its_teacher_has_nothing_to_learn_beyond_the_cut(train, teachers, tmp_path):
    write_pipeline_folder(tmp_path / "teacher")
    model = WanTransformer3DModel.from_pretrained(tmp_path / "teacher", subfolder="transformer")
    write(tmp_path / "lora.safetensors", diffusers_keys(random_pairs(model)))
    train(tmp_path / "teacher", IDENTITY_CONFIG, *STILL, output_dir=tmp_path / "same").ok()
    flags = ["--train", "lora", "--init_from", tmp_path / "same", "--max_steps", 2, "--guidance_scale", 1]
    train(tmp_path / "teacher", IDENTITY_CONFIG, *flags, "--teacher_lora", tmp_path / "lora.safetensors").ok()
    assert read_metrics(tmp_path / "out")[0]["loss"] < 1e-9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--student_steps", 3), "draws in 2 steps"),
        (("--init_from", "teacher"), "give its folder as --init_from"),
        (("--teacher_cache", "cache"), "leave it out"),
        (("--sigma_range", 0.2, 1, "--student_steps", "none"), "draws in 2 steps"),
        (("--teacher_steps", 5, "--teacher_sampler", "euler"), "does not divide the teacher's 5 steps"),
        (("--train", "student", "--lora_rank", 4), "is for --train lora"),
    ],
)
def test_what_does_not_go_with_it_is_refused(train_lora, flags, message):
    train_lora(*flags).refused(message)


def test_it_is_of_a_trained_student_alone(train, teachers):
    train(teachers.one, IDENTITY_CONFIG, "--train", "lora", "--init_from", teachers.one).refused("student")
