"""The plot of a run: losses by noise level and held-out error; as loss.png, and as SVG inside gallery.html."""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.files.atomic import atomic_path
from wandistiller.reports.metrics import bucket_name, mean_of, read_metrics
from wandistiller.reports.trackers import Tracker
from wandistiller.step_metrics import NUM_BUCKETS, StepMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

NUM_POINTS = 40  # points of a curve, each the mean of equally many steps
REDRAW_EVERY_S = 30.0
REDRAW_SHARE = 0.01  # drawing takes at most this share of a run's time
GREY, BLACK, BLUE = "#c4c4c4", "#202020", "#2f6db3"


class LossPlot(Tracker):
    """Keeps a plot of metrics.jsonl up to date, at no more than REDRAW_SHARE of the time and with every sample picture."""

    def __init__(self, metrics_path: Path, file: Path):
        self.metrics_path, self.file = metrics_path, file
        self._next_s = time.perf_counter() + REDRAW_EVERY_S

    def step(self, metrics: StepMetrics) -> None:
        if time.perf_counter() >= self._next_s:
            self.close()

    def picture(self, step: int, picture: "Image") -> None:
        self.close()

    def close(self) -> None:
        """Draw the plot."""
        start_s = time.perf_counter()
        if lines := [line for line in read_metrics(self.metrics_path) if "loss" in line]:
            with atomic_path(self.file) as beside:
                loss_figure(lines).savefig(beside, format="png")
        now = time.perf_counter()
        self._next_s = now + max(REDRAW_EVERY_S, (now - start_s) / REDRAW_SHARE)


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

    measured = [
        (line["step"], line["velocity_error"]["teacher_states"]) for line in lines if line.get("velocity_error")
    ]
    figure = Figure(figsize=(9, 7.5 if measured else 5), dpi=110, layout="constrained")
    panels = figure.subplots(
        2 if measured else 1, sharex=True, squeeze=False, height_ratios=[2, 1] if measured else [1]
    )
    _plot_losses(panels[0, 0], lines)
    if measured:
        panels[1, 0].plot(*zip(*measured, strict=True), color=BLUE, marker="o", markersize=4)
        _finish(panels[1, 0], "relative velocity error,\nheld-out states")
    panels[-1, 0].set_xlabel("optimiser step")
    return figure


def _plot_losses(axes, lines: Sequence[dict]) -> None:
    from matplotlib import colormaps

    size = -(-len(lines) // NUM_POINTS)
    steps = [line["step"] for line in lines]

    def plot_means(values: Sequence[float | None], **style) -> None:
        parts = [slice(start, start + size) for start in range(0, len(lines), size)]
        means = [(steps[part][-1], mean_of(values[part])) for part in parts]
        points = [point for point in means if point[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else None, markersize=4, **style)

    losses = [line["loss"] for line in lines]
    axes.plot(steps, losses, color=GREY, linewidth=0.8)
    for bucket in reversed(range(NUM_BUCKETS)):
        color = colormaps["viridis"]((bucket + 0.5) / NUM_BUCKETS)
        values = [line["loss_by_sigma"][bucket] if line.get("loss_by_sigma") else None for line in lines]
        plot_means(values, color=color, label=f"sigma {bucket_name(bucket, NUM_BUCKETS)}")
    plot_means(losses, color=BLACK, linewidth=2, label="all")
    _finish(axes, "loss: relative squared error" + (", smoothed" if size > 1 else ""))


def _finish(axes, what: str) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    if any(value > 0 for line in axes.get_lines() for value in line.get_ydata()):
        # Not if the student equals its teacher, since zero has no logarithm. Ticks are plain numbers: 0.5, not 5 x 10^-1.
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else range(1, 10)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter("")
    axes.set_ylabel(what)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
