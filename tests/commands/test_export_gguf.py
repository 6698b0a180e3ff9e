"""export_student.py --format gguf writes what ComfyUI-GGUF's loader takes, and refuses what it would read wrong.

The gguf library reads the file back, diffusers' own reader of GGUF files answers as the student, and this trainer gets the student
back. ComfyUI-GGUF is no dependency: its rules are written down here apart from the code under test, and its loader was given such
files by hand (docs/export.md).
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import export_student
from support.runs import snapshot
from support.wan_folders import inputs, oracle_velocity, random_weights, relative_error, to_original
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.project import project_teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.settings import RELEASED_LATENTS

SHAPE = {"block": "wan", "hidden_size": 256, "depth": 2, "num_heads": 2, "ffn_dim": 96, "num_channels": 16}
SHAPE |= {"image_size": 64, "text_encoder_output_dim": 4096}
TYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0"}
MEAN, STD = RELEASED_LATENTS[16]
RECORD = {
    "teacher_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "base_model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "shift": 3.0,
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "negative_prompt": "",
    "vae_scale_factor": 8,
    "latents_mean": MEAN,
    "latents_std": STD,
    "data_path": "/home/someone/prompts.txt",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, WanLiteStudent]:
    folder = tmp_path_factory.mktemp("saved") / "student"
    student = WanLiteStudent(StudentConfig(**SHAPE, distillation=RECORD))
    random_weights(student, seed=3)
    student.save_pretrained(folder)
    return folder, student.eval()


@pytest.fixture
def export(run_main, tmp_path):
    def run(student: Path, *flags: object, output: str = "out"):
        argv = ["--student", student, "--format", "gguf", "--output", tmp_path / output, *flags]
        return run_main(export_student.main, *argv)

    return run


@pytest.mark.parametrize("dtype", TYPES)
def test_the_library_reads_the_types_that_are_claimed_and_the_student_comes_back_as_they_mean(
    saved, export, tmp_path, dtype
):
    folder, student = saved
    assert export(folder, "--dtype", dtype).code == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "wan_student.gguf")
    assert reader.get_field("general.architecture").contents() == "wan"
    stored = {tensor.name: tensor for tensor in reader.tensors}
    exact = {to_original(name): tensor for name, tensor in student.state_dict().items()}
    assert stored.keys() == exact.keys()
    coarsest = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "q8_0": 1 / 127, "q5_0": 1 / 15, "q4_0": 1 / 7}[dtype]
    for name, tensor in exact.items():
        is_linear = name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name
        is_other_matrix = name in ("text_embedding.0.weight", "text_embedding.2.weight", "head.head.weight")
        kind = TYPES[dtype] if is_linear else "F32"
        if is_other_matrix:
            kind = "F16" if dtype.startswith("q") else TYPES[dtype]
        assert stored[name].tensor_type.name == kind, name
        values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        if name == "patch_embedding.weight":
            assert values.shape == (256, 16, 1, 2, 2)
        off = np.abs(values.reshape(tensor.shape) - tensor.numpy())
        largest = np.abs(tensor.numpy()).max() if is_linear and dtype.startswith("q") else np.abs(tensor.numpy())
        assert (off <= (coarsest if kind != "F32" else 0) * largest + 1e-6).all(), name

    file = tmp_path / "out" / "wan_student.gguf"
    teacher = open_wan_files(file).experts["high"]
    assert not teacher.heads_are_assumed and teacher.config.num_heads == 2
    back, report = project_teacher(file)
    assert {entry["status"] for entry in report.student.values()} == {"exact"}
    given = inputs(text_dim=4096)
    with torch.no_grad():
        error = relative_error(back(*given), student(*given))
    most = {"fp32": 0, "bf16": 0.02, "fp16": 2e-3, "q8_0": 0.03, "q5_0": 0.25, "q4_0": 0.5}[dtype]
    assert error <= most and (error > 0) == (dtype != "fp32")


def test_comfyui_gguf_takes_the_file(saved, export, tmp_path):
    """The rules of its loader.py and convert.py, and of ComfyUI's model_detection.py, as they were read."""
    assert export(saved[0], "--dtype", "q4_0").code == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "wan_student.gguf")
    field = reader.get_field("general.architecture")
    assert field.types == [gguf.GGUFValueType.STRING] and str(bytes(field.parts[field.data[-1]]), "utf-8") == "wan"
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    assert {"blocks.0.self_attn.norm_q.weight", "text_embedding.2.weight", "head.modulation"} <= shapes.keys()
    assert shapes["head.modulation"] == (1, 2, 256)
    assert shapes["head.head.weight"][0] // 4 == shapes["patch_embedding.weight"][1] == 16
    assert shapes["blocks.0.ffn.0.weight"] == (96, 256)
    # Its own layers make numbers of Linear weights alone; what others hold must be numbers of torch's.
    linear = {name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2}
    for tensor in reader.tensors:
        assert tensor.name in linear or tensor.tensor_type.name in ("F32", "F16"), tensor.name
    assert max(map(len, shapes)) <= 127


def test_diffusers_reads_the_file_as_the_student(saved, export, tmp_path):
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    folder, _ = saved
    assert export(folder, "--dtype", "q8_0", output="a.gguf").code == 0
    argv = ["--student", str(folder), "--format", "diffusers", "--output", str(tmp_path / "config")]
    assert export_student.main(argv) == 0
    theirs = WanTransformer3DModel.from_single_file(
        str(tmp_path / "a.gguf"),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    back, _ = project_teacher(tmp_path / "a.gguf")
    given = inputs(text_dim=4096)
    with torch.no_grad():
        assert relative_error(back(*given), oracle_velocity(theirs, *given)) <= 1e-3  # it multiplies in float16


def test_what_the_file_carries(saved, export, tmp_path):
    outcome = export(saved[0], "--dtype", "q8_0")
    assert outcome.code == 0 and "In ComfyUI: Unet Loader (GGUF), ModelSamplingSD3 with shift 3" in outcome.out
    assert "Warning" not in outcome.out
    reader = gguf.GGUFReader(tmp_path / "out" / "wan_student.gguf")
    config = StudentConfig.from_json(reader.get_field("student_config").contents(), "metadata")
    assert config.distillation["shift"] == 3.0 and "data_path" not in config.distillation
    assert json.loads(reader.get_field("config").contents())["transformer"]["num_heads"] == 2
    wan_files = open_wan_files(tmp_path / "out" / "wan_student.gguf")
    assert wan_files.record["guidance_scale"] == 1.0 and wan_files.record["latents_mean"] == MEAN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 8}, "head_dim 32 (not 128)"),
        ({"patch_size": 1}, "patch_size 1"),
        ({"freq_dim": 128}, "freq_dim 128"),
        ({"eps": 1e-5}, "eps 1e-05 (not 1e-06)"),
    ],
)
def test_what_comfyui_would_read_wrong_is_refused(export, tmp_path, changes, message):
    WanLiteStudent(StudentConfig(**SHAPE | {"depth": 1} | changes)).save_pretrained(tmp_path / "student")
    before = snapshot(tmp_path)
    outcome = export(tmp_path / "student")
    assert outcome.code == 2 and message in outcome.err and "give --format original" in outcome.err
    assert outcome.err.count("\n") == 1 and len(outcome.err) < 500 + len(str(tmp_path))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "fp8"], "--format gguf has fp32, bf16, fp16, q8_0"),
        (["--format", "original", "--dtype", "q8_0"], "--format original has fp32, bf16, fp16, fp8; give"),
        (["--output", "{tmp}/is_there.gguf"], "is there already; give another name"),
    ],
)
def test_mistakes_are_answered_in_one_line(saved, export, tmp_path, flags, message):
    (tmp_path / "is_there.gguf").write_bytes(b"mine")
    outcome = export(saved[0], *[flag.format(tmp=tmp_path) for flag in flags])
    assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert (tmp_path / "is_there.gguf").read_bytes() == b"mine" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["out", "out.gguf"])
def test_without_the_library_nothing_is_written(saved, export, tmp_path, monkeypatch, output):
    monkeypatch.setitem(sys.modules, "gguf", None)
    outcome = export(saved[0], output=output)
    assert outcome.code == 2 and "pip install gguf" in outcome.err
    assert list(tmp_path.iterdir()) == []
