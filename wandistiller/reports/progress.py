"""What a run shows while it trains: a progress bar, or plain lines where there is no terminal, and metrics.jsonl."""

import contextlib
import json
import math
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from wandistiller.files.atomic import write_text
from wandistiller.reports.metrics import (
    FIRST_AND_LAST,
    held_out_error,
    held_out_text,
    read_metrics,
)
from wandistiller.step_metrics import StepMetrics

LINE_EVERY_S = 10.0  # plain lines are at least this far apart, so that a long job's log stays readable


class Progress:
    """Shows every step and writes it to metrics.jsonl; use as a context manager.

    A terminal gets a bar; anything else gets plain lines, at least `line_every_s` apart. A run that resumes after `first_step`
    steps keeps their metrics. A file that cannot be written is told of once, and the run goes on without it.
    """

    def __init__(self, num_steps: int, metrics_path: Path, line_every_s: float = LINE_EVERY_S, first_step: int = 0):
        self.num_steps = num_steps
        self.first_step = first_step
        self.metrics_path = metrics_path
        self.line_every_s = line_every_s
        self.stream = sys.stderr
        self._last_line_s = -math.inf
        self._file: TextIO | None = None
        self._held_out: dict[str, float] | None = None
        self._num_first = max(1, num_steps // FIRST_AND_LAST)
        self._num_noted = 0
        self._first_losses: list[float] = []
        self._last_losses: deque[float] = deque(maxlen=self._num_first)

    def __enter__(self) -> "Progress":
        # A killed run may have written steps beyond those that this one resumes from. A kill here loses no step before them:
        kept = [line for line in read_metrics(self.metrics_path) if line["step"] <= self.first_step]
        self._held_out = held_out_error(kept)
        for line in kept:
            self._note_loss(line["step"], line.get("loss", math.nan))
        try:
            write_text(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = self.metrics_path.open("a", encoding="utf-8")
        except OSError as error:
            self._go_on_without_file(error)
        is_terminal = self.stream.isatty()
        self._bar = (
            tqdm(total=self.num_steps, initial=self.first_step, unit="step", file=self.stream) if is_terminal else None
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been told of
                self._file.close()

    def step(self, metrics: StepMetrics) -> None:
        """Show a step and write it down."""
        self._held_out = metrics.velocity_error or self._held_out
        self._note_loss(metrics.step, metrics.loss)
        if self._file is not None:
            try:
                self._file.write(json.dumps(asdict(metrics)) + "\n")
                self._file.flush()  # a killed run keeps what it has measured
            except OSError as error:
                self._go_on_without_file(error)
        if self._bar is not None:
            shown = [f"loss {metrics.loss:.4g}", *self._held_out_part(), f"{metrics.samples_per_s:.1f} samples/s"]
            shown += self._change_part()
            self._bar.set_postfix_str(", ".join(shown))
            self._bar.update()
        elif self._is_due(metrics):
            print(self.line(metrics), file=self.stream, flush=True)
        if metrics.velocity_error:
            tqdm.write(f"step {metrics.step}: {held_out_text(metrics.velocity_error)}", file=self.stream)

    def _held_out_part(self) -> list[str]:
        """Return the newest held-out error at the teacher's states, which is shown beside the loss; nothing before there is one."""
        return [f"held-out {self._held_out['teacher_states']:.3f}"] if self._held_out else []

    def _note_loss(self, step: int, loss: float) -> None:
        self._num_noted += 1
        if step <= self._num_first:
            self._first_losses.append(loss)
        self._last_losses.append(loss)

    def _change_part(self) -> list[str]:
        """Return the mean loss of the last steps as a share of that of the first tenth; nothing before these are two."""
        if self._num_noted < 2 * self._num_first or not self._first_losses:
            return []
        first, last = (statistics.fmean(losses) for losses in (self._first_losses, self._last_losses))
        return [f"{last / first:.0%} of the first tenth's loss"] if first > 0 and math.isfinite(last / first) else []

    def _go_on_without_file(self, error: OSError) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written is tried again
                self._file.close()
            self._file = None
        print(
            f"Warning: {self.metrics_path} cannot be written ({error.strerror}); the run goes on without it",
            file=self.stream,
        )

    def _is_due(self, metrics: StepMetrics) -> bool:
        due = metrics.elapsed_s - self._last_line_s >= self.line_every_s or metrics.step in (1, self.num_steps)
        if due:
            self._last_line_s = metrics.elapsed_s
        return due

    def line(self, metrics: StepMetrics) -> str:
        """Return the plain line of a step."""
        digits = len(str(self.num_steps))
        parts = [
            f"step {metrics.step:0{digits}d}/{self.num_steps} ({metrics.step / self.num_steps:.1%})",
            f"loss {metrics.loss:.4g}",
            *self._held_out_part(),
            f"grad {metrics.grad_norm:.3g}",
            f"lr {metrics.lr:.1e}",
            f"{metrics.samples_per_s:.1f} samples/s",
            *self._change_part(),
            f"eta {format_duration(metrics.eta_s)}",
        ]
        return " | ".join(parts)


class Countdown:
    """Prints how far a counted job is and how long it will still take, in lines at least `line_every_s` apart."""

    def __init__(self, what: str, total: int, line_every_s: float = LINE_EVERY_S):
        self.what, self.total, self.line_every_s = what, total, line_every_s
        self.start_s = self._last_line_s = time.perf_counter()
        self.first: int | None = None  # what was done when this process began; a resumed job does not start at 0

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if self.first is None:
            self.first, self.start_s = done, now
        if done < self.total and now - self._last_line_s < self.line_every_s:
            return
        self._last_line_s = now
        seconds = (now - self.start_s) / max(1, done - self.first) * (self.total - done)
        print(f"{self.what}: {done}/{self.total} | eta {format_duration(seconds)}", file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Write seconds as people do: 90 as '1m30s', 4000 as '1h06m'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
