"""--verbose says where the time until the first step went, once, in parts that add up.

pytest tests/run/test_start_clock.py
"""

import re
import time

import pytest

from support.runs import PRUNED_CONFIG
from wandistiller.run import start_clock
from wandistiller.run.start_clock import StartClock

TITLE = "Time to the first step:"


def parts_of(table: str) -> dict[str, float]:
    """Seconds by part, from the lines after the title."""
    lines = re.findall(r"^  (\S.*?) +([\d.]+) s +\d+%$", table.partition(TITLE)[2], re.MULTILINE)
    return {name: float(seconds) for name, seconds in lines}


def test_the_parts_are_what_lay_between_the_laps(monkeypatch):
    now = iter([10.0, 12.0, 12.001, 17.0])
    monkeypatch.setattr(start_clock.time, "perf_counter", lambda: next(now))
    clock = StartClock()
    clock.lap("reading")
    clock.lap("nothing to speak of")
    assert clock.first_step(4.0)
    assert not clock.first_step(9.0)
    assert parts_of(clock.table()) == pytest.approx(
        {"reading": 2.0, "optimiser set up, checkpoint read": 1.0, "first step": 4.0, "in all": 7.0}, abs=0.005
    )


def test_verbose_prints_once_where_the_time_went_and_it_adds_up(train, teachers, monkeypatch):
    monkeypatch.setattr(start_clock, "SHOWN_FROM_S", 0.0)  # however quick a part is here
    start_s = time.perf_counter()
    outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 2, "--verbose")
    whole_s = time.perf_counter() - start_s
    assert outcome.code == 0 and outcome.out.count(TITLE) == 1
    parts = parts_of(outcome.out)
    total_s = parts.pop("in all")
    assert {"prompts encoded, or found in their cache", "teacher read and projected", "first step"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(total_s, abs=0.1)
    assert 0 < total_s < whole_s + 0.01


def test_without_verbose_nothing_is_said_of_it(train, teachers):
    assert TITLE not in train(teachers.one, PRUNED_CONFIG, "--max_steps", 1).out
