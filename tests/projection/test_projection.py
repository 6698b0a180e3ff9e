"""A student is a consistent part of its teacher, and the report accounts for every tensor of both.

A Wan that is hidden in a larger one must be found bit for bit, dead neurons and layers must not matter, and projecting
14B's widths (slow) must not hold the checkpoint in memory.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import projection_mapper
from support.wan_folders import (
    inputs,
    oracle_velocity,
    random_transformer,
    relative_error,
    with_weights,
    write_hollow_transformer,
    write_original_folder,
    write_original_two_experts,
    write_single_file,
    write_transformer_folder,
)
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.model.config import ConfigError
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.projection.selection import spread_layers
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.wan_files import mock_wan_files

ROOT = Path(__file__).resolve().parents[2]
HEAD_DIM = 12
TEACHER = {"heads": 4, "head_dim": HEAD_DIM, "layers": 5, "ffn_dim": 60, "channels": 16, "text_dim": 20}


def wan_config(heads: int = 4, depth: int = 5, ffn_dim: int = 60, **changes) -> StudentConfig:
    values = {"block": "wan", "hidden_size": heads * HEAD_DIM, "depth": depth, "num_heads": heads, "ffn_dim": ffn_dim}
    values |= {"num_channels": 16, "image_size": 64, "text_encoder_output_dim": 20}
    return StudentConfig(**values | changes)


def lite_config(hidden_size: int = 24, depth: int = 2, **changes) -> StudentConfig:
    values = {"block": "lite", "hidden_size": hidden_size, "depth": depth, "num_heads": 2, "num_channels": 16}
    return StudentConfig(**values | {"image_size": 64, "text_encoder_output_dim": 20} | changes)


def write_teacher(folder: Path, tensors: dict[str, Tensor]):
    """A diffusers transformer folder of TEACHER's shape with these weights."""
    model = with_weights(random_transformer(**TEACHER), tensors)
    model.save_pretrained(folder)
    return model


# ---- selection finds a small Wan inside a large one ----


def random_part(size: int, kept: int, generator: torch.Generator, group: int = 1) -> Tensor:
    groups = torch.randperm(size // group, generator=generator)[: kept // group].sort().values
    return (groups[:, None] * group + torch.arange(group)).flatten()


def places_of(name: str, shape: torch.Size, parts: dict[str, Tensor]) -> list[Tensor]:
    """For each dimension of a tensor of the large Wan, the indices where the small one lies."""
    every = [torch.arange(size) for size in shape]
    layer, channels = (name.split(".")[1] if name.startswith("blocks") else ""), parts["channels"]
    rows = every[0]
    if "_embedder.linear_1" in name:
        rows = parts["time_hidden" if "time" in name else "text_hidden"]
    elif "text_embedder.linear_2" in name:
        rows = parts["text_channels"]
    elif "time_proj" in name:
        rows = torch.cat([channels + k * (shape[0] // 6) for k in range(6)])
    elif "scale_shift_table" in name:
        return [*every[:2], channels]
    elif ".to_q" in name or ".to_k" in name or ".to_v" in name or ".norm_" in name:
        rows = parts[f"{name.split('.')[2]}.{layer}"]
    elif "ffn.net.0" in name:
        rows = parts[f"neurons.{layer}"]
    elif "proj_out" not in name:
        rows = channels
    columns = channels
    if "linear_1" in name or name.startswith("patch"):
        return [rows, *every[1:]]
    if "time_embedder.linear_2" in name or "text_embedder.linear_2" in name:
        columns = parts["time_hidden" if "time" in name else "text_hidden"]
    elif "attn2.to_k" in name or "attn2.to_v" in name:
        columns = parts["text_channels"]
    elif "to_out" in name:
        columns = parts[f"{name.split('.')[2]}.{layer}"]
    elif "ffn.net.2" in name:
        columns = parts[f"neurons.{layer}"]
    return [rows, columns][: len(shape)]


def hide(small, large, layers: list[int], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of `large` with `small` scattered into them; every other weight is tiny, all else is arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    width, kept = 4 * HEAD_DIM, 2 * HEAD_DIM
    parts = {
        axis: random_part(width, kept, generator)
        for axis in ("channels", "text_channels", "time_hidden", "text_hidden")
    }
    for layer in layers:
        parts |= {f"{kind}.{layer}": random_part(width, kept, generator, HEAD_DIM) for kind in ("attn1", "attn2")}
        parts[f"neurons.{layer}"] = random_part(60, 36, generator)
    hidden = {name: 1e-3 * tensor if tensor.ndim > 1 else tensor.clone() for name, tensor in large.state_dict().items()}
    for name, tensor in small.state_dict().items():
        where = name
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            where = f"blocks.{layers[int(layer)]}.{rest}"
        hidden[where][torch.meshgrid(*places_of(where, hidden[where].shape, parts), indexing="ij")] = tensor
    return hidden, parts


@pytest.mark.parametrize("seed, layers", [(0, None), (1, [0, 1, 3]), (2, None)])
def test_a_wan_hidden_in_a_larger_one_is_found_bit_for_bit(tmp_path, seed, layers):
    small = random_transformer(**TEACHER | {"heads": 2, "layers": 3, "ffn_dim": 36}, seed=seed)
    tensors, _ = hide(small, random_transformer(**TEACHER, seed=seed + 10), layers or [0, 2, 4], seed)
    write_teacher(tmp_path, tensors)
    student, report = project_teacher(tmp_path, wan_config(heads=2, depth=3, ffn_dim=36), layers=layers)
    for name, tensor in small.state_dict().items():
        found = student.state_dict()[name]
        assert torch.equal(found, tensor[:, :, 0] if tensor.ndim == 5 else tensor), name
    assert report.layers == (layers or [0, 2, 4])
    given = inputs()
    with torch.no_grad():
        assert relative_error(student(*given), oracle_velocity(small, *given)) <= 1e-5


def test_dropping_dead_neurons_and_dead_layers_changes_no_velocity(tmp_path):
    tensors = random_transformer(**TEACHER).state_dict()
    for layer in (1, 3):  # blocks that add nothing
        for name in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"):
            tensors[f"blocks.{layer}.{name}.weight"].zero_()
            tensors[f"blocks.{layer}.{name}.bias"].zero_()
    for layer in range(5):
        tensors[f"blocks.{layer}.ffn.net.2.weight"][:, layer % 3 :: 3] = 0.0  # neurons that nobody reads
    teacher = write_teacher(tmp_path, tensors)
    student, report = project_teacher(tmp_path, wan_config(depth=3, ffn_dim=40))
    assert report.layers == [0, 2, 4]
    given = inputs()
    with torch.no_grad():
        assert relative_error(student(*given), oracle_velocity(teacher, *given)) <= 1e-5
    cut_further, _ = project_teacher(tmp_path, wan_config(depth=3, ffn_dim=36))
    with torch.no_grad():
        assert relative_error(cut_further(*given), oracle_velocity(teacher, *given)) > 1e-3


# ---- layers ----


@pytest.mark.parametrize("teacher_depth", [2, 3, 30, 40])
def test_spread_layers_keep_both_ends_and_rise(teacher_depth):
    for depth in range(2, teacher_depth + 1):
        layers = spread_layers(teacher_depth, depth)
        assert (layers[0], layers[-1], len(layers)) == (0, teacher_depth - 1, depth)
        gaps = {after - before for before, after in pairwise(layers)}
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([0, 1, 2], "names 3 layers, the student has depth=2"),
        ([0, 5], "from 0 to 4"),
        ([3, 1], "rising"),
        ([2, 2], "each once"),
    ],
)
def test_layers_that_cannot_work_are_refused(tmp_path, layers, said):
    write_transformer_folder(tmp_path, **TEACHER)
    with pytest.raises(ConfigError, match=said):
        project_teacher(tmp_path, wan_config(depth=2), layers=layers)


# ---- students that are no part of the teacher ----


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (wan_config(depth=6), r"depth=6 .* 5; use 5 or less"),
        (wan_config(heads=5), r"hidden_size=60 .* 48; use 48 or less"),
        (wan_config(ffn_dim=61), r"ffn_dim=61 .* 60; use 60 or less"),
        (wan_config(num_channels=48), r'num_channels=48 .* "num_channels": 16'),
        (wan_config(text_encoder_output_dim=4096), r'"text_encoder_output_dim": 20'),
        (wan_config(heads=3, num_heads=2), r"heads of 18 .* 12 .* hidden_size=36 with num_heads=3"),
        (wan_config(patch_size=4), r'"patch_size": 2'),
        (wan_config(freq_dim=64), r'"freq_dim": 256'),
        (lite_config(num_channels=4), r'num_channels=4 .* "num_channels": 16'),
    ],
)
def test_a_student_that_is_no_part_of_the_teacher_is_refused_with_what_would_be(tmp_path, config, said):
    write_transformer_folder(tmp_path, **TEACHER)
    with pytest.raises(ConfigError, match=said) as refusal:
        project_teacher(tmp_path, config)
    assert "\n" not in str(refusal.value)


def test_an_expert_that_is_not_there_is_refused(tmp_path):
    write_transformer_folder(tmp_path, **TEACHER)
    with pytest.raises(UserError, match='no expert "low"; it has: high'):
        project_teacher(tmp_path, expert="low")


# ---- the report: invariants 2 and 8 ----


STUDENTS = {
    "own shape": (None, None),
    "pruned": (wan_config(heads=2, depth=3, ffn_dim=36), None),
    "layers": (wan_config(depth=2), [1, 4]),
    "lite": (lite_config(hidden_size=12), None),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_report_tells_the_truth_of_every_tensor_of_both_sides(tmp_path, kind):
    """Exact: the very values. Selected: all of them occur in the teacher tensor. Initialised: none of them does. Nothing is 3D."""
    config, layers = STUDENTS[kind]
    teacher = write_transformer_folder(tmp_path, **TEACHER).state_dict()
    student, report = project_teacher(tmp_path, config, layers=layers)
    tensors = student.state_dict()
    assert set(report.student) == set(tensors) and set(report.teacher) == set(teacher)
    sources = {entry["source"] for entry in report.student.values()} - {None}
    assert {name for name, entry in report.teacher.items() if entry["status"] == "used"} == sources
    assert all(entry["status"] in ("used", "dropped") and entry["reason"] for entry in report.teacher.values())
    everything = torch.cat([tensor.flatten() for tensor in teacher.values()])
    for name, entry in report.student.items():
        values = tensors[name].flatten()
        if entry["status"] == "initialised":
            random = values[(values != 0) & (values != 1)]
            assert entry["source"] is None and (not torch.isin(random, everything).all() or len(random) == 0), name
            continue
        source = teacher[entry["source"]].flatten()
        if entry["status"] == "exact":
            assert torch.equal(values, source), name
        else:
            assert entry["status"] == "selected"
            assert len(values) < len(source) and torch.isin(values, source).all(), name
    assert sum(report.num_parameters.values()) == sum(tensor.numel() for tensor in tensors.values())
    for status in ("exact", "selected", "initialised", "used", "dropped"):
        assert status in report.summary()
    assert all(tensor.ndim <= 4 for tensor in tensors.values())
    assert not any(isinstance(module, torch.nn.Conv3d) for module in student.modules())


def test_fp8_scales_and_strangers_are_reported_as_dropped(tmp_path):
    path = tmp_path / "wan.safetensors"
    write_single_file(path, fp8="scaled", heads=1, layers=1, ffn_dim=48)
    _, report = project_teacher(path)
    assert report.teacher["scaled_fp8"]["status"] == "dropped"
    assert "multiplied into" in report.teacher["blocks.0.ffn.net.0.proj.scale_weight"]["reason"]
    assert report.teacher["blocks.0.attn1.to_q.scale_input"]["status"] == "dropped"


def test_rounding_to_a_smaller_dtype_is_reported_and_spares_the_float32_islands(tmp_path):
    write_transformer_folder(tmp_path, **TEACHER)
    model, report = project_teacher(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for name in ("scale_shift_table", "blocks.0.norm2.weight", "condition_embedder.time_embedder.linear_1.weight"):
        assert dtypes[name] == torch.float32 and "rounded" not in report.student[name]["detail"]
    assert dtypes["proj_out.weight"] == torch.bfloat16 and "rounded" in report.student["proj_out.weight"]["detail"]
    reference, _ = project_teacher(tmp_path)
    given = inputs()
    with torch.no_grad():
        assert relative_error(model(*given), reference(*given)) < 0.03


# ---- experts, mock ----


def test_both_experts_are_projected_each_from_its_own_weights(tmp_path):
    experts = write_original_two_experts(tmp_path, **TEACHER)
    models = project_experts(open_wan_files(tmp_path), 512)
    assert list(models) == ["high", "low"]
    for model, expert in zip(models.values(), experts, strict=True):
        given = inputs()
        with torch.no_grad():
            assert relative_error(model(*given), oracle_velocity(expert, *given)) <= 1e-5


@pytest.mark.parametrize("config", [wan_config(), lite_config(hidden_size=30, num_heads=15)])
def test_the_mock_is_a_larger_wan_that_never_changes(config):
    shape = mock_wan_files(config).config
    assert shape.block == "wan" and shape.num_channels == config.num_channels
    assert shape.hidden_size > config.hidden_size and shape.depth > config.depth and shape.ffn_dim > config.ffn_dim
    student, report = project_teacher("mock", config)
    again, _ = project_teacher("mock", config)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in student.state_dict().items())
    statuses = {entry["status"] for entry in report.student.values()}
    assert statuses == ({"initialised"} if config.block == "lite" else {"selected", "exact"})
    teacher, _ = project_teacher(mock_wan_files(config))
    given = inputs()
    with torch.no_grad():
        assert 0.1 < teacher(*given).std() < 10


def test_a_lite_students_values_depend_on_the_seed_alone():
    def projected(seed: int) -> WanLiteStudent:
        return project_teacher("mock", lite_config(), seed=seed)[0]

    torch.manual_seed(1)
    first = projected(0)
    state = torch.random.get_rng_state()
    assert torch.equal(projected(0).conv_in.weight, first.conv_in.weight)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(projected(1).conv_in.weight, first.conv_in.weight)


# ---- the command ----


def run_projection(*flags) -> int:
    return run_command(lambda: projection_mapper.main([str(flag) for flag in flags]))


def test_the_command_saves_the_student_and_the_whole_report(tmp_path, capsys):
    write_original_folder(tmp_path / "wan", **TEACHER)
    (tmp_path / "student.json").write_text(wan_config(heads=2, depth=2, ffn_dim=36).to_json())
    flags = ["--teacher_path", tmp_path / "wan", "--student_config", tmp_path / "student.json"]
    assert run_projection(*flags, "--layers", "0,3", "--output-dir", tmp_path / "out") == 0
    student = WanLiteStudent.from_pretrained(tmp_path / "out")
    expected, report = project_teacher(tmp_path / "wan", wan_config(heads=2, depth=2, ffn_dim=36), layers=[0, 3])
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in student.state_dict().items())
    saved = json.loads((tmp_path / "out" / "projection_report.json").read_text())
    assert saved["student"] == report.student and saved["teacher"] == report.teacher and saved["layers"] == [0, 3]
    assert report.summary().splitlines()[1] in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        ["--teacher_path", "nowhere"],
        ["--expert", "low"],
        ["--layers", "0,9"],
        ["--student_config", "nowhere.json"],
        ["--student_config", "too_large.json"],
        ["--student_config", None],  # and --layers without it
    ],
)
def test_a_refused_command_answers_in_one_line_and_leaves_the_folder_as_it_was(tmp_path, capsys, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    write_transformer_folder(tmp_path / "wan", **TEACHER)
    Path("student.json").write_text(wan_config(depth=2).to_json())
    Path("too_large.json").write_text(wan_config(heads=8, depth=2).to_json())
    flags = {"--teacher_path": "wan", "--student_config": "student.json", "--output_dir": "out"}
    flags |= {"--layers": "0,1"} | dict([change])
    project_teacher("wan", wan_config(depth=1))[0].save_pretrained("out")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()  # diffusers' own lines, as it wrote the teacher
    assert run_projection(*[word for flag in flags.items() if flag[1] for word in flag]) == 2
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


# ---- host memory ----

MEASURE = """
import sys
import torch
import wandistiller.projection.project, wandistiller.projection.selection, wandistiller.model.transformer, wandistiller.wan.layouts
from wandistiller import StudentConfig

def kib(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

torch.set_num_threads(1)
config = StudentConfig.load(sys.argv[2])
wandistiller.model.transformer.WanLiteStudent(config.replace(depth=1, hidden_size=128, num_heads=1, ffn_dim=128))
start = kib("VmRSS")
student, _ = wandistiller.projection.project.project_teacher(sys.argv[1], config)
print(sum(t.numel() * t.element_size() for t in student.state_dict().values()) / 2**20, (kib("VmHWM") - start) / 2**10)
"""


def hollow_config(*, heads: int, ffn_dim: int, depth: int) -> StudentConfig:
    config = wan_config(heads=1, hidden_size=heads * 128, num_heads=heads, depth=depth, ffn_dim=ffn_dim)
    return config.replace(text_encoder_output_dim=4096)


def assert_memory_stays_bounded(tmp_path: Path, teacher: dict, student: dict) -> None:
    """Peak above the imports <= student + largest tensor + 500 MB, where the checkpoint is several times that."""
    dtype = teacher.pop("dtype")
    total, largest = write_hollow_transformer(
        tmp_path / "wan", hollow_config(**teacher), dtype=dtype, num_shards=teacher["depth"]
    )
    config = StudentConfig(block="wan", num_channels=16, image_size=512, **student)
    (tmp_path / "student_config.json").write_text(config.to_json())
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "wan"), str(tmp_path / "student_config.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=500)
    student_mib, peak_mib = map(float, run.stdout.split())
    allowed_mib = student_mib + (largest + 500e6) / 2**20
    print(
        f"checkpoint {total / 2**20:.0f} MiB, student {student_mib:.0f}, peak {peak_mib:.0f}, allowed {allowed_mib:.0f}"
    )
    assert 2 * allowed_mib < total / 2**20, "the checkpoint is too small to prove anything"
    assert peak_mib <= allowed_mib


def test_projecting_a_sharded_checkpoint_never_holds_it_in_memory(tmp_path):
    teacher = {"heads": 16, "ffn_dim": 8192, "depth": 6, "dtype": "F32"}
    student = {"hidden_size": 512, "num_heads": 4, "depth": 2, "ffn_dim": 1024}
    assert_memory_stays_bounded(tmp_path, teacher, student)


@pytest.mark.slow
def test_projecting_the_widths_of_the_14b_never_holds_it_in_memory(tmp_path):
    teacher = {"heads": 40, "ffn_dim": 13824, "depth": 8, "dtype": "BF16"}
    student = {"hidden_size": 2560, "num_heads": 20, "depth": 3, "ffn_dim": 6912}
    assert_memory_stays_bounded(tmp_path, teacher, student)
