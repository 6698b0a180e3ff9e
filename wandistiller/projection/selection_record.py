"""The part of its teacher that a student was made of, as projection_report.json holds it, for what is cut for the student later."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.json_files import JsonError, load_json
from wandistiller.model.config import CONFIG_NAME, ConfigError, StudentConfig
from wandistiller.projection.selection import Selection, axis_sizes, check_fits, select
from wandistiller.wan.wan_files import WanFiles

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
    """Return the shape of a teacher and what is kept of each of its axes that is cut, as JSON values."""
    axes = {name: ranges_of(kept.tolist()) for name, kept in selection.axes.items()}
    return {"teacher": teacher.to_dict(), "axes": axes}


def ranges_of(indices: list[int]) -> str:
    """Return rising indices as ranges, such as "0-3,7"; heads of 128 channels are then short."""
    starts = [i for i, index in enumerate(indices) if i == 0 or index != indices[i - 1] + 1]
    ends = [*starts[1:], len(indices)]
    pairs = [(indices[start], indices[end - 1]) for start, end in zip(starts, ends, strict=True)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def indices_of(text: object, size: int) -> Tensor | None:
    """Return the indices that `ranges_of` wrote; None where the text is none of its, or they lie beyond `size`."""
    if not isinstance(text, str) or not _RANGES.fullmatch(text):
        return None
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not int(first) <= int(last or first) < size or len(found) > size:
            return None
        found.extend(range(int(first), int(last or first) + 1))
    return torch.tensor(found) if found == sorted(set(found)) else None


def read_made_of(folder: str | Path, config: StudentConfig, wan_files: WanFiles | None) -> MadeOf:
    """Read what the student in a folder was made of.

    A report of an earlier version names layers and channels alone. The rest was ranked by weight norm, and is ranked again.

    Args:
        wan_files: the student's teacher, which only such a report needs.

    Raises:
        UserError: it was not made of a teacher, or the report is missing or damaged or needs the teacher.
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
    if not isinstance(layers, list) or not all(map(_is_layer, layers)) or expert not in ("high", "low"):
        raise _damaged(path)
    if "selection" not in report:
        return _select_again(path, report, config, wan_files)
    record = report["selection"]
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("axes"), dict)
        or not isinstance(record.get("teacher"), dict)
    ):
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


def _select_again(path: Path, report: dict, config: StudentConfig, wan_files: WanFiles | None) -> MadeOf:
    if report.get("calibration"):
        raise UserError(
            f"{path}: is of an earlier version, which did not write down what --selection calibrated selects; make the student "
            "again, or take one that was selected by weight norm"
        )
    if wan_files is None:
        raise UserError(
            f"{path}: is of an earlier version, which did not write down all of what was selected; give --teacher_path the "
            "student's teacher, and it is ranked again"
        )
    expert = report.get("expert", "high")
    transformer = wan_files.expert(expert)
    selection = select(transformer, config, report["layers"])
    channels = selection.axes.get("channels", torch.arange(config.hidden_size)).tolist()
    if report.get("channels", channels) != channels:
        raise UserError(
            f"{wan_files.location}: is not the teacher that this student was made of: other channels of it are the strongest; "
            "give --teacher_path the one it was made of"
        )
    return MadeOf(transformer.config, expert, selection)
