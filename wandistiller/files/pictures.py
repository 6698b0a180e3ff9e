"""Pictures: PNG files that tell how they were made, and labelled grids.

A picture is a uint8 array (H, W, 3). Pillow is imported where it is used.
"""

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wandistiller.files.atomic import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

MIN_CELL, MAX_CELL = 160, 512  # pixels; a cell has room for a caption, and a grid does not grow without end
MARGIN, FONT_SIZE = 8, 13
MAX_CAPTION_LINES = 8


def save_png(picture: "np.ndarray | Image", path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Write a PNG, whole or not at all; `metadata` are text entries of the file."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in (metadata or {}).items():
        info.add_itxt(name, str(value))
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with atomic_path(path) as beside:
        image.save(beside, format="PNG", pnginfo=info)


@cache
def caption_font() -> "FreeTypeFont":
    """Return DejaVu Sans, which comes with matplotlib: it has the alphabets of Europe and the Near East; a letter of another is a box."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


def wrap(text: str, width: float, max_lines: int = MAX_CAPTION_LINES) -> list[str]:
    """Cut a text into lines no wider than `width` pixels; a word that is too wide is broken.

    Text for more than `max_lines` ends in an ellipsis, and costs no more time than what is shown of it.
    """
    font = caption_font()
    text = text[: max_lines * int(width)]  # letters are more than a pixel wide
    lines: list[str] = []
    for num_letters in range(int(width / font.getlength("i")), 3, -1):  # lines of as many letters as fit
        lines = textwrap.wrap(text, num_letters, max_lines=max_lines, placeholder="...")
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines


def _scale(height: int, width: int) -> float:
    """Return how much larger a picture is shown: small ones in whole multiples, large ones shrunk."""
    return -(-MIN_CELL // width) if width < MIN_CELL else min(1.0, MAX_CELL / max(height, width))


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]], row_names: Sequence[str] = ()
) -> "Image":
    """Draw rows of pictures, each below its wrapped caption, with the names of the rows to their left.

    Pictures of several sizes are shown at one scale; the columns are as wide as the widest. The grid's info holds the pixels
    that the last row takes at its lower end, "last_row".
    """
    from PIL import Image, ImageDraw

    font = caption_font()
    line_height = sum(font.getmetrics()) + 1
    sides = [max(picture.shape[side] for row in rows for picture in row) for side in (0, 1)]
    scale = _scale(*sides)
    cell_width = round(sides[1] * scale)
    cell_heights = [round(max(picture.shape[0] for picture in row) * scale) for row in rows]
    wrapped = [[wrap(caption, cell_width) for caption in row] for row in captions]
    caption_heights = [line_height * max(map(len, row), default=0) for row in wrapped]
    left = MARGIN + (round(max(map(font.getlength, row_names))) + MARGIN if row_names else 0)
    num_columns = max(map(len, rows))
    size = (
        left + num_columns * (cell_width + MARGIN),
        MARGIN + sum(map(sum, zip(caption_heights, cell_heights, strict=True))) + MARGIN * len(rows),
    )
    grid = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(grid)
    top = MARGIN
    for index, row in enumerate(rows):
        top += caption_heights[index]
        if row_names:
            drawing.text((MARGIN, top + cell_heights[index] / 2), row_names[index], "black", font, anchor="lm")
        for column, (picture, lines) in enumerate(zip(row, wrapped[index], strict=True)):
            x, first_line = left + column * (cell_width + MARGIN), top - line_height * len(lines)
            for number, line in enumerate(lines):
                drawing.text((x, first_line + number * line_height), line, "black", font)
            shown = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
            resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            grid.paste(Image.fromarray(picture).resize(shown, resampling), (x, top))
        top += cell_heights[index] + MARGIN
    grid.info["last_row"] = cell_heights[-1] + MARGIN
    return grid


def stacked_rows(files: Mapping[str, Path], last_row: int) -> "Image":
    """Return the newest of several labelled grids with the last rows of all below each other, each with its name at the left.

    Args:
        files: grids by name, the newest last; one of another size, or that is no whole picture, is left out.
        last_row: pixels of a last row.
    """
    from PIL import Image, ImageDraw

    font, rows = caption_font(), {}
    with Image.open(list(files.values())[-1], formats=["PNG"]) as newest:
        width, height = newest.size
    for name, file in files.items():
        bad = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
        with suppress(*bad), Image.open(file, formats=["PNG"]) as picture:
            if picture.size == (width, height):  # which is known before anything is unpacked
                rows[name] = picture.convert("RGB")
    left = MARGIN + round(max(map(font.getlength, rows)))
    stacked = Image.new("RGB", (left + width, height + last_row * (len(rows) - 1)), "white")
    stacked.paste(next(reversed(rows.values())), (left, 0))
    for index, (name, grid) in enumerate(rows.items()):
        top = height + last_row * (index - 1)
        stacked.paste(grid.crop((0, height - last_row, width, height)), (left, top))
        ImageDraw.Draw(stacked).text((MARGIN, top + (last_row - MARGIN) / 2), name, "black", font, anchor="lm")
    return stacked
