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


def labelled_grid(rows: Mapping[str, Sequence[np.ndarray]], captions: Sequence[str]) -> "Image":
    """Draw rows of pictures with their names to their left, below a wrapped caption for each column.

    Pictures of several sizes are shown at one scale; all cells are as large as the largest. The grid's info holds the pixels that
    a row takes, "row".
    """
    from PIL import Image, ImageDraw

    font = caption_font()
    line_height = sum(font.getmetrics()) + 1
    sides = [max(picture.shape[side] for row in rows.values() for picture in row) for side in (0, 1)]
    # Small ones are shown in whole multiples of their size, large ones shrunk:
    scale = -(-MIN_CELL // sides[1]) if sides[1] < MIN_CELL else min(1.0, MAX_CELL / max(sides))
    cell_height, cell_width = (round(side * scale) for side in sides)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    wrapped = [wrap(caption, cell_width) for caption in captions]
    left = 2 * MARGIN + round(max(map(font.getlength, rows)))
    top = MARGIN + line_height * max(map(len, wrapped))
    width, height = left + len(captions) * (cell_width + MARGIN), top + len(rows) * (cell_height + MARGIN)
    grid = Image.new("RGB", (width, height), "white")
    drawing = ImageDraw.Draw(grid)
    for column, lines in enumerate(wrapped):
        for number, line in enumerate(lines, start=-len(lines)):
            drawing.text((left + column * (cell_width + MARGIN), top + number * line_height), line, "black", font)
    for name, row in rows.items():
        drawing.text((MARGIN, top + cell_height / 2), name, "black", font, anchor="lm")
        for column, picture in enumerate(map(Image.fromarray, row)):
            size = round(picture.width * scale), round(picture.height * scale)
            grid.paste(picture.resize(size, resampling), (left + column * (cell_width + MARGIN), top))
        top += cell_height + MARGIN
    grid.info["row"] = cell_height + MARGIN
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
