"""A LoRA of the teacher, cut for a student, is what the student's projection gains from a teacher with the LoRA in it.

Oracles: the projection of the merged teacher with the same selection, less that of the plain teacher; and diffusers, which loads
the written file onto the exported student and must answer as the student with the differences added to its weights.
"""

import json
import shutil

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from support.loras import comfyui_keys, kohya_keys, random_differences, random_pairs, write
from support.wan_folders import (
    inputs,
    oracle_velocity,
    relative_error,
    to_original,
    with_weights,
    write_pipeline_folder,
    write_transformer_folder,
)
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.errors import UserError
from wandistiller.projection.exports import lift
from wandistiller.projection.lora import cut_loras, write_lora
from wandistiller.projection.project import fresh_student, project_teacher
from wandistiller.projection.selection import select
from wandistiller.projection.selection_record import read_made_of
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.lora import open_lora
from wandistiller.wan.wan_files import merge_loras

TEACHER = {"heads": 4, "head_dim": 12, "layers": 5, "ffn_dim": 60, "channels": 16, "text_dim": 20}
SHAPE = {"hidden_size": 24, "depth": 3, "num_heads": 2, "num_channels": 16, "image_size": 64}
CONFIG = StudentConfig(block="wan", ffn_dim=32, text_encoder_output_dim=20, **SHAPE)
OUTSIDE = ["condition_embedder.time_proj", "condition_embedder.text_embedder.linear_2", "proj_out"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A teacher, a student of it, and LoRAs of products, of biases too, and of differences of every tensor there is."""
    root = tmp_path_factory.mktemp("places")
    model = write_transformer_folder(root / "teacher", **TEACHER)
    student, report = project_teacher(root / "teacher", CONFIG)
    student.save_pretrained(root / "student")
    report.save(root / "student")
    pairs = random_pairs(model) | random_pairs(model, OUTSIDE, seed=5)
    everything = random_differences(model, [name for name, _ in model.named_parameters()])
    biases = {name: value for name, value in everything.items() if "norm" not in name and name.endswith("bias")}
    write(root / "products.safetensors", comfyui_keys(pairs))
    write(root / "alphas.safetensors", kohya_keys(random_pairs(model, seed=2), alpha=1.5))
    write(root / "biases.safetensors", comfyui_keys(pairs, differences=biases))
    write(root / "differences.safetensors", comfyui_keys({}, differences=everything))
    return root


def lora_of(root, name, scale=1.0):
    return open_lora(root / f"{name}.safetensors", scale, open_wan_files(root / "teacher").expert("high").shapes)


def selection_of(root):
    return read_made_of(root / "student", CONFIG)[1]


def write_cut(places, folder, name, file_format, scale=1.0):
    """Cut one of the LoRAs; the file is `student_lora.safetensors` in the test's folder."""
    student_lora = cut_loras([lora_of(places, name, scale)], selection_of(places), CONFIG)
    write_lora(student_lora, folder / "student_lora.safetensors", file_format)
    return student_lora


# ---- the cut ----


@pytest.mark.parametrize("name", ["products", "alphas", "biases", "differences"])
def test_the_cut_is_what_the_projection_gains_from_a_teacher_with_the_lora(places, name):
    """With the same selection; the student's own rows, columns, heads, neurons and layers, of every tensor that is changed."""
    wan_files = open_wan_files(places / "teacher")
    selection = select(wan_files.expert("high"), CONFIG)
    file = places / f"{name}.safetensors"
    plain = project_teacher(wan_files, CONFIG, selection=selection)[0].state_dict()
    changed = project_teacher(merge_loras(wan_files, [(file, 0.7)]), CONFIG, selection=selection)[0].state_dict()
    student_lora = cut_loras([lora_of(places, name, 0.7)], selection_of(places), CONFIG)
    lifted = lift({key: changed[key] - plain[key] for key in plain})
    moved = {key for key, gain in lifted.items() if gain.abs().max() > 1e-4}
    assert moved == set(student_lora.names())
    for key in moved:
        assert torch.allclose(student_lora.delta(key), lifted[key], atol=1e-6), key
    assert {int(key.split(".")[1]) for key in student_lora.dropped} == {1, 3}  # layers that the student does not have


def test_several_loras_add_up(places):
    selection = selection_of(places)
    first, second = lora_of(places, "products", 0.5), lora_of(places, "differences", -1.0)
    both, one, other = (cut_loras(loras, selection, CONFIG) for loras in ([first, second], [first], [second]))
    for name in both.names():
        total = sum(part.delta(name) for part in (one, other) if name in part.names())
        assert torch.allclose(both.delta(name), total, atol=1e-6)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_selection_is_read_back_from_the_report(tmp_path, expert):
    write_pipeline_folder(tmp_path / "two", two_experts=True, **TEACHER)
    project_teacher(tmp_path / "two", CONFIG, expert)[1].save(tmp_path)
    selection = select(open_wan_files(tmp_path / "two").expert(expert), CONFIG)
    teacher, read = read_made_of(tmp_path, CONFIG)
    assert read.layers == selection.layers and read.axes.keys() == selection.axes.keys()
    assert all(torch.equal(read.axes[axis], kept) for axis, kept in selection.axes.items())
    assert (teacher.hidden_size, teacher.depth) == (48, 5)


# ---- the file, in diffusers ----


@pytest.fixture
def transformer(places):
    """The student as diffusers' transformer."""
    student = WanLiteStudent.from_pretrained(places / "student")
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=3, in_channels=16, out_channels=16, ffn_dim=32, text_dim=20,
    )  # fmt: skip
    return with_weights(transformer, lift(student.state_dict()))


@pytest.mark.parametrize(
    "name, file_format, skipped",
    [
        ("products", "diffusers", []),
        ("biases", "diffusers", ["bias"]),
        ("products", "original", ["patch_embedding"]),  # which ComfyUI reads
    ],
)
def test_diffusers_loads_the_file_onto_the_exported_student(places, transformer, tmp_path, name, file_format, skipped):
    """It then answers as the student with the changes added to its weights, but for the tensors that diffusers skips."""
    student_lora = write_cut(places, tmp_path, name, file_format, 0.8)
    tensors = {key: tensor.clone() for key, tensor in transformer.state_dict().items()}
    plain = oracle_velocity(transformer, *inputs())
    added = {
        key: tensor + student_lora.delta(key)
        if key in student_lora.names() and not any(part in key for part in skipped)
        else tensor
        for key, tensor in tensors.items()
    }
    expected = oracle_velocity(with_weights(transformer, added), *inputs())
    with_weights(transformer, tensors)
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(), transformer=transformer
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name="student_lora.safetensors")
    assert relative_error(plain, expected) > 0.01
    assert relative_error(oracle_velocity(transformer, *inputs()), expected) < 1e-5


def test_a_file_for_comfyui_holds_every_change_once_under_the_original_name(places, transformer, tmp_path):
    """As ComfyUI's comfy/lora.py reads it: a module's name with .lora_up, .lora_down, .diff or .diff_b; one of the first and the third."""
    student_lora = write_cut(places, tmp_path, "differences", "original")
    tensors = load_file(tmp_path / "student_lora.safetensors")
    seen = set()
    for name in student_lora.names():
        original = f"diffusion_model.{to_original(name)}"
        stem = original.removesuffix(".weight").removesuffix(".bias")
        parts = [f"{stem}.diff_b"] if name.endswith(".bias") else [f"{stem}.diff"]
        if parts[0] not in tensors:
            parts = [f"{stem}.lora_up.weight", f"{stem}.lora_down.weight"]
        found = tensors[parts[0]] if len(parts) == 1 else tensors[parts[0]] @ tensors[parts[1]]
        assert torch.allclose(found, student_lora.delta(name), atol=1e-6), name
        seen.update(parts)
    assert seen == set(tensors) and len(student_lora.names()) == len(transformer.state_dict())


# ---- what is refused ----


REPORTS = {
    "no selection": lambda report: report.pop("selection"),
    "no layers": lambda report: report.update(layers="0,2,4"),
    "other layers": lambda report: report.update(layers=[0, 2, 9]),
    "an axis too few": lambda report: report["selection"]["axes"].pop("channels"),
    **{
        f"channels {text!r}": lambda report, text=text: report["selection"]["axes"].update(channels=text)
        for text in ("30-53", "0-23,0-23", "23-0", "1,1-23", "2,1,3-24", "0-9999999", "a", "0-23,", "", 7, None)
    },
    "another teacher": lambda report: report["selection"]["teacher"].update(hidden_size=12, num_heads=1),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_does_not_tell_is_refused(places, tmp_path, name):
    folder = shutil.copytree(places / "student", tmp_path / "student")
    report = json.loads((folder / "projection_report.json").read_text())
    REPORTS[name](report)
    (folder / "projection_report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="copy the student's files again"):
        read_made_of(folder, CONFIG)


def test_students_that_no_lora_fits_are_refused(places, tmp_path):
    lite = StudentConfig(block="lite", text_encoder_output_dim=20, **SHAPE)
    for config, make, words in ((lite, project_teacher, 'block "lite"'), (CONFIG, fresh_student, "inherited nothing")):
        make(places / "teacher", config)[1].save(tmp_path)
        with pytest.raises(UserError, match=words):
            read_made_of(tmp_path, config)
    with pytest.raises(UserError, match=r"cannot be read .*copy it too"):
        read_made_of(tmp_path / "none", CONFIG)
