"""A run with LoRAs in its teacher, as a person types it: what the student learns, records and may be resumed with."""

import json
import shutil
from hashlib import sha256

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

import export_student
import generate_images
import projection_mapper
from support.loras import comfyui_keys, kohya_keys, merged, random_pairs, write
from support.runs import PRUNED_CONFIG, weights_of
from support.students import train_student, write_teacher


@pytest.fixture(scope="module")
def loras(teachers, tmp_path_factory):
    """LoRAs for the experts of `teachers.two`, and that Wan with them merged by definition."""
    folder = tmp_path_factory.mktemp("loras")
    shutil.copytree(teachers.two, folder / "merged")
    for name, part, seed in (("high", "transformer", 1), ("low", "transformer_2", 2)):
        model = WanTransformer3DModel.from_pretrained(teachers.two / part)
        pairs = random_pairs(model, seed=seed)
        write(folder / f"{name}.safetensors", kohya_keys(pairs, alpha=1.5))
        model.load_state_dict(merged(model, pairs, 0.5, scale=0.8))
        model.save_pretrained(folder / "merged" / part)
    return folder


def lora_flags(loras):
    high, low = (f"{loras / name}.safetensors:0.8" for name in ("high", "low"))
    return ["--teacher_lora", high, "--teacher_lora_low", low]


TWO_STEPS = ["--max_steps", 2, "--batch_size", 2]


def test_a_student_learns_what_it_learns_from_a_teacher_merged_beforehand(train, teachers, loras, tmp_path):
    """Weights after two steps are those of a run whose Wan on disk has the LoRAs in it, within the rounding of the sum."""
    plain = train(teachers.two, PRUNED_CONFIG, *TWO_STEPS, output_dir=tmp_path / "plain")
    with_loras = train(teachers.two, PRUNED_CONFIG, *TWO_STEPS, *lora_flags(loras), output_dir=tmp_path / "loras")
    before = train(loras / "merged", PRUNED_CONFIG, *TWO_STEPS, output_dir=tmp_path / "merged")
    assert plain.code == with_loras.code == before.code == 0, with_loras.err
    actual, expected, other = (weights_of(tmp_path / name) for name in ("loras", "merged", "plain"))
    assert all(torch.allclose(actual[name], expected[name], atol=2e-5) for name in expected)
    assert not all(torch.allclose(actual[name], other[name], atol=1e-3) for name in other)
    assert "high.safetensors at scale 0.8, 30 of" in with_loras.out and "of the low-noise expert" in with_loras.out


def test_the_record_names_the_loras_and_what_is_published_tells_no_path(train, run_main, teachers, loras, tmp_path):
    train(teachers.two, PRUNED_CONFIG, *TWO_STEPS, *lora_flags(loras)).ok()
    text = (tmp_path / "out" / "student_config.json").read_text(encoding="utf-8")
    high, low = json.loads(text)["distillation"]["teacher_loras"]
    file = loras / "high.safetensors"
    expected = {"expert": "high", "file": "high.safetensors", "sha256": sha256(file.read_bytes()).hexdigest()}
    assert high == expected | {"scale": 0.8, "path": str(file)} and low["expert"] == "low"
    export = ["--student", tmp_path / "out", "--format", "diffusers", "--output", tmp_path / "export"]
    run_main(export_student.main, *export).ok()
    everything = b"".join(path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file())
    assert high["sha256"].encode() in everything and str(loras).encode() not in everything


def test_a_run_resumes_with_the_same_loras_alone_and_bit_for_bit(train, teachers, loras, tmp_path):
    """Their scales count and their contents, not the names of their files."""
    shutil.copy(loras / "high.safetensors", tmp_path / "renamed.safetensors")
    high, low = lora_flags(loras)[:2], lora_flags(loras)[2:]
    # Nothing of these depends on how long the run is:
    own = ["--batch_size", 2, "--save_every", 1, "--lr_scheduler", "constant", "--lr_warmup_steps", 0, "--lr", 1e-3]
    own += ["--feature_loss_weight", 0, "--replay", 1, "--eval_every", 0]
    train(teachers.two, PRUNED_CONFIG, *own, "--max_steps", 2, *high, *low).ok()
    for other in ([], high, [high[0], f"{loras / 'high.safetensors'}:0.7", *low], [high[0], low[1], *low]):
        outcome = train(teachers.two, PRUNED_CONFIG, *own, "--max_steps", 3, *other)
        assert outcome.code == 2 and "belongs to a run with" in outcome.err and "teacher_lora" in outcome.err
    renamed = [high[0], f"{tmp_path / 'renamed.safetensors'}:0.8", *low]
    assert "Resuming from step 2" in train(teachers.two, PRUNED_CONFIG, *own, "--max_steps", 3, *renamed).ok().out
    own += ["--max_steps", 3]
    train(teachers.two, PRUNED_CONFIG, *own, *high, *low, output_dir=tmp_path / "whole").ok()
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_lora_for_one_expert_of_two_alone_is_a_warning(train, teachers, loras):
    outcome = train(teachers.two, PRUNED_CONFIG, *TWO_STEPS, *lora_flags(loras)[:2])
    assert outcome.code == 0 and "Warning: the low-noise expert has no LoRA; --teacher_lora_low" in outcome.out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--teacher_lora", "none.safetensors"], "none.safetensors: there is no such file"),
        (["--teacher_lora", "a.safetensors:inf"], "must be a number other than 0"),
        (["--teacher_lora", ""], "is empty"),
    ],
)
def test_a_mistyped_lora_is_answered_before_anything_is_written(train, teachers, tmp_path, flags, words):
    train(teachers.one, PRUNED_CONFIG, *TWO_STEPS, *flags).refused(words)
    assert not (tmp_path / "out").exists()


def test_the_projection_mapper_takes_a_lora_too(run_main, write_config, teachers, tmp_path):
    model = WanTransformer3DModel.from_pretrained(teachers.one / "transformer")
    lora = write(tmp_path / "lora.safetensors", comfyui_keys(random_pairs(model)))
    config = write_config(PRUNED_CONFIG)
    teacher = ["--teacher_path", teachers.one, "--student_config", config, "--teacher_lora", f"{lora}:-0.5"]
    outcome = run_main(projection_mapper.main, *teacher, "--output_dir", tmp_path / "projected")
    assert outcome.code == 0 and "with the LoRA lora.safetensors at scale -0.5" in outcome.out


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """A student whose teacher, which paints, had a LoRA; and the LoRA's file."""
    root = tmp_path_factory.mktemp("drawing")
    teacher = write_teacher(root / "teacher")
    model = WanTransformer3DModel.from_pretrained(teacher / "transformer")
    lora = write(root / "lora.safetensors", comfyui_keys(random_pairs(model, size=1.0)))
    train_student(root, teacher, "--teacher_lora", f"{lora}:0.9", "--num_samples", "0")
    return root


def draw(run_main, root, output, *flags):
    return run_main(
        generate_images.main, "--student", root / "student", "--model", "teacher", "--prompt", "a red circle", "--device", "cpu",
        "--num_inference_steps", 2, "--prompt_cache", root / "cache", "--output", output, *flags,
    )  # fmt: skip


def picture(folder):
    return Image.open(next(folder.glob("*a-red-circle*.png"))).tobytes()


def test_the_recorded_teacher_draws_with_its_lora(run_main, drawing, tmp_path):
    """As a teacher whose file on disk has it merged does, and not as the one without."""
    shutil.copytree(drawing / "teacher", tmp_path / "merged")
    model = WanTransformer3DModel.from_pretrained(drawing / "teacher" / "transformer")
    pairs = random_pairs(model, size=1.0)
    model.load_state_dict(merged(model, pairs, scale=0.9))
    model.save_pretrained(tmp_path / "merged" / "transformer")
    bare = tmp_path / "bare"
    shutil.copytree(drawing / "student", bare / "student")
    config = json.loads((bare / "student" / "student_config.json").read_text())
    del config["distillation"]["teacher_loras"]
    (bare / "student" / "student_config.json").write_text(json.dumps(config))
    draw(run_main, drawing, tmp_path / "a").ok()
    for root, teacher, output in ((bare, tmp_path / "merged", "b"), (bare, drawing / "teacher", "c")):
        draw(run_main, root, tmp_path / output, "--teacher_path", teacher).ok()
    with_lora, as_merged, without = (np.frombuffer(picture(tmp_path / name), np.uint8).astype(int) for name in "abc")
    # A sum rounds otherwise on disk than in memory.
    assert abs(with_lora - as_merged).max() <= 1 < abs(with_lora - without).max()


def test_a_recorded_lora_that_is_gone_or_another_is_named_and_can_be_given(run_main, drawing, tmp_path):
    moved = tmp_path / "moved.safetensors"
    there = drawing / "lora.safetensors"
    shutil.move(there, moved)
    try:
        draw(run_main, drawing, tmp_path / "a").refused("is not there; give --teacher_lora lora.safetensors:0.9")
        assert "Warning" not in draw(run_main, drawing, tmp_path / "a", "--teacher_lora", f"{moved}:0.9").ok().out
        other = draw(run_main, drawing, tmp_path / "c", "--teacher_lora", f"{moved}:0.3").ok().out
        assert "these are not the LoRAs that this student's teacher had: --teacher_lora lora.safetensors:0.9" in other
        model = WanTransformer3DModel.from_pretrained(drawing / "teacher" / "transformer")
        write(there, comfyui_keys(random_pairs(model, seed=9)))
        draw(run_main, drawing, tmp_path / "b").refused("is another file than the LoRA")
    finally:
        shutil.move(moved, there)
