"""Pictures: PNG files that tell how they were made, and labelled grids.

A picture is a uint8 array (H, W, 3). Pillow is imported where it is used.
"""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from wandistiller.files.atomic import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

MIN_CELL, MAX_CELL = 160, 512  # pixels; a cell has room for a caption, and a grid does not grow without end
MARGIN, FONT_SIZE = 8, 13
MAX_CAPTION_LINES = 8
NO_LETTER = "\uffff"  # Unicode promises that this will never be a letter, so every font draws its box for it


def save_png(picture: "np.ndarray | Image", path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Write a PNG, whole or not at all.

    Args:
        metadata: text entries of the file.
    """
    with atomic_path(path) as beside:
        beside.write_bytes(png_bytes(picture, metadata))


def png_bytes(picture: "np.ndarray | Image", metadata: Mapping[str, object] | None = None) -> bytes:
    """Return a PNG with text entries."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in (metadata or {}).items():
        info.add_itxt(name, str(value))
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def caption_font(texts: Iterable[str]) -> "FreeTypeFont":
    """Return Pillow's own font where it has every letter of the texts, else DejaVu Sans, which comes with matplotlib.

    DejaVu has the alphabets of Europe and the Near East; no font of a package that is needed here has Chinese or emoji.
    """
    from PIL import ImageFont

    # Pillow returns its bitmap font only where no size is given, which its annotation does not tell.
    own = cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=FONT_SIZE))
    if not lacking_letters(own, "".join(texts)):
        return own
    try:
        import matplotlib

        return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_SIZE)
    except (ImportError, OSError):  # an installation without the plots
        return own


def lacking_letters(font: "FreeTypeFont", text: str) -> set[str]:
    """Return the letters of a text that a font draws as the box that stands for any letter it has not."""
    box = font.getmask(NO_LETTER)
    return {letter for letter in set(text) if not letter.isspace() and _is_same(font.getmask(letter), box)}


def _is_same(drawn, box) -> bool:
    return drawn.size == box.size and bytes(drawn) == bytes(box)


def escaped(text: str, font: "FreeTypeFont") -> str:
    r"""Return a text with the letters that a font lacks as Python spells them, such as \u7ea2."""
    spelt = {letter: letter.encode("unicode_escape").decode("ascii") for letter in lacking_letters(font, text)}
    return "".join(spelt.get(letter, letter) for letter in text) if spelt else text


def wrap(text: str, width: float, font: "FreeTypeFont", max_lines: int = MAX_CAPTION_LINES) -> list[str]:
    """Cut a text into lines no wider than `width` pixels; a word that is too wide is broken.

    Text for more than `max_lines` ends in an ellipsis, and costs no more time than what is shown of it.
    """
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

    Pictures of several sizes are shown at one scale; the columns are as wide as the widest.
    """
    from PIL import Image, ImageDraw

    font = caption_font([caption for row in captions for caption in row])
    line_height = sum(font.getmetrics()) + 1
    sides = [max(picture.shape[side] for row in rows for picture in row) for side in (0, 1)]
    scale = _scale(*sides)
    cell_width = round(sides[1] * scale)
    cell_heights = [round(max(picture.shape[0] for picture in row) * scale) for row in rows]
    wrapped = [[wrap(escaped(caption, font), cell_width, font) for caption in row] for row in captions]
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
    return grid
