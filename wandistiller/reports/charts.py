"""Line charts as the numbers that an inline SVG is made of: points, ticks and colours; the page's template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wandistiller.reports.metrics import bucket_name, mean_of
from wandistiller.reports.plots import smoothing_groups
from wandistiller.step_metrics import NUM_BUCKETS

WIDTH, HEIGHT = 480, 270  # of the SVG's own units, which a narrow page shows at about a pixel each
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24
LARGEST = 1e100  # a larger value, or none, is a damaged one, which no axis could hold
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart: its name, its points in the SVG's units, and its colour and width."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    width: float

    @property
    def path(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """A chart: ticks are (place in the SVG's units, text)."""

    title: str
    lines: Sequence[ChartLine]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def run_charts(lines: Sequence[dict]) -> list[Chart]:
    """Return the charts of a run's metrics: the loss, total and by noise level, and the held-out error if it was measured."""
    charts = [_loss_chart([line for line in lines if "loss" in line]), _held_out_chart(lines)]
    return [chart for chart in charts if chart is not None]


def _loss_chart(lines: Sequence[dict]) -> Chart | None:
    groups = smoothing_groups(lines) if lines else []
    curves: list[tuple[str, str, float, Points]] = []
    for bucket in reversed(range(NUM_BUCKETS)):
        means = [
            mean_of(line["loss_by_sigma"][bucket] for line in group if line.get("loss_by_sigma")) for group in groups
        ]
        points = [(group[-1]["step"], mean) for group, mean in zip(groups, means, strict=True) if mean is not None]
        hue = 275 - 230 * bucket / (NUM_BUCKETS - 1)
        curves.append((f"sigma {bucket_name(bucket, NUM_BUCKETS)}", f"hsl({hue:.0f} 65% 50%)", 1.2, points))
    total = [(group[-1]["step"], mean_of(line["loss"] for line in group)) for group in groups]
    curves.append(("all", "currentColor", 2.5, [(step, mean) for step, mean in total if mean is not None]))
    return _chart("Loss: squared velocity error over optimiser steps, smoothed", curves)


def _held_out_chart(lines: Sequence[dict]) -> Chart | None:
    measured = [line for line in lines if line.get("velocity_error")]
    colors = {"teacher_states": "hsl(212 65% 50%)", "student_states": "hsl(24 75% 50%)"}
    curves = [
        (
            f"at {name.replace('_', ' ')}",
            color,
            2.5,
            [(line["step"], line["velocity_error"][name]) for line in measured if name in line["velocity_error"]],
        )
        for name, color in colors.items()
    ]
    return _chart("Held-out error: relative velocity error over optimiser steps", curves)


def _chart(title: str, curves: Sequence[tuple[str, str, float, Points]]) -> Chart | None:
    """Place curves of name, colour, width and points in a chart; None where there is nothing to draw."""
    there = [(*curve[:3], [point for point in curve[3] if abs(point[1]) < LARGEST]) for curve in curves]
    there = [curve for curve in there if curve[3]]
    xs, ys = ([point[axis] for curve in there for point in curve[3]] for axis in (0, 1))
    if not xs:
        return None
    is_log = min(ys) > 0  # the loss of a student that equals its teacher is zero, which has no logarithm
    scale = math.log10 if is_log else float
    x_place = _placing(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_place = _placing(scale(min(ys)), scale(max(ys)), HEIGHT - BOTTOM, TOP)
    lines = [
        ChartLine(name, [(x_place(x), y_place(scale(y))) for x, y in points], color, width)
        for name, color, width, points in there
    ]
    return Chart(
        title,
        lines,
        [(x_place(tick), f"{tick:,.0f}") for tick in _ticks(min(xs), max(xs)) if tick == round(tick)],
        [(y_place(scale(tick)), f"{tick:g}") for tick in (_log_ticks if is_log else _ticks)(min(ys), max(ys))],
    )


def _placing(low: float, high: float, first: float, last: float):
    """Return the function that puts `low` at `first` and `high` at `last`; a single value lies in the middle."""
    if high == low:
        return lambda value: (first + last) / 2
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    if low == high:
        return [low]
    ticks = map(float, MaxNLocator(nbins=5, steps=[1, 2, 5, 10]).tick_values(low, high))
    return [round(tick, 12) for tick in ticks if low <= tick <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten where the values span enough of them, else evenly spaced ticks."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1, 2, 5) if len(exponents) < 5 else (1,)
    ticks = [float(f"{first}e{exponent}") for exponent in exponents for first in leading]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 2 else _ticks(low, high)
