"""An evaluation as rows of a table, and as values that JSON can hold.

pytest tests/reports/test_tables.py
"""

import math

import pytest

from wandistiller.reports.tables import comparison_rows, finite, noise_lines


def test_json_values_are_finite():
    assert finite({"a": [1.0, math.nan], "b": {"c": math.inf, "d": "nan"}}) == {
        "a": [1.0, None],
        "b": {"c": None, "d": "nan"},
    }


@pytest.fixture
def results() -> dict:
    both = {"student": 1.0, "teacher": 2.0, "ratio": 0.5}
    noise = {
        "mean_error": 0.1,
        "noise_error": 0.3,
        "teacher_noise": 0.4,
        "norm_ratio": 0.75,
        "cosine": 0.8,
        "gain": 0.6,
    }
    return {
        "endpoint": {"latent_relative_error": 0.2, "psnr_db": 20.0, "ssim": 0.9},
        "noise": noise | {"meaning": "In words."},
        "high_frequency_energy": both,
        "cost": {},
    }


def test_what_the_noise_decides_has_rows(results: dict):
    rows = {name: values for name, *values in comparison_rows(results)}
    assert rows["what the prompt decides: error"] == ["0.1", "", ""]
    assert rows["what the noise decides: size"] == ["0.3", "0.4", "0.75"]
    assert rows["what the noise decides: gain"] == ["0.6", "", ""]


def test_one_noise_of_each_prompt_leaves_its_rows_empty(results: dict):
    noise = dict.fromkeys(results["noise"]) | {"meaning": "In words."}
    lines = noise_lines(noise, lambda name, *cells: f"{name}: {cells}")
    assert "  size: (None, None, None)" in lines and lines[-1] == "  In words."
