"""The part of its teacher that a student was made of, as projection_report.json holds it: a LoRA is cut by it later."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.json_files import JsonError, load_json
from wandistiller.model.config import CONFIG_NAME, ConfigError, StudentConfig
from wandistiller.projection.selection import Selection, axis_sizes, check_fits

REPORT_NAME = "projection_report.json"
_RANGES = re.compile(r"\d{1,7}(-\d{1,7})?(,\d{1,7}(-\d{1,7})?)*")


@dataclass(frozen=True)
class MadeOf:
    """What a student was made of.

    Attributes:
        teacher: the shape of the teacher.
        expert: which of its experts.
    """

    teacher: StudentConfig
    expert: str
    selection: Selection


def selection_record(teacher: StudentConfig, selection: Selection) -> dict[str, object]:
    """Return the shape of a teacher and the kept indices of each axis that is cut, as JSON values."""
    axes = {name: ranges_of(kept.tolist()) for name, kept in selection.axes.items()}
    return {"teacher": teacher.to_dict(), "axes": axes}


def ranges_of(indices: list[int]) -> str:
    """Return rising indices as ranges, such as "0-3,7"; heads of 128 channels are then short."""
    starts = [i for i, index in enumerate(indices) if i == 0 or index != indices[i - 1] + 1]
    ends = [*starts[1:], len(indices)]
    pairs = [(indices[start], indices[end - 1]) for start, end in zip(starts, ends, strict=True)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def indices_of(text: object, size: int) -> Tensor | None:
    """Return the indices below `size` that `ranges_of` wrote; None if the text is not of that form."""
    if not isinstance(text, str) or not _RANGES.fullmatch(text):
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not int(first) <= int(last or first) < size or len(found) > size:
            return None
        found.extend(range(int(first), int(last or first) + 1))
    return torch.tensor(found) if found == sorted(set(found)) else None


def read_made_of(folder: str | Path, config: StudentConfig) -> MadeOf:
    """Read what the student in a folder was made of.

    Raises:
        UserError: it was not made of a teacher, or the report is missing or damaged.
    """
    path = Path(folder) / REPORT_NAME
    report = _read_report(path)
    if config.block != "wan":
        raise UserError(
            f'{Path(folder) / CONFIG_NAME}: a student of block "{config.block}" is no Wan, and takes no LoRA of one'
        )
    layers, expert = report.get("layers"), report.get("expert", "high")
    if layers == []:
        raise UserError(f"{path}: the student inherited nothing of its teacher (--init random), so no LoRA fits it")
    record = report.get("selection")
    if not isinstance(layers, list) or not all(map(_is_layer, layers)) or expert not in ("high", "low"):
        raise _damaged(path)
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in ("axes", "teacher")):
        raise _damaged(path)
    teacher = StudentConfig.from_dict(record["teacher"], f"{path}, selection.teacher")
    try:
        check_fits(teacher, config, layers, path)
    except ConfigError:
        raise _damaged(path) from None
    return MadeOf(teacher, expert, Selection(layers, _axes(path, record["axes"], teacher, config, layers)))


def _read_report(path: Path) -> dict:
    if not path.is_file():
        raise UserError(
            f"{path}: is not there, and it tells which part of the teacher the student was made of; copy it too"
        )
    try:
        report = load_json(path)
    except JsonError as error:
        raise UserError(f"{path}: {error}; copy it again") from None
    if not isinstance(report, dict):
        raise _damaged(path)
    return report


def _is_layer(layer: object) -> bool:
    return isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < 10**6


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: does not tell which part of a teacher this student is; copy the student's files again")


def _axes(
    path: Path, record: Mapping[str, object], teacher: StudentConfig, config: StudentConfig, layers: list[int]
) -> dict[str, Tensor]:
    """Return the kept indices of every axis that this student has fewer of than its teacher."""
    axes = {}
    for name, (size, kept, _) in axis_sizes(teacher, config, layers).items():
        if kept < size:
            indices = indices_of(record.get(name), size)
            if indices is None or len(indices) != kept:
                raise _damaged(path)
            axes[name] = indices
    return axes
