"""A run's metrics.jsonl, read back: each line is one `StepMetrics`. Standard library only.

The plot, the summary and the model card read it. The file only tells of a run:
whatever is in it, or in its place, neither ends a command nor keeps a run from being resumed.
"""

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wandistiller.files.json_files import parse_json
from wandistiller.step_metrics import NUM_BUCKETS

logger = logging.getLogger(__name__)

FIRST_AND_LAST = 10  # the first and the last steps of a run are one part in so many
LARGEST = 1e100
RISE = 1.02  # a smaller rise of the held-out error is not worth a word


def read_metrics(path: Path) -> list[dict]:
    """Return a dict for every step, in order; the last line of a step counts, and what an older version did not measure is not there.

    Lines that are not what a run writes are left out with a warning; a last line that a kill cut short needs none.
    """
    if not path.is_file():
        return []
    try:
        texts = path.read_bytes().split(b"\n")
    except OSError as error:
        logger.warning("%s: left out, it cannot be read (%s)", path, error.strerror)
        return []
    lines, skipped = {}, []
    for number, text in enumerate(texts, start=1):
        line = _line(text)
        if line is not None:
            lines[line["step"]] = line
        elif text.strip() and number < len(texts):
            skipped.append(number)
    if skipped:
        named = ", ".join(map(str, skipped[:10])) + (f" and {len(skipped) - 10} more" if len(skipped) > 10 else "")
        logger.warning("%s: left out what is no step's metrics: line %s", path, named)
    return [lines[step] for step in sorted(lines)]


def _line(text: bytes) -> dict | None:
    """Return what a line says of a step, or None where it is not a line that a run writes."""
    try:
        line = parse_json(text.decode("utf-8"))
    except ValueError:  # bytes that are no UTF-8, or a JsonError
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 2**53:
        return None
    return line if all(fits(line[name]) for name, fits in _KINDS.items() if name in line) else None


def _is_number(value: object) -> bool:
    # A larger one is damaged, and no axis could hold it.
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) >= LARGEST


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_number(value)


def _is_error(value: object) -> bool:
    return value is None or (
        isinstance(value, dict) and "teacher_states" in value and all(map(_is_number, value.values()))
    )


def _is_by_sigma(value: object) -> bool:
    return isinstance(value, list) and len(value) in (0, NUM_BUCKETS) and all(map(_is_number_or_none, value))


# What each value of a line must be where it is there.
_KINDS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("loss", "grad_norm", "lr", "samples_per_s", "elapsed_s", "eta_s"), _is_number),
    "loss_by_sigma": _is_by_sigma,
    "velocity_error": _is_error,
}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None if all are."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def ends(lines: Sequence[dict]) -> tuple[Sequence[dict], Sequence[dict]]:
    """Return the first and the last steps of a run."""
    count = max(1, len(lines) // FIRST_AND_LAST)
    return lines[:count], lines[-count:]


def loss_change(lines: Sequence[dict]) -> tuple[float | None, float | None]:
    """Return the mean loss of the first and of the last steps, as far as the lines say."""
    first, last = ends(lines)
    return mean_of(line.get("loss") for line in first), mean_of(line.get("loss") for line in last)


def loss_change_by_sigma(lines: Sequence[dict]) -> list[tuple[float | None, float | None]]:
    """Return the mean loss of the first and of the last steps in each bucket of sigma, from the lowest."""
    known = [line for line in lines if line.get("loss_by_sigma")]
    first, last = ends(known)

    def mean_in(part: Sequence[dict], bucket: int) -> float | None:
        return mean_of(line["loss_by_sigma"][bucket] for line in part)

    return [(mean_in(first, bucket), mean_in(last, bucket)) for bucket in range(NUM_BUCKETS if known else 0)]


# ---- the held-out error ----


def held_out_error(lines: Sequence[dict]) -> dict[str, float] | None:
    """Return the newest held-out error by kind of state, or None if none was measured."""
    return next((line["velocity_error"] for line in reversed(lines) if line.get("velocity_error")), None)


def held_out_text(errors: Mapping[str, float]) -> str:
    """Return a held-out error as it is shown to people."""
    return f"relative velocity error {errors['teacher_states']:.3f} at the teacher's states"


@dataclass(frozen=True)
class Rise:
    """A held-out error that has risen since it was lowest, and the steps at which both were measured."""

    lowest: float
    lowest_step: int
    last: float
    last_step: int


def rise_of_held_out(lines: Sequence[dict]) -> Rise | None:
    """Return how much the held-out error has risen over the last two measurements or more, while the loss fell.

    None where it has not: the last measurement is less than RISE above the lowest, the lowest is the one before it, or the loss
    between measurements is no lower than it was up to the lowest.
    """
    places = [place for place, line in enumerate(lines) if line.get("velocity_error")]
    if len(places) < 3:
        return None
    errors = [lines[place]["velocity_error"]["teacher_states"] for place in places]
    lowest = errors.index(min(errors))
    if lowest > len(errors) - 3 or errors[-1] < RISE * errors[lowest]:
        return None

    def loss_up_to(number: int) -> float | None:
        first = places[number - 1] + 1 if number else 0
        return mean_of(line.get("loss") for line in lines[first : places[number] + 1])

    loss_then, loss_now = loss_up_to(lowest), loss_up_to(len(places) - 1)
    if loss_then is None or loss_now is None or loss_now >= loss_then:
        return None
    return Rise(errors[lowest], lines[places[lowest]]["step"], errors[-1], lines[places[-1]]["step"])


def training_seconds(lines: Sequence[dict]) -> float:
    """Return the seconds of the loop over all commands of the run. Each command counts from its own start."""
    total = before = 0.0
    for elapsed_s in (line["elapsed_s"] for line in lines if "elapsed_s" in line):
        if elapsed_s < before:
            total += before
        before = elapsed_s
    return total + before


def bucket_name(bucket: int, num_buckets: int) -> str:
    """Name a bucket by its noise levels, as in 0.9-1.0."""
    return f"{bucket / num_buckets:.1f}-{(bucket + 1) / num_buckets:.1f}"
