"""3D -> 2D: a Wan teacher's weights become a 2D model, of the teacher's own shape (exact at one frame) or a smaller student's.

The patch kernel of Wan is (1, p, p) and frame 0 has temporal RoPE angle 0, so one frame of the 3D transformer is a 2D
transformer with the same weights and Conv2d = W[:, :, 0]. A smaller student takes a consistent part of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.files.atomic import write_json
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import fp8_linears, to_fp8
from wandistiller.model.sizes import unfilled_model
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import fill
from wandistiller.projection.selection import Selection, check_fits, select
from wandistiller.projection.selection_record import REPORT_NAME, selection_record
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.transformer_files import WanTransformer
from wandistiller.wan.wan_files import LoraFiles, WanFiles, merge_loras

STATUSES = ("exact", "selected", "initialised")

# The axes (see wandistiller/projection/selection.py) that the dimensions of a teacher tensor run along; a dimension of None is
# never cut. {0} and {1} stand for the groups of the pattern: mostly the layer, and which attention of its block.
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


@dataclass
class ProjectionReport:
    """The fate of every tensor on both sides.

    Attributes:
        student: name -> {"status": "exact" | "selected" | "initialised", "source": name, "detail": ...}.
        teacher: name -> {"status": "used" | "dropped", "reason": ...}.
        layers: the teacher layer of each student block.
        channels: the teacher's residual channels that the student has; empty if it inherited none.
        loras: the LoRAs that the expert was read with.
        selection: the teacher's shape and the kept part of its axes, see `selection_record`; empty if nothing was inherited.
    """

    teacher_path: str
    expert: str
    layers: list[int]
    channels: list[int] = field(default_factory=list)
    student: dict[str, dict] = field(default_factory=dict)
    teacher: dict[str, dict] = field(default_factory=dict)
    num_parameters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    loras: list[dict] = field(default_factory=list)
    selection: dict = field(default_factory=dict)

    def add(self, name: str, parameter: Tensor, status: str, source: str | None, detail: str) -> None:
        self.student[name] = {"status": status, "source": source, "detail": detail}
        self.num_parameters[status] += parameter.numel()

    def summary(self) -> str:
        total = sum(self.num_parameters.values())
        layers = f"layers {','.join(map(str, self.layers))}" if self.layers else "nothing inherited"
        lines = [f"Projection of {self.teacher_path} (expert {self.expert}), {layers}"]
        lines += [f"  with the LoRA {lora['file']} at scale {lora['scale']:g}" for lora in self.loras]
        tensors = Counter(entry["status"] for entry in [*self.student.values(), *self.teacher.values()])
        for status, number in self.num_parameters.items():
            lines.append(
                f"  student  {status:<12}{tensors[status]:5d} tensors {number:>15,} parameters ({number / total:.1%})"
            )
        lines += [f"  teacher  {status:<12}{tensors[status]:5d} tensors" for status in ("used", "dropped")]
        return "\n".join(lines)

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / REPORT_NAME, asdict(self), indent=1)


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
    loras: LoraFiles | None = None,
) -> tuple[WanLiteStudent, ProjectionReport]:
    """Make a 2D model with a teacher's weights; return it with a report of every tensor of both.

    Args:
        teacher_path: a Wan in any layout that `wandistiller.wan.layouts` reads, or an opened one; "mock" needs a config,
            because it is made around one.
        config: the student's shape; None keeps the teacher's own, and every weight.
        expert: "high" or "low" noise; a teacher of one transformer has only "high".
        layers: the teacher layer of each student block, in rising order; None spreads them evenly with both ends kept.
        text_max_length: the model's text slots where config is None.
        dtype: the dtype of parameters, float32 unless given; norms, modulation and time embedding stay float32.
        device: where the model is filled.
        seed: seed of the values of a lite student, which inherits nothing.
        fp8: whether the Linear weights of the blocks are kept as `wandistiller.model.fp8` does; such a model is frozen.
        shard: shards the parameters in place, before memory is allocated for them.
        selection: the part of the teacher that fills the config's shape; None ranks by weight norm.
        loras: files and scales of Wan LoRAs that are merged into the expert as it is read.

    Raises:
        UserError: the Wan cannot be read, or the config does not fit it.
    """
    wan_files = open_teacher(teacher_path, config)
    wan_files.expert(expert)  # refuses a missing expert before its LoRAs
    wan_files = merge_loras(wan_files, **{expert: loras})
    teacher = wan_files.expert(expert)
    if config is None:
        config = teacher.config.replace(text_max_length=text_max_length)
        selection = Selection(list(range(config.depth)))
    check_fits(teacher.config, config, layers)
    if not config.is_wan:
        return fresh_student(wan_files, config, expert, device=device, seed=seed)
    selection = selection or select(teacher, config, layers)
    student = _empty_model(config, dtype or torch.float32, device, fp8, shard)
    channels = selection.axes.get("channels", torch.arange(config.hidden_size)).tolist()
    report = ProjectionReport(wan_files.location, expert, selection.layers, channels)
    report.loras = [lora.record() for lora in wan_files.loras if lora.expert == expert]
    report.selection = selection_record(teacher.config, selection)
    _fill(student, teacher, selection, report)
    _report_teacher(teacher, report)
    return student, report


def fresh_student(
    teacher_path: str | Path | WanFiles,
    config: StudentConfig,
    expert: str = "high",
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[WanLiteStudent, ProjectionReport]:
    """Make a student from seeded random values, which inherits nothing: the baseline for projection, and every lite student.

    The values depend on the seed alone, and nothing is drawn from the global generator.
    """
    wan_files = open_teacher(teacher_path, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = WanLiteStudent(config).to(device)
    report = ProjectionReport(wan_files.location, expert, [])
    teacher, reason = wan_files.expert(expert), "the student starts from random values"
    for name, parameter in student.named_parameters():
        report.add(name, parameter, "initialised", None, reason)
    report.teacher = {name: _dropped(reason) for name in teacher.weights} | _ignored(teacher)
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
    """Project every expert of a teacher at its own shape; `wandistiller.sampling.teacher.Teacher` is made of them."""
    return {
        name: project_teacher(
            wan_files, None, name, text_max_length=text_max_length, dtype=dtype, device=device, fp8=fp8, shard=shard
        )[0]
        for name in wan_files.experts
    }


def _empty_model(
    config: StudentConfig,
    dtype: torch.dtype,
    device: str | torch.device,
    fp8: bool,
    shard: Callable[[WanLiteStudent], None] | None,
) -> WanLiteStudent:
    """Make a wan model in unwritten memory, since it inherits every tensor."""
    model = unfilled_model(config, dtype)
    if fp8:
        to_fp8(model)  # before memory is allocated, because a large teacher fits in no other precision
    if shard is not None:
        shard(model)
    return model.to_empty(device=device)


def _axes_of(teacher_name: str) -> tuple[str | None, ...]:
    """Return the axis of each dimension of a teacher tensor; every canonical name has exactly one rule."""
    for pattern, axes in _AXES:
        if match := pattern.fullmatch(teacher_name):
            return tuple(axis and axis.format(*match.groups()) for axis in axes)
    raise AssertionError(f"no projection rule for {teacher_name}")


def kept_indices(teacher_name: str, shape: Sequence[int], selection: Selection) -> dict[int, Tensor]:
    """Return the kept indices of a teacher tensor, by each dimension that is cut."""
    kept = {}
    for dim, axis in enumerate(_axes_of(teacher_name)):
        if axis == "6 x channels" and "channels" in selection.axes:  # six parts that lie one after another
            kept[dim] = (torch.arange(6)[:, None] * (shape[dim] // 6) + selection.axes["channels"]).flatten()
        elif axis in selection.axes:
            kept[dim] = selection.axes[axis]
    return kept


def _take(tensor: Tensor, teacher_name: str, selection: Selection) -> Tensor:
    """Return the kept part of a teacher tensor, in 2D."""
    kept = kept_indices(teacher_name, tensor.shape, selection)
    if list(kept) == [0, 1]:
        return tensor[kept[0][:, None], kept[1]]  # takes half the time of cutting the rows and then the columns
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices)
    return tensor[:, :, 0] if tensor.ndim == 5 else tensor  # the patch kernel's depth is 1


@torch.no_grad()
def _fill(student: WanLiteStudent, teacher: WanTransformer, selection: Selection, report: ProjectionReport) -> None:
    """Copy every tensor, one of the teacher's in memory at a time, and report where each came from."""
    fp8_layers = fp8_linears(student)
    for name, parameter in student.named_parameters():
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        source = f"blocks.{selection.layers[int(block[1])]}.{block[2]}" if block else name
        whole = teacher.read(source)
        kept = _take(whole, source, selection)
        if fp8_layer := fp8_layers.get(name):
            fp8_layer.store(kept)
        else:
            fill(parameter, kept)
        is_exact = kept.numel() == whole.numel()
        detail = "x".join(map(str, kept.shape)) + ("" if is_exact else f" of {'x'.join(map(str, whole.shape))}")
        if whole.dtype.itemsize > parameter.dtype.itemsize:
            detail += f", rounded to {str(parameter.dtype).removeprefix('torch.')}"
        report.add(name, parameter, "exact" if is_exact else "selected", source, detail)


def _report_teacher(teacher: WanTransformer, report: ProjectionReport) -> None:
    """Report the student tensor that uses each teacher tensor, or why none does."""
    used_by = {entry["source"]: name for name, entry in report.student.items()}
    for name in teacher.weights:
        if name in used_by:
            report.teacher[name] = {"status": "used", "reason": f"in {used_by[name]}"}
        else:
            report.teacher[name] = _dropped(f"layer {name.split('.')[1]} is not kept")
    report.teacher |= _ignored(teacher)


def _ignored(teacher: WanTransformer) -> dict[str, dict]:
    """Return entries for the tensors in the teacher's files that are no weights of a text-to-video Wan."""
    return {name: _dropped(reason) for name, reason in teacher.ignored.items()}


def _dropped(reason: str) -> dict[str, str]:
    return {"status": "dropped", "reason": reason}
