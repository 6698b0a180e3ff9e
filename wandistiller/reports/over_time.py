"""The sample pictures of a run over time: read back from its folder, and as one strip with a row for each time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.files.output_folder import STRIP_NAME, sample_files
from wandistiller.files.pictures import caption_font, save_png

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ROWS, MAX_WIDTH = 10, 1600
MAX_PIXELS = 64e6  # of a sample picture, which is more than any run writes
# The metadata of a sample picture that says where the student's row begins, in pixels from the top.
STUDENT_ROW = "student_row"


def read_samples(folder: Path, count: int) -> Iterator[tuple[int, "Image"]]:
    """Yield the step and the picture of at most `count` sample pictures of a run's folder, evenly spread from the first to the
    last; those that cannot be read, or are far too large, are left out."""
    from PIL import Image

    for step, file in spread_out(sample_files(folder), count):
        try:
            with Image.open(file, formats=["PNG"]) as image:
                if image.width * image.height > MAX_PIXELS:
                    continue
                picture = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's words for a damaged file
            continue
        yield step, picture


def spread_out(items: Sequence, count: int) -> list:
    """Return at most `count` items, evenly spread from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def save_strip(folder: Path) -> Path | None:
    """Write what the student drew over time below what the teacher drew. Return None where there are not two times to show."""
    from PIL import Image, ImageDraw

    rows = []
    for step, picture in read_samples(folder, MAX_ROWS):
        top = picture.info.get(STUDENT_ROW, "")
        if top.isdecimal() and 0 < int(top) < picture.height:
            rows.append((f"after {step:,} steps", picture, int(top)))
    if len(rows) < 2:
        return None
    _, newest, top = rows[-1]
    font = caption_font([name for name, _, _ in rows])
    line_height = sum(font.getmetrics()) + 4
    heights = [top, *(line_height + picture.height - row_top for _, picture, row_top in rows)]
    strip = Image.new("RGB", (max(picture.width for _, picture, _ in rows), sum(heights)), "white")
    strip.paste(newest.crop((0, 0, newest.width, top)), (0, 0))
    drawing = ImageDraw.Draw(strip)
    for (name, picture, row_top), y in zip(
        rows, (sum(heights[:index]) for index in range(1, len(heights))), strict=True
    ):
        drawing.text((8, y), name, "black", font)
        strip.paste(picture.crop((0, row_top, picture.width, picture.height)), (0, y + line_height))
    strip.thumbnail((MAX_WIDTH, strip.height), Image.Resampling.LANCZOS)
    save_png(strip, folder / STRIP_NAME)
    return folder / STRIP_NAME
