"""How far a run is: a bar on a terminal, and plain lines elsewhere."""

import math
import sys

from tqdm import tqdm

from wandistiller.reports.metrics import held_out_text
from wandistiller.step_metrics import StepMetrics

LINE_EVERY_S = 10.0  # plain lines are at least this far apart, so that a long job's log stays readable


class Progress:
    """Shows every step; use as a context manager.

    A terminal gets a bar; anything else gets plain lines, at least `line_every_s` apart.
    """

    def __init__(self, num_steps: int, first_step: int = 0, line_every_s: float = LINE_EVERY_S):
        self.num_steps, self.first_step, self.line_every_s = num_steps, first_step, line_every_s
        self.stream = sys.stderr
        self._next_line_s = -math.inf
        self._held_out: dict[str, float] | None = None
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        if self.stream.isatty():
            self._bar = tqdm(total=self.num_steps, initial=self.first_step, unit="step", file=self.stream)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, metrics: StepMetrics) -> None:
        self._held_out = metrics.held_out or self._held_out
        shown = [f"loss {metrics.loss:.4g}"]
        if self._held_out:
            shown.append(f"held-out {next(iter(self._held_out.values())):.3f}")
        rate = f"{metrics.samples_per_s:.1f} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join([*shown, rate]))
            self._bar.update()
        elif metrics.elapsed_s >= self._next_line_s or metrics.step == self.num_steps:
            self._next_line_s = metrics.elapsed_s + self.line_every_s
            done = f"{metrics.step:0{len(str(self.num_steps))}d}/{self.num_steps} ({metrics.step / self.num_steps:.1%})"
            rest = [f"grad {metrics.grad_norm:.3g}", f"lr {metrics.lr:.1e}", rate]
            eta = f"eta {format_duration(metrics.eta_s)}"
            print(" | ".join([f"step {done}", *shown, *rest, eta]), file=self.stream, flush=True)
        if metrics.held_out:
            tqdm.write(f"step {metrics.step}: held out, {held_out_text(metrics.held_out)}", file=self.stream)


def format_duration(seconds: float) -> str:
    """Write seconds as people do: 90 as '1m30s', 4000 as '1h06m'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
