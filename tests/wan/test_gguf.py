"""A Wan in a GGUF file is read as what the gguf library makes of it, and what is no such file is refused in one message.

The oracle is the library's own dequantisation in diffusers' 3D transformer at one frame, and diffusers' own reader of GGUF files.

pytest tests/wan/test_gguf.py
"""

import json
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import projection_mapper
import train_distillation
from support.gguf_files import SHAPE, write_wan_gguf
from support.layout_checks import MAX_ERROR, assert_exact, inputs, refusal
from support.loras import comfyui_keys, merged, random_pairs, write
from support.students import STUDENT, write_teacher
from support.wan_folders import oracle_velocity, relative_error, with_weights, write_single_file
from wandistiller.command_line import run_command
from wandistiller.projection.project import project_teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.lora import merge_loras

KERNEL = "patch_embedding.weight"
HALF = {"heads": 1}


def assert_same_as_diffusers(path: Path, expert, name: str = "high", **arguments) -> None:
    assert_exact(*project_teacher(open_wan_files(path, **arguments), expert=name), expert)


@pytest.mark.parametrize(
    "dtype",
    ["Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_XS", "F16", "BF16", "F32"],
)
def test_every_type_equals_diffusers_with_what_the_library_makes_of_it(tmp_path, dtype):
    expert = write_wan_gguf(tmp_path / "wan.gguf", dtype=dtype)
    assert_same_as_diffusers(tmp_path / "wan.gguf", expert)


def test_a_lora_is_added_to_what_the_quantised_weights_stand_for(tmp_path):
    expert = write_wan_gguf(tmp_path / "wan.gguf", dtype="Q4_K")
    pairs = random_pairs(expert)
    lora = write(tmp_path / "lora.safetensors", comfyui_keys(pairs))
    changed = with_weights(expert, merged(expert, pairs, scale=0.7))
    model, _ = project_teacher(merge_loras(open_wan_files(tmp_path / "wan.gguf"), [(lora, 0.7)]))
    given = inputs(model.config)
    with torch.no_grad():
        answer, expected, plain = model(*given), oracle_velocity(changed, *given), oracle_velocity(expert, *given)
    assert relative_error(plain, expected) > 0.01 and relative_error(answer, expected) <= MAX_ERROR


def test_diffusers_own_reader_reads_the_same(tmp_path):
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    expert = write_wan_gguf(tmp_path / "wan.gguf", dtype="Q8_0")
    expert.save_config(tmp_path / "config")
    theirs = WanTransformer3DModel.from_single_file(
        str(tmp_path / "wan.gguf"),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert any("GGUF" in type(module).__name__ for module in theirs.modules())
    ours, _ = project_teacher(tmp_path / "wan.gguf")
    given = inputs(ours.config)
    with torch.no_grad():  # diffusers multiplies scales and values in float16, which rounds each weight
        assert relative_error(ours(*given), oracle_velocity(theirs, *given)) <= 1e-3


def test_plain_types_are_read_in_their_own_precision(tmp_path):
    write_wan_gguf(tmp_path / "wan.gguf", dtype="BF16", **HALF)
    transformer = open_wan_files(tmp_path / "wan.gguf").experts["high"]
    assert transformer.read("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16
    assert transformer.read("proj_out.weight").dtype == torch.float16
    assert transformer.read("blocks.0.attn1.to_q.bias").dtype == torch.float32


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("architecture", ["wan", "pig", None])
def test_prefix_and_converters_that_name_themselves(tmp_path, prefix, architecture):
    expert = write_wan_gguf(tmp_path / "wan.gguf", prefix=prefix, architecture=architecture, **HALF)
    assert_same_as_diffusers(tmp_path / "wan.gguf", expert)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("shapes", "noted"),
    [
        ({KERNEL: (128, 16, 2, 2)}, None),
        ({KERNEL: (128 * 16, 1, 2, 2)}, None),
        ({"blocks.0.modulation": (6, 128), "head.modulation": (2, 128)}, None),
        ({KERNEL: (32, 256)}, {KERNEL: (128, 16, 1, 2, 2)}),
    ],
    ids=["no frame", "channels in one", "no leading 1", "rearranged"],
)
def test_dimensions_that_converters_drop_come_back(tmp_path, prefix, shapes, noted):
    path = tmp_path / "wan.gguf"
    expert = write_wan_gguf(path, shapes=shapes, noted_shapes=noted, prefix=prefix, **HALF)
    assert_same_as_diffusers(path, expert)


def test_two_files_are_the_two_experts(tmp_path):
    high, low = tmp_path / "HighNoise" / "wan-Q8_0.gguf", tmp_path / "LowNoise" / "wan-Q4_0.gguf"
    for path in (high, low):
        path.parent.mkdir()
    experts = {
        "high": write_wan_gguf(high, dtype="Q8_0", seed=1, **HALF),
        "low": write_wan_gguf(low, dtype="Q4_0", seed=2, **HALF),
    }
    for name, expert in experts.items():
        assert_same_as_diffusers(high, expert, name, low_noise_path=low)
    message = refusal(tmp_path)
    assert "GGUF files: give one of them by its name" in message and str(high) in message
    assert "--teacher_path_low" in message


def test_safetensors_and_gguf_may_be_the_two_experts(tmp_path):
    expert = write_wan_gguf(tmp_path / "high.gguf", **HALF)
    low = write_single_file(tmp_path / "low.safetensors", **SHAPE | HALF)
    assert_same_as_diffusers(tmp_path / "high.gguf", expert, low_noise_path=tmp_path / "low.safetensors")
    assert_same_as_diffusers(tmp_path / "high.gguf", low, "low", low_noise_path=tmp_path / "low.safetensors")


def test_opening_reads_no_weights_and_one_tensor_is_read_at_a_time(tmp_path, monkeypatch):
    write_wan_gguf(tmp_path / "wan.gguf", **HALF)
    made = []
    dequantize = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: made.append(data.size) or dequantize(data, kind))
    transformer = open_wan_files(tmp_path / "wan.gguf").experts["high"]
    assert set(made) == {34}  # single blocks of zeros, to know that the type can be read
    made.clear()
    tensor = transformer.read("blocks.0.ffn.net.0.proj.weight")
    assert sum(made) == tensor.numel() // 32 * 34


# ---- through the commands ----


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A GGUF of a Wan, and a pipeline folder whose VAE and text encoder go with it."""
    root = tmp_path_factory.mktemp("teacher")
    write_teacher(root / "parts")
    write_wan_gguf(root / "wan.gguf")
    return root


SMALLER = STUDENT | {"hidden_size": 128, "depth": 1, "num_heads": 1, "ffn_dim": 64}


def train(teacher_path: Path, parts: Path, folder: Path, *flags: str) -> list[str]:
    (folder / "config.json").write_text(json.dumps(SMALLER), encoding="utf-8")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    paths = {"teacher_path": teacher_path, "vae_path": parts, "text_encoder_path": parts}
    paths |= {"student_config": folder / "config.json", "data_path": folder / "prompts.txt"}
    paths |= {"prompt_cache": folder / "cache", "output_dir": folder / "out"}
    argv = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    return [*argv, "--max_steps", "2", "--device", "cpu", *flags]


def test_a_run_with_a_gguf_teacher_draws_with_the_parts_that_are_given(teacher, tmp_path, capsys):
    argv = train(teacher / "wan.gguf", teacher / "parts", tmp_path, "--num_samples", "1")
    assert train_distillation.main(argv) == 0
    assert "2 of 128 channels are assumed" in capsys.readouterr().out.replace("\n", " ")
    assert list((tmp_path / "out" / "samples").glob("*.png"))
    report = json.loads((tmp_path / "out" / "projection_report.json").read_text(encoding="utf-8"))
    assert report["student"]["blocks.0.attn1.to_q.weight"]["status"] == "selected"


def test_a_dry_run_counts_a_gguf_teacher_as_it_counts_the_same_wan_elsewhere(teacher, tmp_path, capsys):
    """The file is a quarter as large, but the teacher computes with weights of its own precision."""
    write_single_file(tmp_path / "wan.safetensors", **SHAPE)
    told = []
    for path in (teacher / "wan.gguf", tmp_path / "wan.safetensors"):
        assert train_distillation.main(train(path, teacher / "parts", tmp_path, "--dry_run")) == 0
        lines = capsys.readouterr().out.replace(str(path), "TEACHER").splitlines()
        told.append([line for line in lines if re.match(r"    \w.* \d+\.\d\d  ", line)])  # the rows of the memory
    assert told[0] == told[1] and any("teacher weights" in line for line in told[0]) and len(told[0]) > 4


# ---- what is refused ----


def write_small(path: Path, architecture: str, *tensors: tuple[str, np.ndarray, gguf.GGMLQuantizationType]) -> None:
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    for name, values, kind in tensors:
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["flux", "sdxl", "t5encoder"])
def test_another_architecture_is_named(tmp_path, architecture):
    floats = np.zeros((2, 2), np.float32), gguf.GGMLQuantizationType.F32
    write_small(tmp_path / "model.gguf", architecture, ("a.weight", *floats))
    message = refusal(tmp_path / "model.gguf")
    assert f"is a GGUF of architecture '{architecture}'" in message and 'architecture "wan"' in message


def test_a_gguf_of_another_wan_is_refused_by_name(tmp_path):
    floats = np.zeros((2, 2), np.float32), gguf.GGMLQuantizationType.F32
    write_small(tmp_path / "i2v.gguf", "wan", ("img_emb.proj.0.weight", *floats), ("head.modulation", *floats))
    assert "an image-to-video (I2V)" in refusal(tmp_path / "i2v.gguf")
    write_small(tmp_path / "none.gguf", "wan", ("a.weight", *floats))
    assert "holds no Wan transformer" in refusal(tmp_path / "none.gguf")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_short_is_refused_before_anything_is_read(teacher, tmp_path, share):
    whole = (teacher / "wan.gguf").read_bytes()
    (tmp_path / "wan.gguf").write_bytes(whole[: int(share * len(whole))])
    message = refusal(tmp_path / "wan.gguf")
    assert "is not a whole GGUF file" in message and "copy it again" in message


def test_an_array_that_claims_more_than_the_file_holds_ends_at_its_end(tmp_path):
    """The library would read nothing 2^40 times."""
    text = b"general.numbers"
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    array = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (2**40).to_bytes(8, "little")
    (tmp_path / "wan.gguf").write_bytes(header + len(text).to_bytes(8, "little") + text + array)
    assert "is not a whole GGUF file" in refusal(tmp_path / "wan.gguf")


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "wan.gguf").write_bytes(b"not a GGUF file at all" * 10)
    assert "is not a whole GGUF file" in refusal(tmp_path / "wan.gguf")


def test_types_that_no_numbers_can_be_made_of_are_named(tmp_path):
    integers = np.zeros((2, 32), np.int8), gguf.GGMLQuantizationType.I8
    write_small(tmp_path / "wan.gguf", "wan", ("blocks.0.ffn.0.weight", *integers))
    message = refusal(tmp_path / "wan.gguf")
    assert "blocks.0.ffn.0.weight is stored as I8" in message and "another quantisation" in message


def test_a_type_that_the_library_does_not_know_is_told(tmp_path):
    write_small(
        tmp_path / "wan.gguf", "wan", ("a.weight", np.zeros((2, 32), np.float32), gguf.GGMLQuantizationType.F32)
    )
    content = (tmp_path / "wan.gguf").read_bytes()
    at = content.index(b"a.weight") + len(b"a.weight") + 4 + 16  # behind the dimensions
    (tmp_path / "wan.gguf").write_bytes(content[:at] + (217).to_bytes(4, "little") + content[at + 4 :])
    message = refusal(tmp_path / "wan.gguf")
    assert "217" in message and "newer gguf" in message


@pytest.mark.parametrize("noted", [(1, 2), (0, 16, 1, 2, 2)])
def test_a_shape_that_cannot_be_is_refused(tmp_path, noted):
    write_wan_gguf(tmp_path / "wan.gguf", noted_shapes={KERNEL: noted}, **HALF)
    assert KERNEL in refusal(tmp_path / "wan.gguf")


def test_without_the_library_one_message_says_so(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    argv = ["--teacher_path", str(teacher / "wan.gguf"), "--output_dir", str(tmp_path / "out")]
    assert run_command(lambda: projection_mapper.main(argv)) == 2
    error = capsys.readouterr().err
    assert "pip install gguf" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
