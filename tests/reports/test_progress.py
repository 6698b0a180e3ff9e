"""A run shows its steps as a bar or as plain lines, and every step is a line of metrics.jsonl, also after a kill.

pytest tests/reports/test_progress.py
"""

import contextlib
import io
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from support.processes import fork
from support.runs import read_metrics
from wandistiller.reports.progress import Progress, format_duration
from wandistiller.step_metrics import StepMetrics, Stopwatch


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool = False):
        super().__init__()
        self.isatty = lambda: is_terminal


def metrics_at(step: int, **changes) -> StepMetrics:
    return replace(StepMetrics(step, 0.5 / step, 1.25, 1e-4, 8.0, float(step), 100.0 - step), **changes)


def show(folder: Path, steps: list[StepMetrics], is_terminal: bool = False, **options) -> str:
    """Let a run take these steps; return what it shows."""
    options = {"num_steps": 100, "metrics_path": folder / "metrics.jsonl"} | options
    with contextlib.redirect_stderr(Screen(is_terminal)) as screen, Progress(**options) as progress:
        for step in steps:
            progress.step(step)
    return screen.getvalue()


def kept_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def enter_and_die(file: Path) -> None:
    with Progress(60, file, first_step=30):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_before_the_first_step_after_a_stop_loses_no_metrics(tmp_path):
    show(tmp_path, [metrics_at(step) for step in range(1, 36)])  # five beyond the checkpoint
    process = fork(enter_and_die, tmp_path / "metrics.jsonl")
    process.join()
    assert process.exitcode == -signal.SIGKILL and kept_steps(tmp_path) == list(range(1, 31))


def test_metrics_with_a_hole_and_a_step_twice_keep_what_they_say_of_each_step(tmp_path):
    show(tmp_path, [metrics_at(step) for step in (1, 2, 4, 5, 5, 6, 7)])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as broken:
        broken.write('{"step": 8, "lo')
    show(tmp_path, [metrics_at(6)], first_step=5)
    assert kept_steps(tmp_path) == [1, 2, 4, 5, 6]


def test_plain_lines_when_not_a_terminal_and_one_metrics_line_a_step(tmp_path):
    file, fails = tmp_path / "metrics.jsonl", pytest.raises(RuntimeError)
    with fails, contextlib.redirect_stderr(Screen()) as screen, Progress(100, file, line_every_s=10.0) as progress:
        for step in range(1, 101):
            progress.step(metrics_at(step))
            assert len(read_metrics(tmp_path)) == step  # a killed run keeps what it has measured
        raise RuntimeError
    lines = screen.getvalue().splitlines()
    assert [int(line[5:8]) for line in lines] == [*range(1, 101, 10), 100]  # first, every 10 s, last
    assert lines[0] == "step 001/100 (1.0%) | loss 0.5 | grad 1.25 | lr 1.0e-04 | 8.0 samples/s | eta 1m39s"
    assert not {"\r", "\x1b"} & set(screen.getvalue())
    line = read_metrics(tmp_path)[6]
    expected = {"step": 7, "loss": 0.5 / 7, "grad_norm": 1.25, "lr": 1e-4, "samples_per_s": 8.0, "elapsed_s": 7.0}
    assert line | expected == line and line["eta_s"] == 93.0


def test_a_terminal_gets_a_bar_with_loss_rate_and_remaining_time(tmp_path):
    last = show(tmp_path, [metrics_at(step) for step in (1, 2, 3)], is_terminal=True, num_steps=3).split("\r")[-1]
    assert "3/3" in last and "loss 0.1667" in last and "samples/s" in last
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_held_out_error_is_shown_when_measured_and_then_beside_the_loss_also_after_a_stop(tmp_path, is_terminal):
    measured = {2: {"teacher_states": 0.4321}, 3: {"teacher_states": 0.1234}}
    steps = [metrics_at(step, velocity_error=measured.get(step)) for step in (1, 2, 3, 4)]
    shown = show(tmp_path, steps, is_terminal, line_every_s=0.0)
    assert "step 2: relative velocity error 0.432 at the teacher's states" in shown
    assert shown.count("relative velocity error") == 2
    assert shown.index("loss 0.5") < shown.index("held-out 0.432") < shown.index("held-out 0.123")
    assert (", held-out 0.123, " if is_terminal else "| loss 0.125 | held-out 0.123 | grad") in shown
    assert [line["velocity_error"] for line in read_metrics(tmp_path)] == [None, measured[2], measured[3], None]
    shown = show(tmp_path, [metrics_at(3)], is_terminal, first_step=2)
    assert "held-out 0.432" in shown and "0.123" not in shown


def test_rate_and_remaining_time_count_from_the_first_step_on():
    stopwatch = Stopwatch(num_steps=5)
    stopwatch.start_s -= 10
    assert stopwatch.lap(1, 4) == pytest.approx((0.4, 10, 40), rel=0.1)  # warming up: all there is to go by
    stopwatch.first_step_s -= 2
    assert stopwatch.lap(2, 4) == pytest.approx((2, 10, 6), rel=0.1)


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (90, "1m30s"), (4000, "1h06m")])
def test_durations_read_as_people_write_them(seconds, text):
    assert format_duration(seconds) == text
