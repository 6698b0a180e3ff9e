"""A run shows its steps as a bar or as plain lines, and every step is a line of metrics.jsonl, also after a kill."""

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
from wandistiller.reports.trackers import MetricsFile
from wandistiller.step_metrics import StepMetrics, Stopwatch


def metrics_at(step: int, **changes) -> StepMetrics:
    return replace(StepMetrics(step, 0.5 / step, 1.25, 1e-4, 8.0, float(step), 100.0 - step), **changes)


def show(steps: list[StepMetrics], is_terminal: bool = False, **options) -> str:
    """Let a run take these steps; return what it shows."""
    screen = io.StringIO()
    screen.isatty = lambda: is_terminal
    with contextlib.redirect_stderr(screen), Progress(**{"num_steps": 100} | options) as progress:
        for step in steps:
            progress.step(step)
    return screen.getvalue()


def write(folder: Path, steps: range, first_step: int = 0) -> list[int]:
    """Write the metrics of these steps; return all steps that are in the file after each."""
    file = MetricsFile(folder / "metrics.jsonl", first_step)
    for step in steps:
        file.step(metrics_at(step))
        assert read_metrics(folder)[-1]["step"] == step, "a killed run keeps what it has measured"
    file.close()
    return [line["step"] for line in read_metrics(folder)]


def open_and_die(file: Path) -> None:
    MetricsFile(file, first_step=30)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_before_the_first_step_after_a_stop_loses_no_metrics(tmp_path):
    write(tmp_path, range(1, 36))  # five beyond the checkpoint
    process = fork(open_and_die, tmp_path / "metrics.jsonl")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 31))


def test_metrics_with_a_hole_and_a_step_twice_keep_what_they_say_of_each_step(tmp_path):
    write(tmp_path, [1, 2, 4, 5, 5, 6, 7])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as broken:
        broken.write('{"step": 8, "lo')
    assert write(tmp_path, range(6, 7), first_step=5) == [1, 2, 4, 5, 6]
    line = read_metrics(tmp_path)[3]
    expected = {
        "step": 5,
        "loss": 0.1,
        "grad_norm": 1.25,
        "lr": 1e-4,
        "samples_per_s": 8.0,
        "elapsed_s": 5.0,
        "eta_s": 95,
    }
    assert line | expected == line


def test_plain_lines_where_there_is_no_terminal():
    shown = show([metrics_at(step) for step in range(1, 101)])
    lines = shown.splitlines()
    assert [int(line[5:8]) for line in lines] == [*range(1, 101, 10), 100]  # first, every 10 s, last
    assert lines[0] == "step 001/100 (1.0%) | loss 0.5 | grad 1.25 | lr 1.0e-04 | 8.0 samples/s | eta 1m39s"
    assert not {"\r", "\x1b"} & set(shown)


def test_a_terminal_gets_a_bar_with_loss_and_rate():
    last = show([metrics_at(step) for step in (2, 3)], is_terminal=True, num_steps=3, first_step=1).split("\r")[-1]
    assert "3/3" in last and "loss 0.1667" in last and "samples/s" in last


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_held_out_error_is_shown_when_measured_and_then_beside_the_loss(is_terminal):
    measured = {2: {"velocity_error": 0.4321}, 3: {"velocity_error": 0.1234}}
    steps = [metrics_at(step, held_out=measured.get(step)) for step in (1, 2, 3, 4)]
    shown = show(steps, is_terminal, line_every_s=0.0)
    assert "step 2: held out, relative velocity error 0.432" in shown
    assert shown.count("relative velocity error") == 2
    assert shown.index("loss 0.5") < shown.index("held-out 0.432") < shown.index("held-out 0.123")


def test_rate_and_remaining_time_are_those_of_the_last_minute_without_the_first_step():
    now = [100.0]
    stopwatch = Stopwatch(num_steps=1000, steps_before=10, clock=lambda: now[0])

    def after(seconds: float, step: int) -> tuple[float, float, float]:
        now[0] += seconds
        return stopwatch.lap(step, 4)

    assert after(10, 11) == pytest.approx((0.4, 10, 9890))  # warming up: all there is to go by
    assert after(2, 12) == pytest.approx((2, 12, 2 * 988))
    for step in range(13, 200):
        fast = after(2, step)
    for step in range(200, 212):  # a neighbour takes half of the machine
        slow = after(5, step)
    assert fast[0] == pytest.approx(2) and slow[0] == pytest.approx(4 / 4.4)  # 12 of the last 15 steps
    for step in range(212, 216):
        slow = after(5, step)
    assert slow[0] == pytest.approx(0.8) and slow[2] == pytest.approx(5 * 785)


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (90, "1m30s"), (4000, "1h06m")])
def test_durations_read_as_people_write_them(seconds, text):
    assert format_duration(seconds) == text
