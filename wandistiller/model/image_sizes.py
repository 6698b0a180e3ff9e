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
            raise ArgumentTypeError(
                f"{text!r} is no size; write WIDTHxHEIGHT in pixels, such as 640x384, or a ratio such as 16:9"
            )
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


def size_or_ratio(text: str) -> ImageSize | AspectRatio:
    """Read 640x384 (pixels) or 16:9 (a ratio), as an argparse type."""
    if not (found := re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text)):
        return ImageSize.parse(text)
    ratio = AspectRatio(int(found[1]), int(found[2]))
    if max(ratio) > MAX_RATIO * min(ratio):
        raise ArgumentTypeError(f"{text} is beyond what is allowed, 4:1 to 1:4, such as 16:9")
    return ratio


def resolve_sizes(
    given: Sequence[ImageSize | AspectRatio], image_size: int, unit: int, max_patches: int
) -> tuple[ImageSize, ...]:
    """Return the sizes in pixels of --image_sizes.

    Args:
        image_size: its square is about the number of pixels of a ratio.
        unit: divisor of both sides.
        max_patches: largest multiple of `unit`.

    Raises:
        UserError: one is off the grid, too long, too large or given twice (the nearest allowed size is named), or there are too many.
    """
    sizes: list[ImageSize] = []
    for each in given:
        size = each.size(image_size, unit) if isinstance(each, AspectRatio) else each
        if size in sizes:
            raise UserError(f"--image_sizes {each}: {size} is there already; leave one out")
        if size != (nearest := _nearest_size(size, unit, max_patches)):
            raise UserError(
                f"--image_sizes {size}: both sides must be multiples of {unit} for this teacher, {max_patches * unit} pixels at "
                f"most, and none more than {MAX_RATIO:g} times the other; the nearest is {nearest}"
            )
        sizes.append(size)
    if len(sizes) > MAX_SIZES:
        raise UserError(f"--image_sizes: {len(sizes)} sizes; allowed: at most {MAX_SIZES}")
    return tuple(sizes)


def _nearest_size(size: ImageSize, unit: int, max_patches: int) -> ImageSize:
    """Return the allowed size that is nearest to one, keeping the longer side where it can."""
    width, height = (min(max(1, round(side / unit)), max_patches) for side in size)
    least = math.ceil(max(width, height) / MAX_RATIO)
    return ImageSize(max(width, least) * unit, max(height, least) * unit)
