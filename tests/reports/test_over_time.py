"""While a run goes on it says where its pictures are and how far the loss has come, and it ends with a strip over time.

pytest tests/reports/test_over_time.py
"""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from support.runs import PRUNED_CONFIG
from wandistiller.files.output_folder import set_aside_previous_student
from wandistiller.reports.over_time import STUDENT_ROW, save_strip, spread_out
from wandistiller.reports.progress import Progress
from wandistiller.step_metrics import StepMetrics

CELL = 160 + 8  # pixels of a drawn prompt in a sample picture, with its margin


def write_sample(folder, step: int, shade: int, student_row: object = 30) -> None:
    """A sample picture of 40 rows of pixels, whose teacher is white and whose student has one shade."""
    picture = np.full((40, 200, 3), 255, np.uint8)
    picture[30:] = shade
    (folder / "samples").mkdir(exist_ok=True)
    about = PngInfo()
    about.add_itxt(STUDENT_ROW, str(student_row))
    Image.fromarray(picture).save(folder / "samples" / f"step_{step:06d}.png", pnginfo=about)


def test_a_run_says_where_its_pictures_are_and_ends_with_a_strip_of_them(train, teachers, tmp_path):
    flags = ("--guidance_scale", 1, "--num_samples", 2, "--max_steps", 6, "--sample_every", 2, "--lr", 1e-2)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags)
    folder = tmp_path / "out"
    assert outcome.code == 0, outcome.err
    for step in (2, 4):
        assert f"step {step}: pictures in {folder / 'samples'}" in outcome.err
    assert f"Over time: {folder / 'samples_over_time.png'}" in outcome.out
    strip = np.asarray(Image.open(folder / "samples_over_time.png"))
    students = [
        np.asarray(Image.open(folder / "samples" / f"step_{step:06d}.png"))[-CELL:, -2 * CELL :] for step in (2, 4, 6)
    ]
    assert (students[0] != students[2]).any()
    bands = [strip[row : row + CELL, -2 * CELL :] for row in range(len(strip) - CELL + 1)]
    places = [next((row for row, band in enumerate(bands) if (band == student).all()), None) for student in students]
    assert None not in places and places == sorted(places)
    teacher = np.asarray(Image.open(folder / "samples" / "step_000006.png"))[: places[0] // 2]
    np.testing.assert_array_equal(strip[: len(teacher)], teacher)


def test_the_strip_has_at_most_ten_times_and_passes_by_what_is_no_sample(tmp_path):
    assert save_strip(tmp_path) is None
    write_sample(tmp_path, 0, 10)
    assert save_strip(tmp_path) is None, "a single time is no strip"
    for step in range(1, 26):
        write_sample(tmp_path, step, 10 * step)
    strip = np.asarray(Image.open(save_strip(tmp_path)))
    assert strip[-1, -1, 0] == 250 and (strip[:30, -1] == 255).all()
    seen = {int(value) for value in strip[:, -1, 0]} - {255}
    assert len(seen) == 10 and {10, 250} <= seen
    for step, row in enumerate(("here", "-3", "4000", ""), start=100):
        write_sample(tmp_path, step, 7, row)
    (tmp_path / "samples" / "step_000200.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "samples" / "step_x.png").write_bytes(b"")
    far_too_large = Image.new("1", (13_000, 13_000))
    far_too_large.save(tmp_path / "samples" / "step_000300.png")
    assert 7 not in np.asarray(Image.open(save_strip(tmp_path)))[:, -1, 0]
    assert (set_aside_previous_student(tmp_path) / "samples_over_time.png").is_file()


@pytest.mark.parametrize(("count", "most", "expected"), [(3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (100, 2, [0, 99])])
def test_what_is_shown_of_many_is_spread_from_the_first_to_the_last(count, most, expected):
    assert spread_out(range(count), most) == expected


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_line_holds_the_loss_against_the_first_tenth_also_after_a_stop(tmp_path, monkeypatch, is_terminal):
    def show(first_step: int, steps: range) -> list[str]:
        screen = io.StringIO()
        screen.isatty = lambda: is_terminal
        monkeypatch.setattr("sys.stderr", screen)
        with Progress(40, tmp_path / "metrics.jsonl", line_every_s=0.0, first_step=first_step) as progress:
            for step in steps:  # 8 in the first tenth of 40 steps, then 4, then 2
                loss = 8.0 if step <= 4 else 4.0 if step <= 20 else 2.0
                progress.step(StepMetrics(step, loss, 1.0, 1e-4, 8.0, float(step), 1.0))
        return screen.getvalue().replace("\r", "\n").splitlines()

    lines = show(0, range(1, 25))
    assert not any("first tenth" in line for line in lines[:7])
    assert "25% of the first tenth's loss" in lines[-1] and any(
        "50% of the first tenth's loss" in line for line in lines
    )
    assert "31% of the first tenth's loss" in show(22, range(23, 24))[-1]
    metrics = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert "first" not in metrics
