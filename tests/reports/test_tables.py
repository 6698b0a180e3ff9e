"""An evaluation as sentences, as rows of a table, and as values that JSON can hold."""

import math

import pytest

from wandistiller.reports.tables import comparison_rows, finite, frontier_lines, nearness, report_lines, worst_prompts

BOTH = {"student": 1.0, "teacher": 2.0, "ratio": 0.5}
NOISE = {"norm_ratio": 0.75, "cosine": 0.8, "gain": 0.6}
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
    "endpoint": {"latent_relative_error": 0.2},
    "frontier": FRONTIER,
    "noise": NOISE,
    "cost": {"step_flops": BOTH},
    "picture": {
        "text encoder": {"bytes": 2**30, "flops": 1e9, "seconds": 3.0},
        "student": {"bytes": 2**20, "flops": 2e9, "seconds": 1.0},
        "teacher": {"bytes": 2**22, "flops": 3e10, "seconds": 15.0},
        "VAE": {"bytes": 2**21, "flops": 4e9, "seconds": 2.0},
    },
    "worst_prompts": worst_prompts(["a", "b", "c", "d"], [0.1, 0.9, 0.3, 0.2]),
}


def rows_of(results: dict) -> dict[str, list[str]]:
    return {name: values for name, *values in comparison_rows(results)}


def test_json_values_are_finite():
    assert finite({"a": [1.0, math.nan], "b": {"c": math.inf, "d": "nan"}}) == {
        "a": [1.0, None],
        "b": {"c": None, "d": "nan"},
    }


def test_rows_hold_the_student_the_teacher_their_ratio_and_which_way_is_better():
    rows = rows_of(RESULTS)
    assert rows["what the noise decides: size"] == ["0.75", "", "", "1"]
    assert rows["step flops"] == ["1", "2", "0.5", "lower"]
    judged = {"student": {"correct": 0.5, "clip": 0.25}, "teacher": {"correct": 1.0, "clip": 0.5}}
    rows = rows_of(RESULTS | {"accuracy": judged})
    assert rows["prompt drawn right"] == ["50.0%", "100.0%", "0.5", "higher"] and rows["  clip"][:2] == ["0.25", "0.5"]
    rows = rows_of(RESULTS | {"noise": dict.fromkeys(NOISE)})
    assert rows["what the noise decides: size"][0] == "-", "what could not be measured is a dash"


def test_the_screen_begins_with_a_sentence_and_the_worst_prompts():
    lines = report_lines(RESULTS)
    text = " ".join(lines)
    assert text.strip().startswith(
        "In 8 steps the student is as near to the teacher's pictures as the teacher itself in 3.4 steps"
    )
    assert "at 7.0% of the cost of the teacher's picture in all of its 4: 2.3 times cheaper" in text
    assert "Farthest from the teacher: 'b' (0.9); 'c' (0.3); 'd' (0.2)" in lines
    cells = [line.split() for line in lines]
    assert ["student", "8", "Euler", "7.00%", "0.5", "0.200", "-", "0.900", "-", "3.4", "2.3"] in cells
    assert ["teacher", "4", "Euler", "20.00%", "0.5", "0.200", "-", "0.900", "-"] in cells
    assert ["text", "encoder", "1024", "1", "3", "50.0%", "15.0%"] in cells and [
        "VAE",
        "2",
        "4",
        "2",
        "33.3%",
        "10.0%",
    ] in cells
    assert ["student", "1", "2", "1", "16.7%"] in cells and ["teacher", "4", "30", "15", "75.0%"] in cells
    short = report_lines({name: value for name, value in RESULTS.items() if name != "frontier"})
    assert "at a relative distance of 0.2" in short[1]


@pytest.mark.parametrize(
    ("worth", "words"),
    [
        ({"teacher_steps": None, "at_least": False, "times_cheaper": None}, "is farther from"),
        ({"teacher_steps": 10.0, "at_least": True, "times_cheaper": 7.0}, "in more than 10 steps, at 7.0% of"),
    ],
)
def test_a_student_off_the_teachers_curve_is_told_so(worth, words):
    of_one = FRONTIER | {"rows": [FRONTIER["rows"][0], FRONTIER["rows"][1] | {"steps": 1}]}
    assert "a teacher of one step has no fewer" in nearness(of_one)
    frontier = FRONTIER | {"rows": [FRONTIER["rows"][0] | worth, FRONTIER["rows"][1]]}
    assert words in nearness(frontier)
    (row,) = [line for line in frontier_lines(frontier) if line.split()[:1] == ["student"]]
    assert row.split()[-2:] == ([">10", ">7"] if worth["at_least"] else ["-", "-"])
