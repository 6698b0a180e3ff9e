"""Which part of a teacher a smaller student inherits: layers, residual channels, heads, FFN neurons.

Layers are spread evenly with both ends kept (TinyFusion, arXiv 2412.01199, table 3). Along every other axis the entries with
the largest weight norm are kept, in their original order; only the checkpoint is read for it.

An axis is a named index set used wherever that axis occurs, so that what is cut stays consistent:
`channels` (the residual stream), `text_channels` (text stream fed to every cross-attention), `time_hidden`, `text_hidden`
(inside the two embedders), and per teacher layer i `attn1.i`, `attn2.i` (rows of whole heads) and `neurons.i`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.model.config import CONFIG_NAME, ConfigError, StudentConfig
from wandistiller.wan.transformer_files import WanTransformer

ROWS_AT_A_TIME = 64  # few enough to stay in a processor's cache, also at the width of 14B


@dataclass(frozen=True)
class Selection:
    """Which part of a teacher becomes a student.

    Attributes:
        layers: the teacher layer of each student block.
        axes: the kept indices of each axis, in rising order; an axis that is not cut is absent.
    """

    layers: list[int]
    axes: dict[str, Tensor] = field(default_factory=dict)


def spread_layers(teacher_depth: int, depth: int) -> list[int]:
    """Return `depth` of the teacher's layers, evenly spread, with the first and the last among them."""
    return torch.linspace(0, teacher_depth - 1, depth, dtype=torch.float64).round().long().tolist()


def check_fits(
    teacher: StudentConfig, student: StudentConfig, layers: list[int] | None = None, where: str | Path = CONFIG_NAME
) -> None:
    """Refuse a student that is no part of this teacher, naming the first key that does not fit and what would.

    Raises:
        ConfigError: it names `where`, key, value, the teacher's value and the nearest valid choice.
    """
    for key in (
        "num_channels",
        "text_encoder_output_dim",
        *(("patch_size", "freq_dim", "eps") if student.is_wan else ()),
    ):
        ours, theirs = getattr(student, key), getattr(teacher, key)
        if ours != theirs:
            raise ConfigError(
                f'{where}: {key}={ours} does not fit this teacher, which has {theirs}; edit the line to "{key}": {theirs}'
            )
    for key in ("depth", "hidden_size", *(("ffn_dim", "num_heads") if student.is_wan else ())):
        ours, theirs = getattr(student, key), getattr(teacher, key)
        if ours > theirs:
            raise ConfigError(f"{where}: {key}={ours} is more than the teacher's {theirs}; use {theirs} or less")
    if student.is_wan and student.head_dim != teacher.head_dim:
        near = max(1, round(student.hidden_size / teacher.head_dim))
        raise ConfigError(
            f"{where}: hidden_size={student.hidden_size} with num_heads={student.num_heads} gives heads of {student.head_dim} "
            f"channels, the teacher's have {teacher.head_dim} (its positions depend on that); cut heads instead: "
            f"hidden_size={near * teacher.head_dim} with num_heads={near}"
        )
    if layers is not None:
        _check_layers(layers, teacher.depth, student.depth)


def _check_layers(layers: list[int], teacher_depth: int, depth: int) -> None:
    if len(layers) != depth:
        raise ConfigError(f"--layers names {len(layers)} layers, the student has depth={depth}; name exactly {depth}")
    wrong = [layer for layer in layers if not 0 <= layer < teacher_depth]
    if wrong or sorted(set(layers)) != layers:
        raise ConfigError(
            f"--layers {','.join(map(str, layers))}: allowed are rising numbers from 0 to {teacher_depth - 1}, each once"
        )


def select(teacher: WanTransformer, student: StudentConfig, layers: list[int] | None = None) -> Selection:
    """Choose the part of `teacher` that becomes a wan student of this shape, by weight norm; None spreads the layers evenly."""
    selection = Selection(layers or spread_layers(teacher.config.depth, student.depth))
    norms = cache(lambda name: squared_norms(teacher.read(name)))  # several axes ask for the same weights
    for axis, (size, kept, group) in axis_sizes(teacher.config, student, selection.layers).items():
        if kept < size:
            selection.axes[axis] = _largest(_score_axis(norms, axis, selection.layers), kept, group)
    return selection


def axis_sizes(teacher: StudentConfig, student: StudentConfig, layers: list[int]) -> dict[str, tuple[int, int, int]]:
    """Return for each axis its size in the teacher, how many entries are kept, and how many stay together (those of a head)."""
    width = (teacher.hidden_size, student.hidden_size)
    sizes = {axis: (*width, 1) for axis in ("channels", "text_channels", "time_hidden", "text_hidden")}
    for layer in layers:
        sizes |= {f"{attention}.{layer}": (*width, teacher.head_dim) for attention in ("attn1", "attn2")}
        sizes[f"neurons.{layer}"] = (teacher.ffn_dim, student.ffn_dim, 1)
    return sizes


def _largest(scores: Tensor, kept: int, group: int) -> Tensor:
    """Return in rising order the indices of the `kept` entries with the largest scores, chosen a group at a time."""
    group_scores = scores.unflatten(0, (-1, group)).sum(dim=1)
    groups = group_scores.topk(kept // group).indices.sort().values
    return (groups[:, None] * group + torch.arange(group)).flatten()


def _score_axis(norms: Callable[[str], tuple[Tensor, Tensor]], axis: str, layers: list[int]) -> Tensor:
    """Score each entry of an axis by weight norms: of what writes to a channel, or of what enters and leaves a hidden unit.

    Args:
        norms: gives the squared norms of a weight's rows and columns, by the weight's name.
    """
    embedder = "condition_embedder"
    if axis == "channels":
        writers = ["attn1.to_out.0.weight", "attn2.to_out.0.weight", "ffn.net.2.weight"]
        names = ["patch_embedding.weight", *(f"blocks.{layer}.{writer}" for layer in layers for writer in writers)]
        return sum((norms(name)[0] for name in names), start=torch.zeros(()))
    if axis == "text_channels":
        return norms(f"{embedder}.text_embedder.linear_2.weight")[0]
    if axis in ("time_hidden", "text_hidden"):
        into = f"{embedder}.{axis.removesuffix('_hidden')}_embedder.linear_1.weight"
        out_of = into.replace("linear_1", "linear_2")
    else:
        kind, layer = axis.split(".")
        inside = ("ffn.net.0.proj", "ffn.net.2") if kind == "neurons" else (f"{kind}.to_v", f"{kind}.to_out.0")
        into, out_of = (f"blocks.{layer}.{name}.weight" for name in inside)
    return norms(into)[0] * norms(out_of)[1]


def squared_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared norm of each row and each column, summed in float32 in one pass over the memory, without a copy."""
    rows, columns = [], torch.zeros(())
    for part in weight.flatten(1).split(ROWS_AT_A_TIME):
        part = part.float()
        rows.append(torch.linalg.vector_norm(part, dim=1).square())
        columns = columns + part.square().sum(dim=0)
    return torch.cat(rows), columns
