"""A LoRA of the teacher, cut for a student, is what the student's projection gains from a teacher with the LoRA in it.

Oracles: the projection of the merged teacher with the same selection, less that of the plain teacher; and diffusers, which loads
the written file onto the exported student and must answer as the student with the differences added to its weights.

pytest tests/projection/test_student_lora.py
"""

import json
import shutil

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

import projection_mapper
from support.loras import comfyui_keys, diffusers_keys, kohya_keys, random_differences, random_pairs, write
from support.wan_folders import (
    oracle_velocity,
    random_transformer,
    relative_error,
    to_original,
    with_weights,
    write_pipeline_folder,
    write_transformer_folder,
)
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.errors import UserError
from wandistiller.projection.lift import lift
from wandistiller.projection.lora import cut_loras
from wandistiller.projection.project import fresh_student, project_teacher
from wandistiller.projection.selection import select
from wandistiller.projection.selection_record import indices_of, ranges_of, read_made_of
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.lora import merge_loras, open_lora, shapes_of

TEACHER = {"heads": 4, "head_dim": 12, "layers": 5, "ffn_dim": 60, "channels": 16, "text_dim": 20}
CONFIG = StudentConfig(
    block="wan",
    hidden_size=24,
    depth=3,
    num_heads=2,
    ffn_dim=32,
    num_channels=16,
    image_size=64,
    text_encoder_output_dim=20,
)
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
    return open_lora(root / f"{name}.safetensors", scale, shapes_of(open_wan_files(root / "teacher").expert("high")))


def made_of(root):
    return read_made_of(root / "student", CONFIG)


def cut(run_main, root, output, name, *flags, scale=""):
    lora = f"{root / name}.safetensors{scale}"
    return run_main(projection_mapper.main, "--lora", lora, "--student", root / "student", "--output", output, *flags)


# ---- the cut ----


@pytest.mark.parametrize("name", ["products", "alphas", "biases", "differences"])
def test_the_cut_is_what_the_projection_gains_from_a_teacher_with_the_lora(places, name):
    """With the same selection; the student's own rows, columns, heads, neurons and layers, of every tensor that is changed."""
    wan_files = open_wan_files(places / "teacher")
    selection = select(wan_files.expert("high"), CONFIG)
    file = places / f"{name}.safetensors"
    plain = project_teacher(wan_files, CONFIG, selection=selection)[0].state_dict()
    changed = project_teacher(merge_loras(wan_files, [(file, 0.7)]), CONFIG, selection=selection)[0].state_dict()
    student_lora = cut_loras([lora_of(places, name, 0.7)], made_of(places).selection, CONFIG)
    lifted = lift({key: changed[key] - plain[key] for key in plain})
    moved = {key for key, gain in lifted.items() if gain.abs().max() > 1e-4}
    assert moved == set(student_lora.names())
    for key in moved:
        assert torch.allclose(student_lora.delta(key), lifted[key], atol=1e-6), key
    assert len(student_lora.dropped) > 0 and all(
        f"blocks.{layer}." in key for key, layer in _layers(student_lora.dropped)
    )


def _layers(names):
    kept = {0, 2, 4}
    layers = [(name, int(name.split(".")[1])) for name in names]
    assert not kept & {layer for _, layer in layers}
    return layers


def test_several_loras_add_up(places):
    selection = made_of(places).selection
    first, second = lora_of(places, "products", 0.5), lora_of(places, "differences", -1.0)
    both, one, other = (cut_loras(loras, selection, CONFIG) for loras in ([first, second], [first], [second]))
    for name in both.names():
        total = sum(part.delta(name) for part in (one, other) if name in part.names())
        assert torch.allclose(both.delta(name), total, atol=1e-6)


def test_what_was_selected_is_read_back_from_the_report(places):
    selection = select(open_wan_files(places / "teacher").expert("high"), CONFIG)
    read = made_of(places)
    assert read.selection.layers == selection.layers and read.selection.axes.keys() == selection.axes.keys()
    assert all(torch.equal(read.selection.axes[axis], kept) for axis, kept in selection.axes.items())
    assert read.teacher.hidden_size == 48 and read.teacher.depth == 5 and read.expert == "high"


@pytest.mark.parametrize("indices", [[0], [0, 1, 2], [1, 3, 4, 5, 9], list(range(0, 20, 2))])
def test_ranges_are_read_back_as_the_indices_they_stand_for(indices):
    assert indices_of(ranges_of(indices), 20).tolist() == indices


@pytest.mark.parametrize("text", ["", "3-1", "1,1", "0-99999", "2,1", "a", "1,", None, 7, "-1"])
def test_other_texts_are_no_ranges(text):
    assert indices_of(text, 20) is None


# ---- the file, in diffusers ----


def exported(root, config=CONFIG, folder="student"):
    """The student as diffusers' transformer, and its weights."""
    student = WanLiteStudent.from_pretrained(root / folder)
    tensors = lift(student.state_dict())
    transformer = WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, num_layers=config.depth,
        in_channels=16, out_channels=16, ffn_dim=config.ffn_dim, text_dim=20,
    )  # fmt: skip
    return with_weights(transformer, tensors), tensors


def inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 4, 6, generator=generator)
    return latents, torch.tensor([12.5, 987.6]), torch.randn(2, 9, 20, generator=generator)


@pytest.mark.parametrize("file_format", ["diffusers", "original"])
@pytest.mark.parametrize("name", ["products", "biases"])
def test_diffusers_loads_the_file_onto_the_exported_student(run_main, places, tmp_path, file_format, name):
    output = tmp_path / "student_lora.safetensors"
    outcome = cut(run_main, places, output, name, "--format", file_format, scale=":0.8")
    assert outcome.code == 0, outcome.err
    student_lora = cut_loras([lora_of(places, name, 0.8)], made_of(places).selection, CONFIG)
    transformer, tensors = exported(places)
    plain = oracle_velocity(transformer, *inputs())
    # Of a file with original names diffusers passes over the patch kernel, which ComfyUI reads:
    read = {key for key in student_lora.names() if file_format == "diffusers" or "patch_embedding" not in key}
    added = {key: tensor + student_lora.delta(key) if key in read else tensor for key, tensor in tensors.items()}
    expected = oracle_velocity(with_weights(transformer, added), *inputs())
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(), transformer=transformer
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name=output.name)
    assert relative_error(plain, expected) > 0.01
    assert relative_error(oracle_velocity(transformer, *inputs()), expected) < 1e-5


def test_differences_of_matrices_become_products_and_those_of_norms_are_named(run_main, places, tmp_path):
    """diffusers applies all but the norms and the tables, and the command says that these are left out."""
    output = tmp_path / "student_lora.safetensors"
    outcome = cut(run_main, places, output, "differences")
    assert outcome.code == 0 and "norms and modulation tables" in outcome.out and "--format original" in outcome.out
    student_lora = cut_loras([lora_of(places, "differences")], made_of(places).selection, CONFIG)
    transformer, tensors = exported(places)
    held = {key for key in tensors if not ("norm" in key or key.endswith("scale_shift_table"))}
    added = {key: tensor + student_lora.delta(key) if key in held else tensor for key, tensor in tensors.items()}
    expected = oracle_velocity(with_weights(transformer, added), *inputs())
    transformer.load_lora_adapter(str(tmp_path), weight_name=output.name)
    assert relative_error(oracle_velocity(transformer, *inputs()), expected) < 1e-5


def test_a_file_for_comfyui_holds_every_change_once_under_the_original_name(run_main, places, tmp_path):
    """As ComfyUI's comfy/lora.py reads it: a module's name with .lora_up, .lora_down, .diff or .diff_b; one of the first and the third."""
    output = tmp_path / "student_lora.safetensors"
    assert cut(run_main, places, output, "differences", "--format", "original").code == 0
    tensors = load_file(output)
    student_lora = cut_loras([lora_of(places, "differences")], made_of(places).selection, CONFIG)
    model, _ = exported(places)
    seen = set()
    for name in student_lora.names():
        original = f"diffusion_model.{to_original(name)}"
        stem = original.removesuffix(".weight").removesuffix(".bias")
        if name.endswith(".bias"):
            found = tensors[f"{stem}.diff_b"]
            seen.add(f"{stem}.diff_b")
        elif f"{stem}.diff" in tensors:
            found = tensors[f"{stem}.diff"]
            seen.add(f"{stem}.diff")
            assert f"{stem}.lora_up.weight" not in tensors
        else:
            found = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
            seen |= {f"{stem}.lora_up.weight", f"{stem}.lora_down.weight"}
        assert torch.allclose(found, student_lora.delta(name), atol=1e-6), name
    assert seen == set(tensors) and len(student_lora.names()) == len(model.state_dict())
    pipeline = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(), transformer=model
    )
    pipeline.load_lora_weights(str(tmp_path), weight_name=output.name)  # diffusers passes over what it has no place for


def test_a_lora_for_the_teachers_own_shape_is_the_lora(run_main, places, tmp_path):
    teacher = places / "teacher"
    student, report = project_teacher(teacher)
    student.save_pretrained(tmp_path / "student")
    report.save(tmp_path / "student")
    output = tmp_path / "lora.safetensors"
    lora = places / "products.safetensors"
    assert (
        run_main(projection_mapper.main, "--lora", lora, "--student", tmp_path / "student", "--output", output).code
        == 0
    )
    again = open_lora(output, 1.0, shapes_of(open_wan_files(teacher).expert("high")))
    expected = lora_of(places, "products")
    for name, shape in expected.shapes.items():
        zeros = torch.zeros(shape)
        assert torch.allclose(again.added_to(name, zeros), expected.added_to(name, zeros), atol=1e-6)


# ---- what is refused ----


def damaged_report(root, folder, change):
    shutil.copytree(root / "student", folder)
    path = folder / "projection_report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return folder


REPORTS = {
    "no selection": (lambda report: report.pop("selection"), "copy the student's files again"),
    "no layers": (lambda report: report.update(layers="0,2,4"), "copy the student's files again"),
    "other layers": (lambda report: report.update(layers=[0, 2, 9]), "copy the student's files again"),
    "an axis too few": (lambda report: report["selection"]["axes"].pop("channels"), "copy the student's files again"),
    "an axis beyond": (
        lambda report: report["selection"]["axes"].update(channels="30-53"),
        "copy the student's files again",
    ),
    "no teacher": (lambda report: report["selection"].pop("teacher"), "copy the student's files again"),
    "another teacher": (
        lambda report: report["selection"]["teacher"].update(hidden_size=12, num_heads=1),
        "copy the student's",
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_does_not_tell_is_refused(run_main, places, tmp_path, name):
    change, words = REPORTS[name]
    folder = damaged_report(places, tmp_path / "student", change)
    lora = places / "products.safetensors"
    outcome = run_main(
        projection_mapper.main, "--lora", lora, "--student", folder, "--output", tmp_path / "a.safetensors"
    )
    assert outcome.code == 2 and words in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "a.safetensors").exists()


def test_students_that_no_lora_fits_are_refused(places, tmp_path):
    lite = StudentConfig(
        block="lite", hidden_size=24, depth=2, num_heads=2, num_channels=16, image_size=64, text_encoder_output_dim=20
    )
    for config, make, words in (
        (lite, project_teacher, 'block "lite"'),
        (CONFIG, fresh_student, "inherited nothing"),
    ):
        make(places / "teacher", config)[1].save(tmp_path)
        with pytest.raises(UserError, match=words):
            read_made_of(tmp_path, config)
    with pytest.raises(UserError, match="is not there"):
        read_made_of(tmp_path / "none", CONFIG)


def test_a_lora_of_dropped_layers_alone_a_file_that_is_there_and_other_flags_are_refused(run_main, places, tmp_path):
    model = random_transformer(**TEACHER)
    dropped = write(tmp_path / "dropped.safetensors", diffusers_keys(random_pairs(model, ["blocks.1.attn1.to_q"])))
    student, there = ["--student", places / "student"], tmp_path / "there.safetensors"
    there.write_bytes(b"mine")
    lora, new = ["--lora", places / "products.safetensors"], ["--output", tmp_path / "new.safetensors"]
    for argv, words in (
        ([*student, *new, "--lora", dropped], "changes only layers"),
        ([*student, *lora, "--output", there], "is there already"),
        ([*student, *lora, "--output", tmp_path / "new.bin"], "ends in .safetensors"),
        ([*student, *lora, *new, "--output_dir", tmp_path / "x"], "--output_dir: makes a student"),
        ([*student, *lora], "required: --output"),
        (["--teacher_path", "mock", "--output_dir", tmp_path / "x", *student], "--student: belongs to --lora"),
        ([*student, *new, "--lora", f"{lora[1]}:nan"], "must be a number other than 0"),
        ([*student, *new, "--lora", f"{lora[1]}:0"], "must be a number other than 0"),
    ):
        outcome = run_main(projection_mapper.main, *argv)
        assert outcome.code == 2 and words in outcome.err and "Traceback" not in outcome.err, outcome.err
    assert there.read_bytes() == b"mine" and not (tmp_path / "new.safetensors").exists()


def test_the_low_noise_expert_of_two_is_what_a_lora_of_it_is_cut_from(run_main, tmp_path):
    write_pipeline_folder(tmp_path / "two", two_experts=True, **TEACHER)
    student, report = project_teacher(tmp_path / "two", CONFIG, "low")
    student.save_pretrained(tmp_path / "student")
    report.save(tmp_path / "student")
    assert read_made_of(tmp_path / "student", CONFIG).expert == "low"
