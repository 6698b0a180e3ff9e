"""3D -> 2D: a Wan teacher's weights become a 2D model, of its own shape (exact at one frame) or a smaller student's.

The patch kernel of Wan is (1, p, p) and frame 0 has temporal RoPE angle 0, so one frame of the 3D transformer is a 2D
transformer with the same weights and Conv2d = W[:, :, 0]. A smaller student takes a consistent part of them.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.files.atomic import atomic_path
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import Fp8Linear, fp8_linears, to_fp8
from wandistiller.model.sizes import unfilled_model
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import fill
from wandistiller.projection.selection import Selection, TransformerTensors, select
from wandistiller.wan.files import WanFiles
from wandistiller.wan.names import without_frames
from wandistiller.wan.open import open_teacher

REPORT_NAME = "projection_report.json"
STATUSES = ("exact", "selected", "initialised")


# Which axes (see wandistiller/projection/selection.py) the dimensions of a teacher tensor run along; None is kept whole. {i} is the layer.
_AXES_BY_NAME = [
    (r"patch_embedding\.weight", ("channels", None, None, None, None)),
    (r"patch_embedding\.bias", ("channels",)),
    (r"condition_embedder\.(time|text)_embedder\.linear_1\.weight", ("{0}_hidden", None)),
    (r"condition_embedder\.(time|text)_embedder\.linear_1\.bias", ("{0}_hidden",)),
    (r"condition_embedder\.time_embedder\.linear_2\.weight", ("channels", "time_hidden")),
    (r"condition_embedder\.time_embedder\.linear_2\.bias", ("channels",)),
    (r"condition_embedder\.text_embedder\.linear_2\.weight", ("text_channels", "text_hidden")),
    (r"condition_embedder\.text_embedder\.linear_2\.bias", ("text_channels",)),
    (r"condition_embedder\.time_proj\.weight", ("6 x channels", "channels")),
    (r"condition_embedder\.time_proj\.bias", ("6 x channels",)),
    (r"blocks\.(\d+)\.attn2\.to_[kv]\.weight", ("attn2.{0}", "text_channels")),
    (r"blocks\.(\d+)\.(attn[12])\.to_[qkv]\.weight", ("{1}.{0}", "channels")),
    (r"blocks\.(\d+)\.(attn[12])\.(?:to_[qkv]\.bias|norm_[qk]\.weight)", ("{1}.{0}",)),
    (r"blocks\.(\d+)\.(attn[12])\.to_out\.0\.weight", ("channels", "{1}.{0}")),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj\.weight", ("neurons.{0}", "channels")),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj\.bias", ("neurons.{0}",)),
    (r"blocks\.(\d+)\.ffn\.net\.2\.weight", ("channels", "neurons.{0}")),
    (r"blocks\.\d+\.(?:attn[12]\.to_out\.0\.bias|ffn\.net\.2\.bias|norm2\.(?:weight|bias))", ("channels",)),
    (r"(?:blocks\.\d+\.)?scale_shift_table", (None, None, "channels")),
    (r"proj_out\.weight", (None, "channels")),
    (r"proj_out\.bias", (None,)),
]
_AXES = [(re.compile(pattern), axes) for pattern, axes in _AXES_BY_NAME]


# Lite block <- Wan block; what a lite block has beside this starts from its own initialisation.
_LITE_FROM_WAN = {
    "attn.in_proj_weight": ["attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"],
    "attn.in_proj_bias": ["attn1.to_q.bias", "attn1.to_k.bias", "attn1.to_v.bias"],
    "attn.out_proj.weight": ["attn1.to_out.0.weight"],
    "attn.out_proj.bias": ["attn1.to_out.0.bias"],
    "mlp.0.weight": ["ffn.net.0.proj.weight"],
    "mlp.0.bias": ["ffn.net.0.proj.bias"],
    "mlp.2.weight": ["ffn.net.2.weight"],
    "mlp.2.bias": ["ffn.net.2.bias"],
}


@dataclass
class ProjectionReport:
    """What became of every tensor on both sides.

    Attributes:
        student: name -> {"status": "exact" | "selected" | "initialised", "source": [...], "detail": ...}.
        teacher: name -> {"status": "used" | "dropped", "reason": ...}.
        layers: the teacher layer each student block came from.
        channels: which of the teacher's residual channels the student has; empty where it inherited none.
    """

    teacher_path: str
    expert: str
    layers: list[int]
    channels: list[int] = field(default_factory=list)
    student: dict[str, dict] = field(default_factory=dict)
    teacher: dict[str, dict] = field(default_factory=dict)
    num_parameters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))

    def add(self, name: str, parameter: Tensor, status: str, source: list[str], detail: str) -> None:
        """Write down where a student tensor came from."""
        self.student[name] = {"status": status, "source": source, "detail": detail}
        self.num_parameters[status] += parameter.numel()

    def summary(self) -> str:
        """A few lines for the screen."""
        total = sum(self.num_parameters.values())
        layers = f"layers {','.join(map(str, self.layers))}" if self.layers else "nothing inherited"
        lines = [f"Projection of {self.teacher_path} (expert {self.expert}), {layers}"]
        for status in self.num_parameters:
            count = sum(entry["status"] == status for entry in self.student.values())
            share = self.num_parameters[status] / total
            lines.append(
                f"  student  {status:<12}{count:5d} tensors {self.num_parameters[status]:>15,} parameters ({share:.1%})"
            )
        for status in ("used", "dropped"):
            count = sum(entry["status"] == status for entry in self.teacher.values())
            lines.append(f"  teacher  {status:<12}{count:5d} tensors")
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        """Write the whole report to projection_report.json in `folder`."""
        with atomic_path(Path(folder) / REPORT_NAME) as file:
            file.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def project_teacher(
    teacher_path: str | Path | WanFiles,
    config: StudentConfig | None = None,
    expert: str = "high",
    *,
    layers: list[int] | None = None,
    text_max_length: int = 512,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    fp8: bool = False,
    shard: Callable[[WanLiteStudent], None] | None = None,
    selection: Selection | None = None,
) -> tuple[WanLiteStudent, ProjectionReport]:
    """A 2D model with a teacher's weights.

    Args:
        teacher_path: a checkpoint as `wandistiller.wan.files.open_wan_files` takes it, or an opened one; "mock"
            needs a config, around which it is made.
        config: the student's shape; None is the teacher's own, lossless.
        expert: "high" or "low" noise; a teacher of one transformer has only "high".
        layers: the teacher layer of each student block, rising; None spreads them with both ends kept.
        text_max_length: text slots of the model where config is None.
        dtype: parameter dtype, float32 unless given; norms, modulation and time embedding stay float32.
        seed: for tensors the teacher has nothing for (lite students only).
        fp8: keep the Linear weights of the (wan) blocks as `wandistiller.model.fp8` does; such a model is frozen.
        shard: spreads the parameters of a (wan) model over processes, in place and before there is memory for them.
        selection: which part of the teacher the config's shape is filled with; None ranks by weight norm.

    Raises:
        UserError: the checkpoint cannot be read, or the config does not fit it.
    """
    wan_files = open_teacher(teacher_path, config)
    teacher = wan_files.expert(expert)
    if config is None:
        config = teacher.config.replace(text_max_length=text_max_length)
        selection = Selection(list(range(config.depth)))
    elif selection is None:
        selection = select(teacher, config, layers)
    student = _empty_student(config, dtype, device, seed, fp8, shard)
    channels = selection.axes.get("channels", torch.arange(config.hidden_size)).tolist()
    report = ProjectionReport(wan_files.location, expert, selection.layers, channels)
    _fill(student, teacher, selection, report)
    _report_teacher(teacher, selection, config, report)
    return student, report


def fresh_student(
    teacher_path: str | Path | WanFiles,
    config: StudentConfig,
    expert: str = "high",
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[WanLiteStudent, ProjectionReport]:
    """A student that inherits nothing, from seeded initial values: what projection is to be measured against."""
    wan_files = open_teacher(teacher_path, config)
    student = _seeded_student(config, None, device, seed)
    report = ProjectionReport(wan_files.location, expert, [])
    teacher, reason = wan_files.expert(expert), "random initial values were asked for"
    for name, parameter in student.named_parameters():
        report.add(name, parameter, "initialised", [], reason)
    report.teacher = {name: {"status": "dropped", "reason": reason} for name in teacher.names()} | _ignored(teacher)
    return student, report


def project_experts(
    wan_files: WanFiles,
    text_max_length: int,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    fp8: bool = False,
    shard: Callable[[WanLiteStudent], None] | None = None,
) -> dict[str, WanLiteStudent]:
    """Every expert of a teacher at its own shape: what `wandistiller.sampling.teacher.Teacher` is made of."""
    settings = {"text_max_length": text_max_length, "dtype": dtype, "device": device, "fp8": fp8, "shard": shard}
    return {name: project_teacher(wan_files, None, name, **settings)[0] for name in wan_files.experts}


def _seeded_student(
    config: StudentConfig, dtype: torch.dtype | None, device: str | torch.device, seed: int
) -> WanLiteStudent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanLiteStudent(config).to(device=device, dtype=dtype or torch.float32)


def _empty_student(
    config: StudentConfig,
    dtype: torch.dtype | None,
    device: str | torch.device,
    seed: int,
    fp8: bool = False,
    shard: Callable[[WanLiteStudent], None] | None = None,
) -> WanLiteStudent:
    """A model to be filled: unwritten memory for wan (every tensor is inherited), seeded initial values for lite."""
    if config.block == "lite":
        return _seeded_student(config, dtype, device, seed)
    student = unfilled_model(config, dtype or torch.float32)
    if fp8:
        to_fp8(student)  # before there is memory: a large teacher exists at no other precision
    if shard is not None:
        shard(student)
    return student.to_empty(device=device)


def _sources(student_name: str, config: StudentConfig, layers: list[int]) -> list[str]:
    """Teacher tensors (stacked along dim 0) that a student tensor is made of; none where it starts afresh."""
    match = re.match(r"blocks\.(\d+)\.(.+)", student_name)
    if config.block == "wan":
        return [f"blocks.{layers[int(match[1])]}.{match[2]}" if match else student_name]
    return [f"blocks.{layers[int(match[1])]}.{name}" for name in _LITE_FROM_WAN.get(match[2], [])] if match else []


def _axes_of(teacher_name: str) -> tuple[str | None, ...]:
    """The axes of a teacher tensor's dimensions; every canonical name has exactly one rule."""
    for pattern, axes in _AXES:
        if match := pattern.fullmatch(teacher_name):
            return tuple(axis and axis.format(*match.groups()) for axis in axes)
    raise AssertionError(f"no projection rule for {teacher_name}")


def _take(tensor: Tensor, teacher_name: str, selection: Selection) -> Tensor:
    """The selected part of a teacher tensor, 2D."""
    kept = {}
    for dim, axis in enumerate(_axes_of(teacher_name)):
        if axis == "6 x channels" and "channels" in selection.axes:
            kept[dim] = _in_six_parts(selection.axes["channels"], tensor.shape[dim] // 6)
        elif axis in selection.axes:
            kept[dim] = selection.axes[axis]
    if list(kept) == [0, 1]:
        return tensor[kept[0][:, None], kept[1]]  # a matrix at once: half the time of its rows, and then their columns
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices)
    return without_frames(tensor)


def _in_six_parts(channels: Tensor, size: int) -> Tensor:
    """Where these of `size` channels are in six parts that lie one after another."""
    return (torch.arange(6)[:, None] * size + channels).flatten()


def _fill(student: WanLiteStudent, teacher: TransformerTensors, selection: Selection, report: ProjectionReport) -> None:
    """Copy every inherited tensor, one teacher tensor in memory at a time, and write down where each came from."""
    stored = fp8_linears(student)
    for name, parameter in student.named_parameters():
        names = _sources(name, student.config, selection.layers)
        status, detail = "initialised", "the teacher has no counterpart"
        if names:
            with torch.no_grad():
                rows = parameter.chunk(len(names)) if len(names) > 1 else [parameter]
                if all(_fits(teacher, source, selection, part) for source, part in zip(names, rows, strict=True)):
                    details = [
                        _copy(teacher, source, selection, part, stored.get(name))
                        for source, part in zip(names, rows, strict=True)
                    ]
                    status, detail = details[0]
                else:
                    names, detail = [], f"the teacher's {names[0]} is smaller"
        report.add(name, parameter, status, names, detail)


def _kept_shape(teacher: TransformerTensors, name: str, selection: Selection) -> list[int]:
    shape = list(teacher.shape(name))
    for dim, axis in enumerate(_axes_of(name)):
        if axis == "6 x channels" and "channels" in selection.axes:
            shape[dim] = 6 * len(selection.axes["channels"])
        elif axis in selection.axes:
            shape[dim] = len(selection.axes[axis])
    return shape[:2] + shape[3:] if len(shape) == 5 else shape


def _fits(teacher: TransformerTensors, name: str, selection: Selection, target: Tensor) -> bool:
    """Only a lite student's 4x MLP can be larger than what the teacher has."""
    return _kept_shape(teacher, name, selection) == list(target.shape)


def _copy(
    teacher: TransformerTensors,
    name: str,
    selection: Selection,
    target: Tensor,
    stored: Fp8Linear | None = None,
) -> tuple[str, str]:
    """Fill `target`, or the layer whose weight it is where that is kept as fp8; status and detail for the report."""
    source = teacher.read(name)
    kept = _take(source, name, selection)
    if stored is None:
        fill(target, kept)
    else:
        stored.store(kept)
    is_exact = kept.numel() == source.numel()
    rounded = (
        f", rounded to {str(target.dtype).removeprefix('torch.')}"
        if source.dtype.itemsize > target.dtype.itemsize
        else ""
    )
    size = "x".join(map(str, kept.shape))
    whole = "x".join(map(str, source.shape))
    return ("exact", f"{size}{rounded}") if is_exact else ("selected", f"{size} of {whole}{rounded}")


def _report_teacher(
    teacher: TransformerTensors, selection: Selection, config: StudentConfig, report: ProjectionReport
) -> None:
    used_by: dict[str, str] = {}
    for student_name, entry in report.student.items():
        used_by |= dict.fromkeys(entry["source"], student_name)
    for name in teacher.names():
        if name in used_by:
            report.teacher[name] = {"status": "used", "reason": f"in {used_by[name]}"}
            continue
        match = re.match(r"blocks\.(\d+)\.", name)
        if match and int(match[1]) not in selection.layers:
            reason = f"layer {match[1]} is not kept"
        else:
            reason = "a lite student has no counterpart" if config.block == "lite" else "no student tensor uses it"
        report.teacher[name] = {"status": "dropped", "reason": reason}
    report.teacher |= _ignored(teacher)


def _ignored(teacher: TransformerTensors) -> dict[str, dict]:
    return {name: {"status": "dropped", "reason": reason} for name, reason in teacher.ignored.items()}
