"""Plots: a run's losses and held-out errors (loss.png), and the frontier of an evaluation (frontier.png); both as SVG in gallery.html."""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller import __version__
from wandistiller.files.atomic import atomic_path
from wandistiller.reports.metrics import mean_of, measured, read_metrics
from wandistiller.reports.trackers import Tracker
from wandistiller.step_metrics import NUM_BUCKETS, StepMetrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

NUM_POINTS = 40  # points of a curve, each the mean of equally many steps
NUM_BANDS = 5  # of noise levels that are told apart by colour; more colours cannot be
HELD_OUT = {  # held-out measurements with the titles of their panels
    "velocity_error": "held-out velocity error\n(lower is better)",
    "embedding_error": "held-out embedding error\n(lower is better)",
    "endpoint": "distance to the\nteacher's pictures\n(lower is better)",
}
REDRAW_EVERY_S = 30.0
REDRAW_SHARE = 0.01  # drawing takes at most this share of a run's time
GREY, BLACK, BLUE = "#c4c4c4", "#202020", "#2f6db3"


def as_svg(figure: "Figure") -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "plot"}):  # letters as text, and the same ids every time
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _finish(axes, what: str, axis: str = "y", sign: str = "") -> None:
    """Label an axis, and make it logarithmic with plain numbers for ticks: 0.5, not 5 x 10^-1."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    values = [value for line in axes.get_lines() for value in (line.get_ydata() if axis == "y" else line.get_xdata())]
    axes.set(**{f"{axis}label": what})
    if any(value > 0 for value in values):  # not if the student equals its teacher: zero has no logarithm
        axes.set(**{f"{axis}scale": "log"})
        low, high = axes.get_ylim() if axis == "y" else axes.get_xlim()
        own = axes.yaxis if axis == "y" else axes.xaxis
        own.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else range(1, 10)))
        own.set_major_formatter(StrMethodFormatter("{x:g}" + sign))
        own.set_minor_formatter("")
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ---- a run ----


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
        start_s = time.perf_counter()
        if figure := loss_figure(read_metrics(self.metrics_path)):
            with atomic_path(self.file) as beside:
                figure.savefig(beside, format="png")
        now = time.perf_counter()
        self._next_s = now + max(REDRAW_EVERY_S, (now - start_s) / REDRAW_SHARE)


def loss_figure(lines: Sequence[dict]) -> "Figure | None":
    """Plot the loss over steps, total and by noise level, and below it the held-out error if measured; None without a loss."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and asks for a screen

    lines = [line for line in lines if "loss" in line]
    if not lines:
        return None
    curves = {title: points for name, title in HELD_OUT.items() if (points := measured(lines, name))}
    figure = Figure(figsize=(9, 5 + 2.2 * len(curves)), dpi=110, layout="constrained")
    ratios = [2, *[1] * len(curves)]
    panels = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _plot_losses(panels[0], lines)
    for axes, (title, points) in zip(panels[1:], curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=4)
        _finish(axes, title)
    panels[-1].set_xlabel("optimiser step")
    return figure


def _plot_losses(axes, lines: Sequence[dict]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    size, steps = -(-len(lines) // NUM_POINTS), [line["step"] for line in lines]

    def plot_means(values: Sequence[float | None], **style) -> None:
        parts = [slice(start, start + size) for start in range(0, len(lines), size)]
        means = [(steps[part][-1], mean_of(values[part])) for part in parts]
        points = [point for point in means if point[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else None, markersize=4, **style)

    losses = [line["loss"] for line in lines]
    axes.plot(steps, losses, color=GREY, linewidth=0.8)
    # As many colours as bands, so that a line's colour is that of the bar beside it; the yellow end cannot be seen on white:
    colors = ListedColormap([colormaps["plasma"](0.85 * band / (NUM_BANDS - 1)) for band in range(NUM_BANDS)])
    norm = BoundaryNorm([band / NUM_BANDS for band in range(NUM_BANDS + 1)], NUM_BANDS)
    width = NUM_BUCKETS // NUM_BANDS
    for band in range(NUM_BANDS):
        buckets = slice(band * width, (band + 1) * width)
        plot_means([mean_of((line.get("loss_by_sigma") or [])[buckets]) for line in lines], color=colors(band))
    plot_means(losses, color=BLACK, linewidth=2)
    bar = axes.figure.colorbar(ScalarMappable(norm, colors), ax=axes, label="noise level sigma (black: all)", aspect=12)
    bar.ax.set_yticks([band / NUM_BANDS for band in range(NUM_BANDS + 1)])
    if (second := next((line["step"] for line in lines if line.get("stage") == 2), None)) is not None:
        axes.axvline(second, color=GREY, linestyle="--")
        axes.annotate(" few steps", (second, 1), xycoords=("data", "axes fraction"), va="top", color=BLACK)
    _finish(axes, f"loss: relative squared error{', smoothed' if size > 1 else ''} (lower is better)")


# ---- the frontier ----


def frontier_figure(frontier: dict) -> "Figure":
    """Plot the endpoint error over the FLOPs and over the seconds of a picture; each point tells its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost, factor in zip(panels, ("cost", "seconds"), (100, 1), strict=True):
        for who, color in (("teacher", BLACK), ("student", BLUE)):
            rows = [row for row in frontier["rows"] if row["who"] == who and row["endpoint"] > 0]
            costs, errors = [factor * row[cost] for row in rows], [row["endpoint"] for row in rows]
            axes.plot(costs, errors, color=color, marker="o", markersize=5, label=f"{who}, by its steps")
            for row, *point in zip(rows, costs, errors, strict=True):
                axes.annotate(str(row["steps"]), point, (5, 5), textcoords="offset points", color=color)
                if who == "student" and row["steps"] == frontier["recommended_steps"]:
                    axes.plot(*point, "o", markersize=12, fillstyle="none", color=color, label="recommended steps")
    _finish(panels[0], "FLOPs of a picture, as a share of the teacher's in all steps", "x", " %")
    _finish(panels[1], "seconds of a picture on this machine, without text and VAE", "x")
    _finish(panels[0], "distance to the teacher's picture")
    for axes in panels:
        axes.annotate("better", (0.02, 0.02), (0.12, 0.12), xycoords="axes fraction", arrowprops={"arrowstyle": "->"})
    panels[1].legend(frameon=False)
    return figure


def save_frontier(frontier: dict, file: Path) -> None:
    with atomic_path(file) as beside:
        frontier_figure(frontier).savefig(beside, format="png", metadata={"Software": f"WanDistiller {__version__}"})
