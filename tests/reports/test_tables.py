"""An evaluation as values that JSON can hold.

pytest tests/reports/test_tables.py
"""

import math

from wandistiller.reports.tables import finite


def test_json_values_are_finite():
    assert finite({"a": [1.0, math.nan], "b": {"c": math.inf, "d": "nan"}}) == {
        "a": [1.0, None],
        "b": {"c": None, "d": "nan"},
    }
