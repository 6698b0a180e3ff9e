"""docs/scaling.md and docs/memory.md hold the tables that their script computes, and the script agrees with a hand.

Hours of an epoch and traffic between GPUs are reckoned anew in the tests, from shapes alone.

pytest tests/benchmarks/test_scaling.py
"""

import re
import subprocess
import sys

import pytest

from benchmarks import pages, scaling
from support.runs import ROOT


def test_the_pages_hold_exactly_the_tables_that_the_script_prints():
    printed = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "scaling.py"], capture_output=True, text=True, check=True
    ).stdout
    found = []
    for path in scaling.PAGES:
        page = path.read_text(encoding="utf-8")
        tables = re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", page, re.DOTALL)
        found += [name for name, _ in tables]
        for name, table in tables:
            assert f"<!-- table: {name} -->\n{table}<!-- end -->\n" in printed, "python benchmarks/scaling.py --write"
        assert pages.with_tables(page, "table", scaling.TABLES) == page
    assert sorted(found) == sorted(scaling.TABLES)


def test_hours_of_an_epoch_reckoned_by_hand():
    tokens, width, ffn, layers, heads_width = 64 * 64, 5120, 13824, 40, 5120
    teacher = 2 * layers * (2 * tokens * (6 * width**2 + 2 * width * ffn) + 4 * tokens**2 * heads_width)
    tokens, width, ffn, layers = 64 * 64, 1536, 8960, 20
    student = 4 * layers * (2 * tokens * (6 * width**2 + 2 * width * ffn) + 4 * tokens**2 * width)
    hours = 1e6 * (teacher + student) / (0.33 * 989e12) / 3600
    assert scaling.epoch_hours(1, 0.33) == pytest.approx(hours, rel=0.04)  # the text's share is small
    assert scaling.epoch_hours(64, 0.33) == pytest.approx(hours / 64, rel=0.04)


def test_traffic_reckoned_by_hand():
    sent = list(scaling.traffic(scaling.workload(8)).values())
    assert sent[0] == pytest.approx(2 * 7 / 8 * 4 * 954_589_760)
    assert sent[2] == pytest.approx(7 / 8 * 2 * 2 * 14_288_491_584, rel=0.02)
