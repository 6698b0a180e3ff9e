"""The sizes of the pictures that a student is trained on, and those that pictures of some aspect ratio have.

Standard library only, so that a mistake in a flag is answered before torch loads.
"""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import NamedTuple

from wandistiller.errors import UserError

MAX_RATIO = 4.0  # of the longer side to the shorter: Wan was trained on nothing near it
# Each size has a sampling path of every lane at least, of no more than PATHS_PER_LANE together.
MAX_SIZES = 8
MAX_SIDE = 32_768  # MAX_PATCHES of 32 pixels
# A size is like another one where no side differs by more than this factor.
ALIKE = 1.25


class ImageSize(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> "ImageSize":
        """Read a size as it is typed and recorded, such as 640x384.

        Raises:
            ArgumentTypeError: it is none, or has a side of 0.
        """
        found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
        if found is None:
            raise ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT in pixels, such as 640x384")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        return self.width * self.height

    def is_like(self, other: "ImageSize") -> bool:
        """Return whether no side differs by more than ALIKE."""
        return all(max(a, b) <= ALIKE * min(a, b) for a, b in zip(self, other, strict=True))


def square(side: int) -> ImageSize:
    return ImageSize(side, side)


class AspectRatio(NamedTuple):
    """Width to height."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> "AspectRatio":
        """Read a ratio as it is typed, such as 16:9.

        Raises:
            ArgumentTypeError: it is none, or lies beyond MAX_RATIO.
        """
        found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text)
        if found is None:
            raise ArgumentTypeError(
                f"{text!r} is no aspect ratio; write WIDTH:HEIGHT in whole numbers above 0, such as 16:9"
            )
        width, height = int(found[1]), int(found[2])
        if max(width, height) > MAX_RATIO * min(width, height):
            nearest = "4:1" if width > height else "1:4"
            raise ArgumentTypeError(f"{text} is beyond what is allowed, 4:1 to 1:4; the nearest is {nearest}")
        return cls(width, height)

    def __str__(self) -> str:
        return f"{self.width}:{self.height}"

    def size(self, image_size: int, unit: int) -> ImageSize:
        """Return the size of this ratio of about image_size^2 pixels, whose sides are multiples of `unit`."""
        stretch = math.sqrt(self.width / self.height)
        sides = (image_size * stretch, image_size / stretch)
        return ImageSize(*(max(1, round(side / unit)) * unit for side in sides))


def is_size(value: object) -> bool:
    """Return whether a value of a file is a size as students record it."""
    try:
        return isinstance(value, str) and max(ImageSize.parse(value)) <= MAX_SIDE
    except ArgumentTypeError:
        return False


def sizes_of_ratios(ratios: Sequence[AspectRatio], image_size: int, unit: int) -> tuple[ImageSize, ...]:
    """Return a size for each ratio (see `AspectRatio.size`).

    Raises:
        UserError: two of them have the same, or there are too many.
    """
    sizes: dict[ImageSize, AspectRatio] = {}
    for ratio in ratios:
        size = ratio.size(image_size, unit)
        if size in sizes:
            raise UserError(
                f"--aspect_ratios: {sizes[size]} and {ratio} are both {size} here, where sides are multiples of {unit} around "
                f"{image_size}; leave one out, or give --image_sizes"
            )
        sizes[size] = ratio
    _check_number("--aspect_ratios", len(sizes))
    return tuple(sizes)


def check_sizes(sizes: Sequence[ImageSize], unit: int, max_patches: int) -> None:
    """Refuse sizes of --image_sizes that a run cannot train on.

    Args:
        unit: what both sides must be multiples of.
        max_patches: how many times `unit` a side may be.

    Raises:
        UserError: one of them is off the grid, too long or too large, or is given twice; it says the nearest allowed.
    """
    for number, size in enumerate(sizes):
        where = f"--image_sizes {size}"
        if size in sizes[:number]:
            raise UserError(f"{where}: is given twice; leave one out")
        nearest = nearest_size(size, unit, max_patches)
        if any(side % unit for side in size):
            raise UserError(
                f"{where}: both sides must be multiples of {unit} for this teacher; the nearest is {nearest}"
            )
        if max(size) > MAX_RATIO * min(size):
            raise UserError(f"{where}: is beyond what is allowed, 4:1 to 1:4; the nearest is {nearest}")
        if max(size) > max_patches * unit:
            raise UserError(f"{where}: a side may have {max_patches * unit} pixels at most; the nearest is {nearest}")
    _check_number("--image_sizes", len(sizes))


def nearest_size(size: ImageSize, unit: int, max_patches: int) -> ImageSize:
    """Return the allowed size that is nearest to one, keeping the longer side where it can."""
    width, height = (min(max(1, round(side / unit)), max_patches) for side in size)
    least = math.ceil(max(width, height) / MAX_RATIO)
    return ImageSize(max(width, least) * unit, max(height, least) * unit)


def _check_number(flag: str, count: int) -> None:
    if count > MAX_SIZES:
        raise UserError(
            f"{flag}: {count} sizes; allowed: at most {MAX_SIZES}, since the pool of paths is split over them"
        )


def shares(total: int, count: int) -> list[int]:
    """Split a number into `count` parts as equal as can be, the larger ones first: what each size gets of it."""
    return [len(range(part, total, count)) for part in range(count)]
