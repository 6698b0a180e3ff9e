"""An evaluation as rows of a table, and as values that JSON can hold.

pytest tests/reports/test_tables.py
"""

import math

from wandistiller.reports.tables import comparison_rows, finite, nearness, table_lines

BOTH = {"student": 1.0, "teacher": 2.0, "ratio": 0.5}
NOISE = {"mean_error": 0.1, "noise_error": 0.3, "teacher_noise": 0.4, "norm_ratio": 0.75, "cosine": 0.8, "gain": 0.6}
WORTH = {"teacher_steps": 3.4, "at_least": False, "times_cheaper": 2.3}
DRAWN = {"sampler": "Euler", "seconds": 0.5, "endpoint": 0.2, "noise_cosine": None, "noise_size": 0.9, "right": None}
FRONTIER = {
    "num_prompts": 3,
    "num_seeds": 1,
    "recommended_steps": 8,
    "rows": [
        {"who": "student", "steps": 8, "cost": 0.07, **DRAWN, **WORTH},
        {"who": "teacher", "steps": 4, "cost": 0.2, **DRAWN},
    ],
}
RESULTS = {
    "endpoint": {"latent_relative_error": 0.2, "psnr_db": 20.0},
    "frontier": FRONTIER,
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
    assert rows["cost of a picture, 8 steps; teacher as near"] == ["7.00%", "16.10%", "0.4348"]


def test_the_screen_has_both_in_fewer_steps_and_what_the_figures_mean():
    lines = [line.split() for line in table_lines(RESULTS)]
    assert ["student", "8", "Euler", "7.00%", "0.5", "0.200", "-", "0.900", "-", "3.4", "steps", "2.3x"] in lines
    assert ["teacher", "4", "Euler", "20.00%", "0.5", "0.200", "-", "0.900", "-"] in lines
    text = "\n".join(table_lines(RESULTS))
    assert "In 8 steps the student is as near" in text and "in 3.4 steps, and 2.3 times cheaper" in text
    assert "In words." in text
    worse = {"teacher_steps": None, "at_least": False, "times_cheaper": None}
    better = {"teacher_steps": 10.0, "at_least": True, "times_cheaper": 7.0}
    for worth, words in ((worse, "is farther from"), (better, "in more than 10 steps, and more than 7 times")):
        assert words in nearness(FRONTIER | {"rows": [FRONTIER["rows"][0] | worth]})


def test_what_could_not_be_measured_is_a_dash():
    rows = rows_of(RESULTS | {"noise": dict.fromkeys(NOISE) | {"meaning": "In words."}})
    assert rows["what the noise decides: size"] == ["-", "-", "-"]
