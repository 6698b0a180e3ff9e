"""A run's metrics.jsonl, read back: each line is one `StepMetrics`. Standard library only.

The plots and the summary read it. The file only tells of a run:
whatever is in it, or in its place, neither ends a command nor keeps a run from being resumed.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wandistiller.files.json_files import parse_json
from wandistiller.step_metrics import NUM_BUCKETS

logger = logging.getLogger(__name__)

LARGEST = 1e100
ERRORS = ("velocity_error", "embedding_error", "new_word_error")  # of a student; the other two of a text encoder


def read_metrics(path: Path) -> list[dict]:
    """Return a dict for every step, in order; the last line of a step counts.

    Lines that are not what a run writes are left out with a warning; a last line that a kill cut short needs none.
    """
    if not path.is_file():
        return []
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        logger.warning("%s: left out, it cannot be read (%s)", path, error.strerror)
        return []
    found = {number: _line(text) for number, text in enumerate(texts, start=1) if text.strip()}
    odd = [number for number, line in found.items() if line is None and number < len(texts)]
    if odd:
        logger.warning("%s: left out %d lines that are no step's metrics, the first is line %d", path, len(odd), odd[0])
    steps = {line["step"]: line for line in found.values() if line is not None}
    return [steps[step] for step in sorted(steps)]


def _line(text: bytes) -> dict | None:
    """Return the metrics of a step that a line holds, or None if it is not a line that a run writes."""
    try:
        line = parse_json(text.decode("utf-8"))
    except ValueError:  # bytes that are no UTF-8, or a JsonError
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**53:
        return None
    return line if all(fits(line[name]) for name, fits in _KINDS.items() if name in line) else None


def _is_number(value: Any) -> bool:
    # A larger one is damaged, and no axis could hold it; NaN is what a run may measure.
    return type(value) in (int, float) and not abs(value) >= LARGEST


def _is_by_sigma(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (0, NUM_BUCKETS)
        and all(loss is None or _is_number(loss) for loss in value)
    )


# What each value of a line must be where it is there.
_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("loss", "grad_norm", "lr", "samples_per_s", "elapsed_s", "eta_s"), _is_number),
    "loss_by_sigma": _is_by_sigma,
    "held_out": lambda found: found is None or (isinstance(found, dict) and all(map(_is_number, found.values()))),
}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if all are."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def newest_held_out(lines: Sequence[dict]) -> dict[str, float] | None:
    """Return what was last measured on held-out prompts, by name; None if nothing was."""
    return next((line["held_out"] for line in reversed(lines) if line.get("held_out")), None)


def held_out_text(found: Mapping[str, float]) -> str:
    """Return what was measured on held-out prompts as it is shown to people."""
    errors = {name: f"relative {name.replace('_', ' ')} {found[name]:.3f}" for name in ERRORS if name in found}
    parts = list(errors.values())
    if "endpoint" in found and "steps" in found:
        near = f", as near as the teacher in {found['teacher_steps']:.1f} steps" if "teacher_steps" in found else ""
        parts.append(f"pictures in {found['steps']:.0f} steps at {found['endpoint']:.3f} from the teacher's{near}")
    return "; ".join(parts)


def measured(lines: Sequence[dict], name: str) -> list[tuple[int, float]]:
    """Return step and value of each held-out measurement of a name."""
    return [(line["step"], line["held_out"][name]) for line in lines if name in (line.get("held_out") or {})]


def training_seconds(lines: Sequence[dict]) -> float:
    """Return the seconds of the loop over all commands of the run. Each command counts from its own start."""
    total = before = 0.0
    for elapsed_s in (line["elapsed_s"] for line in lines if "elapsed_s" in line):
        if elapsed_s < before:
            total += before
        before = elapsed_s
    return total + before
