"""metrics.jsonl read back, for the plot, the summary and the model card of a run. Standard library only."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FIRST_AND_LAST = 10  # what counts as the first and the last steps of a run: a tenth of it


def read_metrics(path: Path) -> list[dict]:
    """One dict a step, by step; a line that a kill has cut short is left out, and of two of one step the last counts."""
    if not path.is_file():
        return []
    lines = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            lines[int(line["step"])] = line
        except (ValueError, KeyError, TypeError):
            continue
    return [lines[step] for step in sorted(lines)]


def mean_of(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def ends(lines: Sequence[dict]) -> tuple[Sequence[dict], Sequence[dict]]:
    """The first and the last steps of a run."""
    count = max(1, len(lines) // FIRST_AND_LAST)
    return lines[:count], lines[-count:]


def loss_change(lines: Sequence[dict]) -> tuple[float, float]:
    """Mean loss of the first and of the last steps."""
    first, last = ends(lines)
    return mean_of(line["loss"] for line in first), mean_of(line["loss"] for line in last)


def loss_change_by_sigma(lines: Sequence[dict]) -> list[tuple[float | None, float | None]]:
    """The same in each bucket of sigma, from the lowest."""
    first, last = ends(lines)
    return [
        tuple(mean_of(line["loss_by_sigma"][bucket] for line in part) for part in (first, last))
        for bucket in range(len(lines[0].get("loss_by_sigma", [])))
    ]


def held_out_error(lines: Sequence[dict]) -> dict[str, float] | None:
    """The newest relative velocity error on held-out prompts, where one was measured."""
    return next((line["velocity_error"] for line in reversed(lines) if line.get("velocity_error")), None)


def training_seconds(lines: Sequence[dict]) -> float:
    """Of the loop, over all the processes that went on with the run, each of which counts from its own start."""
    total = before = 0.0
    for line in lines:
        if line["elapsed_s"] < before:
            total += before
        before = line["elapsed_s"]
    return total + before


def bucket_name(bucket: int, num_buckets: int) -> str:
    """The noise levels of a bucket: 0.9-1.0."""
    return f"{bucket / num_buckets:.1f}-{(bucket + 1) / num_buckets:.1f}"


NUM_BUCKETS = 10


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step reports; seconds count from the start of the loop.

    Attributes:
        teacher_calls: batches the teacher has answered so far.
        loss_by_sigma: mean squared velocity error of the step's samples in ten equal buckets of sigma; None where a bucket
            is empty.
        loss_by_expert: the same at the noise levels of either expert, where the teacher has two.
        feature_loss: what the error of hidden states adds to the loss; None for an answer that brings none.
        velocity_error: relative error on held-out prompts, at the states where it was measured; None at most steps.
        memory_bytes: the most that the first process has held so far: tensors on a GPU, or resident memory on the CPU.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    samples_per_s: float
    elapsed_s: float
    eta_s: float
    teacher_calls: int = 0
    loss_by_sigma: list[float | None] = field(default_factory=list)
    loss_by_expert: dict[str, float | None] | None = None
    feature_loss: float | None = None
    velocity_error: dict[str, float] | None = None
    memory_bytes: int | None = None


def mean_by_sigma(sigmas: Sequence[float], values: Sequence[float]) -> list[float | None]:
    """Mean of the values in equal buckets of sigma [0, 1]; sigma 1 counts to the last."""
    buckets: list[list[float]] = [[] for _ in range(NUM_BUCKETS)]
    for sigma, value in zip(sigmas, values, strict=True):
        buckets[min(int(sigma * NUM_BUCKETS), NUM_BUCKETS - 1)].append(value)
    return [sum(bucket) / len(bucket) if bucket else None for bucket in buckets]


def mean_by_expert(sigmas: Sequence[float], values: Sequence[float], boundary: float) -> dict[str, float | None]:
    """Mean of the values at the noise levels of either expert; sigma = `boundary` is the high-noise one's."""
    sides: dict[str, list[float]] = {"high": [], "low": []}
    for sigma, value in zip(sigmas, values, strict=True):
        sides["high" if sigma >= boundary else "low"].append(value)
    return {name: sum(side) / len(side) if side else None for name, side in sides.items()}
