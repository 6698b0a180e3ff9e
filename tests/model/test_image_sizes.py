"""Sizes of a ratio lie on the grid, near the ratio and near image_size^2 pixels; what is refused names the nearest allowed."""

import math
from argparse import ArgumentTypeError

import pytest

from wandistiller.errors import UserError
from wandistiller.model.image_sizes import ImageSize, is_size, resolve_sizes, size_or_ratio

RATIOS = ["1:1", "4:3", "3:4", "16:9", "9:16", "3:2", "2:1", "4:1", "1:4"]


@pytest.mark.parametrize("unit", [16, 32])
@pytest.mark.parametrize("image_size", [512, 640, 1024])
@pytest.mark.parametrize("text", RATIOS)
def test_a_ratio_gives_the_grid_point_next_to_it(text, image_size, unit):
    width, height = size_or_ratio(text).size(image_size, unit)
    wanted = [int(part) for part in text.split(":")]
    exact = image_size * math.sqrt(wanted[0] / wanted[1]), image_size * math.sqrt(wanted[1] / wanted[0])
    assert width % unit == height % unit == 0
    assert abs(width - exact[0]) <= unit / 2 and abs(height - exact[1]) <= unit / 2
    assert math.isclose(exact[0] * exact[1], image_size**2)  # the oracle itself


def test_the_ratios_of_a_512_student_are_what_its_documentation_says():
    sizes = list(map(str, resolve_sizes(list(map(size_or_ratio, RATIOS[:5])), 512, 16, 1024)))
    assert sizes == ["512x512", "592x448", "448x592", "688x384", "384x688"]


@pytest.mark.parametrize("text", ["5:1", "1:5", "0:1", "3", "1.5:1"])
def test_a_ratio_that_cannot_be_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="16:9"):
        size_or_ratio(text)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (["50x32"], "multiples of 16 .* nearest is 48x32"),
        (["7x32"], "nearest is 16x32"),
        (["160x32"], "4 times the other; the nearest is 160x48"),
        (["32x32", "48x32", "32x32"], "32x32 is there already"),
        (["1:1", "32x32"], "32x32 is there already"),
        (["32768x16384"], "16384 pixels at most.* the nearest is 16384x16384"),
        ([f"{16 * n}x{16 * n}" for n in range(1, 10)], "9 sizes; allowed: at most 8"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_nearest_one(sizes, words):
    with pytest.raises(UserError, match=words):
        resolve_sizes(list(map(size_or_ratio, sizes)), 32, 16, 1024)


def test_the_size_that_a_refusal_names_is_allowed():
    for width in range(1, 400, 7):
        for height in (1, 33, 100, 5000):
            try:
                resolve_sizes([ImageSize(width, height)], 32, 16, 256)
            except UserError as error:
                resolve_sizes([ImageSize.parse(str(error).rsplit(" ", 1)[1])], 32, 16, 256)


def test_sizes_are_read_as_they_are_written():
    assert ImageSize.parse(str(ImageSize(640, 384))) == (640, 384)
    assert is_size("640x384") and not any(map(is_size, ["640x0", "640 x 384", "99999x16", 640, None, "٣x٣"]))
