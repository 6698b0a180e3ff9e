"""A Wan in a GGUF file is read as what the gguf library makes of it, and what is no such file is refused in one message.

The oracle is the library's own dequantisation in diffusers' 3D transformer at one frame.
"""

import json
import resource
import sys
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest

import projection_mapper
from support.gguf_files import SHAPE, finish, write_wan_gguf
from support.layout_checks import assert_exact, refusal
from support.runs import PRUNED_CONFIG
from support.wan_folders import A14B_SHAPE, to_original, write_single_file
from wandistiller import StudentConfig
from wandistiller.projection.project import project_teacher
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.transformer_files import teacher_tensor_shapes

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


@pytest.mark.parametrize("architecture", ["pig", None])
def test_converters_may_name_themselves_or_nothing(tmp_path, architecture):
    expert = write_wan_gguf(tmp_path / "wan.gguf", architecture=architecture, **HALF)
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


def test_a_gguf_and_a_safetensors_file_may_be_the_two_experts(tmp_path):
    high, low = tmp_path / "HighNoise" / "wan-Q8_0.gguf", tmp_path / "low.safetensors"
    high.parent.mkdir()
    experts = {"high": write_wan_gguf(high, **HALF), "low": write_single_file(low, **SHAPE | HALF)}
    for name, expert in experts.items():
        assert_same_as_diffusers(high, expert, name, low_noise_path=low)
    message = refusal(high.parent)
    assert "GGUF files are given by their names" in message and "--teacher_path_low" in message


def test_of_a_file_larger_than_memory_the_header_is_read_and_one_tensor_at_a_time(tmp_path):
    """The file is a hole of 70 GB, which takes no disk; its header is true."""
    path, end, writer = tmp_path / "wan.gguf", 0, gguf.GGUFWriter(path=None, arch="wan")
    config = StudentConfig(block="wan", image_size=512, **A14B_SHAPE | {"depth": 200})
    for name, shape in teacher_tensor_shapes(config).items():
        kind, num_bytes = ("Q8_0", prod(shape) // 32 * 34) if len(shape) == 2 else ("F32", 4 * prod(shape))
        kind, end = gguf.GGMLQuantizationType[kind], end + num_bytes
        writer.add_tensor_info(to_original(name), shape, np.dtype(np.float32), num_bytes, kind)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + end + 2**16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    transformer = open_wan_files(path).experts["high"]
    tensor = transformer.read("blocks.199.ffn.net.0.proj.weight")
    assert tensor.shape == (13824, 5120) and not tensor.any() and end > 2**36
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**21  # KiB


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "wan.gguf"
    write_wan_gguf(path)
    return path


SMALLER = PRUNED_CONFIG | {"hidden_size": 128, "depth": 1, "num_heads": 1, "ffn_dim": 64}


def test_a_run_with_a_gguf_teacher_draws_with_the_parts_that_are_given(wan, train, teachers, tmp_path):
    parts = ["--vae_path", teachers.one, "--text_encoder_path", teachers.one]
    outcome = train(wan, SMALLER, *parts, "--max_steps", 2, "--num_samples", 1)
    assert outcome.code == 0 and "2 of 128 channels are assumed" in outcome.out.replace("\n", " ")
    assert list((tmp_path / "out" / "samples").glob("*.png"))
    report = json.loads((tmp_path / "out" / "projection_report.json").read_text(encoding="utf-8"))
    assert report["student"]["blocks.0.attn1.to_q.weight"]["status"] == "selected"


def write_small(path: Path, architecture: str, *tensors: tuple[str, np.ndarray, gguf.GGMLQuantizationType]) -> None:
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    for name, values, kind in tensors:
        writer.add_tensor(name, values, raw_dtype=kind)
    finish(writer, path)


FLOATS = np.zeros((2, 2), np.float32), gguf.GGMLQuantizationType.F32
INTEGERS = np.zeros((2, 32), np.int8), gguf.GGMLQuantizationType.I8


@pytest.mark.parametrize(
    ("architecture", "tensors", "words"),
    [
        ("flux", [("a.weight", *FLOATS)], ["is a GGUF of architecture 'flux'", 'architecture "wan"']),
        ("wan", [("img_emb.proj.0.weight", *FLOATS), ("head.modulation", *FLOATS)], ["an image-to-video (I2V)"]),
        ("wan", [("a.weight", *FLOATS)], ["holds no Wan transformer"]),
        ("wan", [("blocks.0.ffn.0.weight", *INTEGERS)], ["blocks.0.ffn.0.weight is of a type", "I8"]),
    ],
)
def test_a_gguf_of_another_model_or_of_no_numbers_is_refused_by_name(tmp_path, architecture, tensors, words):
    write_small(tmp_path / "model.gguf", architecture, *tensors)
    message = refusal(tmp_path / "model.gguf")
    assert all(word in message for word in words), message


FIELDS_WITHOUT_END = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (2**40).to_bytes(8, "little") + bytes(64)


def array_without_end() -> bytes:
    """A header whose one field claims an array of more numbers than the file holds, which the library would read 2^40 times."""
    text = b"general.numbers"
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    array = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (2**40).to_bytes(8, "little")
    return header + len(text).to_bytes(8, "little") + text + array


@pytest.mark.parametrize(
    "part", [0.0, 0.01, 0.999, b"not a GGUF file at all" * 10, array_without_end(), FIELDS_WITHOUT_END]
)
def test_what_is_no_whole_gguf_is_refused_before_anything_is_read(wan, tmp_path, part):
    whole = wan.read_bytes()
    (tmp_path / "wan.gguf").write_bytes(part if isinstance(part, bytes) else whole[: int(part * len(whole))])
    message = refusal(tmp_path / "wan.gguf")
    assert "is not a whole GGUF file" in message and "copy it again" in message


def test_a_type_that_the_library_does_not_know_is_told(tmp_path):
    write_small(tmp_path / "wan.gguf", "wan", ("a.weight", *FLOATS))
    content = (tmp_path / "wan.gguf").read_bytes()
    at = content.index(b"a.weight") + len(b"a.weight") + 4 + 16  # behind the dimensions
    (tmp_path / "wan.gguf").write_bytes(content[:at] + (217).to_bytes(4, "little") + content[at + 4 :])
    message = refusal(tmp_path / "wan.gguf")
    assert "217" in message and "newer gguf" in message


@pytest.mark.parametrize("noted", [(1, 2), (0, 16, 1, 2, 2)])
def test_a_shape_that_cannot_be_is_refused(tmp_path, noted):
    write_wan_gguf(tmp_path / "wan.gguf", noted_shapes={KERNEL: noted}, **HALF)
    assert KERNEL in refusal(tmp_path / "wan.gguf")


def test_without_the_library_one_message_says_so(wan, tmp_path, monkeypatch, run_main):
    monkeypatch.setitem(sys.modules, "gguf", None)
    outcome = run_main(projection_mapper.main, "--teacher_path", wan, "--output_dir", tmp_path / "out")
    assert outcome.code == 2 and "pip install gguf" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
