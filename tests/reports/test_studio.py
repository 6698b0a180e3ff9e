"""What the playground draws is what generate_images.py draws, and what it cannot draw is answered in a sentence.

The students are tiny ones that train_distillation.py saved; the page itself is tested in tests/commands/test_playground.py.

pytest tests/reports/test_studio.py
"""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate_images
from support.students import train_student, write_teacher
from wandistiller.errors import UserError
from wandistiller.flags import ComputeFlags
from wandistiller.model.image_sizes import ImageSize
from wandistiller.reports.playground_page import answer_html
from wandistiller.reports.studio import Answer, Picture, Request, Row, Studio, find_students

ASKED = Request(student="student", prompt="a red circle", seed=3, noises=2)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("studio")
    write_teacher(root / "teacher", seed=5)
    train_student(root, root / "teacher", "--guidance_scale", "3", "--num_samples", "0")
    return root


def studio_of(house: Path, outputs: Path) -> Studio:
    students = find_students(str(outputs), None)
    return Studio(students, compute=ComputeFlags(device="cpu"), prompt_cache=str(house / "cache"))


@pytest.fixture(scope="module")
def studio(house) -> Studio:
    return studio_of(house, house)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_it_draws_what_generate_images_draws_with_the_same_metadata(house, studio, tmp_path):
    answer = studio.draw(replace(ASKED, with_teacher=True, steps=3))
    assert [row.who for row in answer.rows] == ["teacher", "student"] and not answer.notes
    for row in answer.rows:
        argv = ["--student", str(house / "student"), "--model", row.who, "--prompt", "a red circle", "a red circle"]
        argv += ["--seed", "3", "--num_inference_steps", "3", "--batch_size", "2", "--output", str(tmp_path / row.who)]
        assert generate_images.main([*argv, "--prompt_cache", str(house / "cache"), "--device", "cpu"]) == 0
        files = sorted((tmp_path / row.who).glob("0*.png"))
        assert [picture.seed for picture in row.pictures] == [3, 4] and row.seconds > 0
        for file, picture in zip(files, row.pictures, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(file)), pixels(picture.png))
            assert Image.open(io.BytesIO(picture.png)).info == Image.open(file).info
            assert f"seed{picture.seed}" in picture.name and picture.name.endswith(f"_{row.who}.png")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width": 40}, "width 40 is not a multiple of 16"),
        ({"height": 16_000, "width": 16_000}, "allowed: at most"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"seed": -1}, "seed is -1; allowed: 0 to"),
        ({"steps": 0}, "steps is 0; allowed: 1 to 1000"),
        ({"student": "../student"}, "there is no student '../student'; choose one of: student"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(studio, changes, sentence):
    with pytest.raises(UserError) as caught:
        studio.draw(replace(ASKED, **changes))
    assert sentence in str(caught.value) and len(str(caught.value)) < 500


def test_a_size_it_never_saw_and_a_text_too_long_are_drawn_with_a_sentence(studio):
    answer = studio.draw(replace(ASKED, noises=1, width=48, prompt="red " * 600))
    assert pixels(answer.rows[0].pictures[0].png).shape == (32, 48, 3)
    assert len(answer.notes) == 2
    assert "trained at 32 x 32 pixels alone" in answer.notes[0] and "longer than the 512 tokens" in answer.notes[1]


def test_a_student_whose_vae_is_gone_says_so_and_another_is_drawn_all_the_same(house, tmp_path):
    shutil.copytree(house / "student", tmp_path / "lost")
    shutil.copytree(house / "student", tmp_path / "there")
    shutil.copytree(house / "teacher", tmp_path / "teacher", ignore=shutil.ignore_patterns("vae"))
    record = json.loads((tmp_path / "lost" / "student_config.json").read_text(encoding="utf-8"))
    record["distillation"]["teacher_path"] = str(tmp_path / "teacher")
    (tmp_path / "lost" / "student_config.json").write_text(json.dumps(record), encoding="utf-8")
    both = studio_of(house, tmp_path)
    with pytest.raises(UserError, match="has no VAE beside it"):
        both.draw(replace(ASKED, student="lost"))
    assert both.draw(replace(ASKED, student="there")).rows
    shutil.rmtree(tmp_path / "there")
    with pytest.raises(UserError, match="there is no such folder"):
        both.draw(replace(ASKED, student="there"))


def test_weights_that_a_run_has_written_anew_are_read_again(house, tmp_path):
    shutil.copytree(house / "student", tmp_path / "student")
    own = studio_of(house, tmp_path)
    before = own.draw(ASKED).rows[0].pictures[0].png
    from wandistiller import WanLiteStudent

    student = WanLiteStudent.from_pretrained(tmp_path / "student")
    for parameter in student.parameters():
        parameter.data.mul_(1.5)
    student.save_pretrained(tmp_path / "student")
    assert own.draw(ASKED).rows[0].pictures[0].png != before


def test_students_are_those_with_weights_and_the_named_one_comes_first(house, tmp_path):
    for name in ("old", "new"):
        shutil.copytree(house / "student", tmp_path / "outputs" / name)
    (tmp_path / "outputs" / "unfinished").mkdir()
    found = find_students(str(tmp_path / "outputs"), str(tmp_path / "outputs" / "old"))
    assert list(found) == ["old", "new"]
    for outputs, student, words in (
        (tmp_path / "none", None, "holds no folder of a trained student"),
        (tmp_path / "outputs", tmp_path / "none", "there is no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            find_students(str(outputs), student and str(student))


def test_what_was_typed_is_escaped():
    asked = Request(student="demo", prompt="<script>alert(1)</script>", seed=7)
    answer = Answer(asked, ImageSize(48, 64), [Row("student", 4, [Picture(b"p", 'a"b.png', 7)], 0.25)], ["<b>"])
    page = answer_html(answer) + answer_html(None, UserError("<i>"))
    assert "<script>" not in page and "&lt;script&gt;" in page and 'download="a&#34;b.png"' in page
    assert "<b>" not in page and "<i>" not in page
