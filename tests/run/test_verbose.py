"""--verbose prints when each part of the start was done.

pytest tests/run/test_verbose.py
"""

import re

from support.runs import PRUNED_CONFIG

LINE = re.compile(r"^ *(\d+\.\d\d) s  (.+)$", re.MULTILINE)
PARTS = [
    "headers of the teacher read, output folder taken",
    "prompts encoded, or found in their cache",
    "teacher read and projected",
    "student read and projected",
    "first step taken",
]


def test_verbose_prints_each_part_once_in_the_order_of_time(train, teachers):
    outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 2, "--verbose")
    assert outcome.code == 0
    seconds, parts = zip(*LINE.findall(outcome.out), strict=True)
    assert list(map(float, seconds)) == sorted(map(float, seconds))
    assert [part for part in parts if part in PARTS] == PARTS


def test_the_last_line_is_the_first_step(train, teachers):
    outcome = train(teachers.one, PRUNED_CONFIG, "--max_steps", 3, "--verbose")
    assert LINE.findall(outcome.out)[-1][1] == "first step taken"


def test_without_verbose_nothing_is_printed_of_it(train, teachers):
    train(teachers.one, PRUNED_CONFIG, "--max_steps", 1, "--verbose")
    assert not LINE.findall(train(teachers.one, PRUNED_CONFIG, "--max_steps", 1).out)
