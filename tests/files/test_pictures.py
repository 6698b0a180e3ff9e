"""PNG files keep any text, captions fit above their pictures, and grids place every picture."""

import time

import numpy as np
import pytest
from PIL import Image

from wandistiller.files.pictures import caption_font, labelled_grid, save_png, stacked_rows, wrap


def test_metadata_keeps_any_text(tmp_path):
    prompt = "ein Kreis, \u7ea2\u8272\u7684\u5706 \u2764 \u201cquoted\u201d"
    save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "a.png", {"prompt": prompt, "seed": 3})
    assert Image.open(tmp_path / "a.png").text == {"prompt": prompt, "seed": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_wrapped_lines_fit_and_lose_nothing():
    font = caption_font()
    text = "several words, and oneverylongwordthatcannotfitonalineofitsown at the end"
    lines = wrap(text, 90)
    assert all(font.getlength(line) <= 90 for line in lines) and len(lines) > 3
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize(
    "text", ["一只红色的猫坐在草地上" * 5000, "word " * 20000, "x" * 50000], ids=["zh", "words", "x"]
)
def test_a_caption_without_end_is_cut_and_costs_a_few_lines(text):
    font = caption_font()
    start = time.perf_counter()
    lines = wrap(text, 160)
    assert time.perf_counter() - start < 1
    assert 2 < len(lines) <= 8 and all(font.getlength(line) <= 160 for line in lines)
    assert lines[-1].endswith("...") and text.replace(" ", "").startswith("".join(lines)[:-3].replace(" ", ""))
    picture = np.zeros((32, 32, 3), np.uint8)
    assert labelled_grid({"student": [picture]}, [text]).height < 400


def test_a_grid_shows_every_picture_at_one_scale_with_names_beside_and_room_for_captions():
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    shapes = [(64, 64, 3), (64, 96, 3), (96, 64, 3)]
    red, green, blue = (
        np.full(shape, colour, np.uint8) for shape, colour in zip(shapes, colours.values(), strict=True)
    )
    grid = np.asarray(labelled_grid({"teacher": [red, green, blue], "student": [blue]}, ["a", "b", "c"]))
    found = {}
    for name, colour in colours.items():
        rows, columns = np.nonzero((grid == colour).all(axis=-1))
        found[name] = (len(rows), rows.min(), columns.min())
    assert [count for count, _, _ in found.values()] == [128 * 128, 128 * 192, 2 * 192 * 128]
    assert found["red"][1] == found["green"][1] == found["blue"][1]
    assert found["green"][2] - found["red"][2] == 192 + 8  # columns are as wide as the widest picture
    assert (grid < 100).all(axis=-1).any()  # the names are there


def test_of_pictures_of_a_strangers_folder_only_those_like_the_newest_are_unpacked(tmp_path):
    """The first would take 400 MB, the second is no picture, the third is cut short."""
    files = {name: tmp_path / f"{name}.png" for name in ("bomb", "text", "cut", "old", "new")}
    Image.new("1", (20_000, 20_000)).save(files["bomb"])
    files["text"].write_bytes(b"no picture")
    for name in ("cut", "old", "new"):
        save_png(np.full((40, 60, 3), 9, np.uint8), files[name])
    files["cut"].write_bytes(files["cut"].read_bytes()[:-30])
    assert stacked_rows(files, last_row=20).size[1] == 40 + 20
