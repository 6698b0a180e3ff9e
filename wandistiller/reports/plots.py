"""The plot of a run: losses by noise level and held-out error; as loss.png, and as SVG inside gallery.html."""

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.files.atomic import atomic_path
from wandistiller.reports.metrics import bucket_name, mean_of, read_metrics
from wandistiller.step_metrics import NUM_BUCKETS, StepMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

NUM_POINTS = 40  # points of a curve, each the mean of equally many steps
REDRAW_EVERY_S = 30.0
REDRAW_SHARE = 0.01  # drawing takes at most this share of a run's time
GREY, BLACK = "#c4c4c4", "#202020"


class LossPlot:
    """A tracker that keeps a plot of metrics.jsonl up to date, at no more than REDRAW_SHARE of the time."""

    def __init__(self, metrics_path: Path, file: Path, clock: Callable[[], float] = time.perf_counter):
        self.metrics_path, self.file, self._clock = metrics_path, file, clock
        self._next_s = clock() + REDRAW_EVERY_S
        self._is_behind = True

    def step(self, metrics: StepMetrics) -> None:
        self._is_behind = True
        if self._clock() >= self._next_s:
            self._draw()

    def picture(self, step: int, picture: "Image") -> None:
        """Bring the plot to the step of a sample picture; the picture itself has no place in it."""
        self._draw()

    def close(self) -> None:
        if self._is_behind:
            self._draw()

    def _draw(self) -> None:
        start_s = self._clock()
        if lines := [line for line in read_metrics(self.metrics_path) if "loss" in line]:
            save_loss_plot(lines, self.file)
        self._is_behind = False
        now = self._clock()
        self._next_s = now + max(REDRAW_EVERY_S, (now - start_s) / REDRAW_SHARE)


def save_loss_plot(lines: Sequence[dict], file: Path) -> None:
    """Write the plot of a run's metrics."""
    with atomic_path(file) as beside:
        loss_figure(lines).savefig(beside, format="png")


def loss_svg(lines: Sequence[dict]) -> str:
    """Return the plot of a run's metrics as an SVG element; nothing where no loss is known. It holds no text of any file."""
    from matplotlib import rc_context

    known = [line for line in lines if "loss" in line]
    if not known:
        return ""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "loss"}):  # letters as text, and the same ids every time
        loss_figure(known).savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def loss_figure(lines: Sequence[dict]) -> "Figure":
    """Plot the loss over steps, total and by noise level, and below it the held-out error if measured."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and asks for a screen

    measured = [line for line in lines if line.get("velocity_error")]
    figure = Figure(figsize=(9, 7.5 if measured else 5), dpi=110, layout="constrained")
    panels = figure.subplots(
        2 if measured else 1, sharex=True, squeeze=False, height_ratios=[2, 1] if measured else [1]
    )
    _plot_losses(panels[0, 0], lines)
    if measured:
        _plot_held_out(panels[1, 0], measured)
    panels[-1, 0].set_xlabel("optimiser step")
    return figure


def _plot_losses(axes, lines: Sequence[dict]) -> None:
    from matplotlib import colormaps

    groups = smoothing_groups(lines)
    steps = [group[-1]["step"] for group in groups]
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color=GREY, linewidth=0.8)
    num_buckets = NUM_BUCKETS if any(line.get("loss_by_sigma") for line in lines) else 0
    for bucket in reversed(range(num_buckets)):
        means = [
            mean_of(line["loss_by_sigma"][bucket] for line in group if line.get("loss_by_sigma")) for group in groups
        ]
        points = [(step, mean) for step, mean in zip(steps, means, strict=True) if mean]
        if points:
            color = colormaps["viridis"]((bucket + 0.5) / num_buckets)
            label = f"sigma {bucket_name(bucket, num_buckets)}"
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.3, label=label, **_dot_if_alone(points))
    total = [(step, mean_of(line["loss"] for line in group)) for step, group in zip(steps, groups, strict=True)]
    axes.plot(*zip(*total, strict=True), color=BLACK, linewidth=2, label="all", **_dot_if_alone(total))
    _finish(axes, "loss: squared velocity error" + (", smoothed" if len(lines) > len(groups) else ""))


def _plot_held_out(axes, measured: Sequence[dict]) -> None:
    points = [(line["step"], line["velocity_error"]["teacher_states"]) for line in measured]
    axes.plot(*zip(*points, strict=True), color="#2f6db3", marker="o", markersize=4)
    _finish(axes, "relative velocity error,\nheld-out states")


def _finish(axes, what: str) -> None:
    if any(value > 0 for line in axes.get_lines() for value in line.get_ydata()):
        _use_log_scale(axes)  # but not if the student equals its teacher, since zero has no logarithm
    axes.set_ylabel(what)
    axes.grid(which="major", color="#e4e4e4")
    axes.grid(which="minor", color="#f2f2f2", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def _use_log_scale(axes) -> None:
    """Use a log scale with plain numbers at the ticks: 0.5, not 5 x 10^-1."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 5 else range(1, 10)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter("")


def _dot_if_alone(points: Sequence) -> dict:
    """Return a marker for a line of a single point, which would not be seen without it."""
    return {"marker": "o", "markersize": 4} if len(points) == 1 else {}


def smoothing_groups(lines: Sequence[dict]) -> list[Sequence[dict]]:
    """Return the steps in up to NUM_POINTS groups of equal size, whose means are drawn."""
    size = -(-len(lines) // NUM_POINTS)
    return [lines[start : start + size] for start in range(0, len(lines), size)]
