"""The part of its teacher that a student was made of, as projection_report.json holds it: a LoRA is cut by it later."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.json_files import JsonError, load_json
from wandistiller.model.config import CONFIG_NAME, StudentConfig
from wandistiller.projection.selection import Selection, axis_sizes, check_fits

REPORT_NAME = "projection_report.json"
_RANGES = re.compile(r"\d{1,7}(-\d{1,7})?(,\d{1,7}(-\d{1,7})?)*")


def selection_record(teacher: StudentConfig, selection: Selection) -> dict[str, object]:
    """Return the shape of a teacher and the kept indices of each axis that is cut, as JSON values."""
    axes = {name: _ranges_of(kept.tolist()) for name, kept in selection.axes.items()}
    return {"teacher": teacher.to_dict(), "axes": axes}


def _ranges_of(indices: list[int]) -> str:
    """Return rising indices as ranges, such as "0-3,7"; heads of 128 channels are then short."""
    starts = [i for i, index in enumerate(indices) if i == 0 or index != indices[i - 1] + 1]
    ends = [*starts[1:], len(indices)]
    pairs = [(indices[start], indices[end - 1]) for start, end in zip(starts, ends, strict=True)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def composed(first: Selection, second: Selection) -> Selection:
    """Return the part of a teacher that is left where a `first` part of it is cut to a `second` part of that."""
    axes = dict(first.axes)
    for name, kept in second.axes.items():
        axis, _, layer = name.partition(".")
        whole = f"{axis}.{first.layers[int(layer)]}" if layer else axis
        axes[whole] = axes[whole][kept] if whole in axes else kept
    return Selection([first.layers[layer] for layer in second.layers], axes)


def read_made_of(folder: str | Path, config: StudentConfig) -> tuple[StudentConfig, Selection]:
    """Read what the student in a folder was made of: the shape of its teacher, and the kept part.

    Raises:
        UserError: it was not made of a teacher, or the report is missing or damaged.
    """
    path = Path(folder) / REPORT_NAME
    config.check_is_wan(Path(folder) / CONFIG_NAME, "takes no LoRA of one")
    try:
        report = load_json(path)
    except JsonError as error:
        raise UserError(
            f"{path}: {error}; it tells which part of the teacher the student was made of, copy it too"
        ) from None
    if isinstance(report, dict) and report.get("layers") == []:
        raise UserError(
            f"{path}: the student inherited nothing of its teacher (--init_from random), so no LoRA fits it"
        )
    try:
        return _made_of(report, config)
    except (KeyError, TypeError, AttributeError, ValueError):  # which a ConfigError is
        raise UserError(
            f"{path}: does not tell which part of a teacher this student is; copy the student's files again"
        ) from None


def _made_of(report: Mapping, config: StudentConfig) -> tuple[StudentConfig, Selection]:
    layers, record = report["layers"], report["selection"]
    if not all(type(layer) is int for layer in layers):
        raise TypeError("layers are whole numbers")
    teacher = StudentConfig.from_dict(record["teacher"])
    check_fits(teacher, config, layers)
    axes = {
        name: _indices_of(record["axes"][name], size, kept)
        for name, (size, kept, _) in axis_sizes(teacher, config, layers).items()
        if kept < size
    }
    return teacher, Selection(layers, axes)


def _indices_of(text: str, size: int, kept: int) -> Tensor:
    """Return the indices that `_ranges_of` wrote: `kept` rising ones below `size`."""
    if not _RANGES.fullmatch(text):
        raise ValueError(f"no ranges: {text}")
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if len(found) <= kept:  # a stranger's ranges fill no memory
            found.extend(range(int(first), min(int(last or first), size) + 1))
    if len(found) != kept or found != sorted(set(found)) or found[-1] >= size:
        raise ValueError(f"not {kept} rising numbers below {size}: {text}")
    return torch.tensor(found)
