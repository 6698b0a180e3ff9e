"""An evaluation as rows of a table, and as values that JSON can hold.

pytest tests/reports/test_tables.py
"""

import math

from wandistiller.reports.tables import comparison_rows, finite, table_lines

BOTH = {"student": 1.0, "teacher": 2.0, "ratio": 0.5}
NOISE = {"mean_error": 0.1, "noise_error": 0.3, "teacher_noise": 0.4, "norm_ratio": 0.75, "cosine": 0.8, "gain": 0.6}
FEWER = {"latent_relative_error": {3: 0.4}, "student_equals": {"at_least_steps": 3, "fewer_than_steps": None}}
RESULTS = {
    "endpoint": {"latent_relative_error": 0.2, "psnr_db": 20.0, "ssim": 0.9},
    "teacher_at_fewer_steps": FEWER,
    "noise": NOISE | {"meaning": "In words."},
    "high_frequency_energy": BOTH,
    "cost": {"step_flops": BOTH},
}


def rows_of(results: dict) -> dict[str, list[str]]:
    return {name: values for name, *values in comparison_rows(results)}


def test_json_values_are_finite():
    assert finite({"a": [1.0, math.nan], "b": {"c": math.inf, "d": "nan"}}) == {
        "a": [1.0, None],
        "b": {"c": None, "d": "nan"},
    }


def test_rows_hold_the_student_the_teacher_and_their_ratio():
    rows = rows_of(RESULTS)
    assert rows["what the prompt decides: error"] == ["0.1", "", ""]
    assert rows["what the noise decides: size"] == ["0.3", "0.4", "0.75"]
    assert rows["step flops"] == ["1", "2", "0.5"]
    assert not any("teacher in 3 steps" in name for name in rows)


def test_the_screen_has_the_teacher_in_fewer_steps_and_what_the_figures_mean():
    text = "\n".join(table_lines(RESULTS))
    assert "teacher in 3 steps" in text and "equals the teacher at 3 steps or more" in text and "In words." in text


def test_what_could_not_be_measured_is_a_dash():
    rows = rows_of(RESULTS | {"noise": dict.fromkeys(NOISE) | {"meaning": "In words."}})
    assert rows["what the noise decides: size"] == ["-", "-", "-"]
