"""gallery.html: what an evaluation drew, as one page that opens from disk and asks the network for nothing.

    try_to_write_gallery(folder, evaluated, student_folder)

All of it lies in the one file: pictures as data URIs, style, script. The page's template, style and script are in page/. Without
scripts everything is there, unsorted. The page lets nothing load and no script run but its own, and what comes from files is
escaped.
"""

import base64
import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wandistiller.evaluation.experiment import PromptMeasures
from wandistiller.files.output_folder import CARD_MARK, GALLERY_NAME, METRICS_NAME, sample_files
from wandistiller.reports.cards import try_to_write
from wandistiller.reports.metrics import read_metrics
from wandistiller.reports.plots import loss_svg
from wandistiller.reports.tables import cell_text, comparison_rows, nearness

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE = Path(__file__).with_name("page")
MAX_SIDE = 512  # pixels of a tile
MAX_PIXELS = 128e6  # of all tiles together, which are some 50 MB; those of more prompts are smaller
MAX_NOISES = 8  # of each prompt that are shown; the measures are of all
LOSSLESS_SIDE = 128  # pixels up to which a tile is kept exactly
MAX_SAMPLES, SAMPLE_WIDTH, MAX_SAMPLE_PIXELS = 12, 1600, 64e6  # a run writes none that is larger
QUALITY = 88  # of WebP
DIFFERENCE_FACTOR = 3


# Measures that prompts are sorted by: attributes of PromptMeasures with their names, and those of which a low value is bad.
RANKINGS = {
    "latent_distance": "distance of latents",
    "right_student": "drawn right",
    "psnr_db": "PSNR, dB",
    "sharpness": "sharpness, student / teacher",
}
WORST_LOW = RANKINGS.keys() - {"latent_distance"}


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a gallery shows of an evaluation.

    Attributes:
        about: what evaluation.json says of how it was measured.
        results: the measures over all prompts.
        prompts: each prompt once.
        measures: those of each prompt.
        seeds: of the noise of each sample; the samples of a prompt follow one another.
        teacher, student: pictures (samples, H, W, 3) uint8.
        other_sizes: what both drew of the same samples at further image sizes, by the name of the size.
    """

    about: dict
    results: dict
    prompts: Sequence[str]
    measures: Sequence[PromptMeasures]
    seeds: Sequence[int]
    teacher: np.ndarray
    student: np.ndarray
    other_sizes: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def num_seeds(self) -> int:
        return len(self.seeds) // len(self.prompts)


def try_to_write_gallery(folder: Path, evaluated: Evaluated, student_folder: Path) -> Path | None:
    """Write the gallery of an evaluation, where `try_to_write` can."""
    return try_to_write(folder / GALLERY_NAME, lambda: gallery_page(evaluated, student_folder))


def gallery_page(evaluated: Evaluated, student_folder: Path) -> str:
    """Return the page as text.

    Args:
        student_folder: where metrics and sample pictures of the training are, if there are any.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = ((PAGE / f"gallery.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Only our own mark, style, script and plot are trusted to be HTML:
    return environment.get_template("gallery.html").render(
        mark=Markup(f"{CARD_MARK}; it is written again when the student is measured. -->"),  # nosec B704
        style=Markup(style),  # nosec B704
        script=Markup(script),  # nosec B704
        script_digest=digest,
        name=student_folder.resolve().name,
        about=evaluated.about,
        rows=comparison_rows(evaluated.results, in_detail=True),
        nearness=nearness(evaluated.results["frontier"]) if "frontier" in evaluated.results else "",
        plot=Markup(loss_svg(read_metrics(student_folder / METRICS_NAME))),  # nosec B704
        frames=list(sample_frames(student_folder)),
        rankings={
            key: name
            for key, name in RANKINGS.items()
            if any(getattr(one, key) is not None for one in evaluated.measures)
        },
        prompts=list(prompt_entries(evaluated)),
        num_hidden_noises=max(0, evaluated.num_seeds - MAX_NOISES),
        other_sizes=list(evaluated.other_sizes),
        difference_factor=DIFFERENCE_FACTOR,
    )


def prompt_entries(evaluated: Evaluated) -> Iterator[dict]:
    """Yield what the page shows of each prompt: its text, its measures, and columns of pictures.

    There is a column for each noise at the first image size, and one of the first noise for each further size.
    """
    shown = min(evaluated.num_seeds, MAX_NOISES)
    side = tile_side(3 * (shown + len(evaluated.other_sizes)) * len(evaluated.prompts))
    for number, (prompt, measures) in enumerate(zip(evaluated.prompts, evaluated.measures, strict=True)):
        first = number * evaluated.num_seeds
        drawn = [
            (f"seed {evaluated.seeds[sample]}", evaluated.teacher[sample], evaluated.student[sample])
            for sample in range(first, first + shown)
        ]
        drawn += [(size, teacher[first], student[first]) for size, (teacher, student) in evaluated.other_sizes.items()]
        yield {
            "number": number,
            "text": prompt,
            "badness": {key: _badness(key, getattr(measures, key)) for key in RANKINGS},
            "shown": _shown_values(measures),
            "columns": [(label, _tiles(teacher, student, side)) for label, teacher, student in drawn],
        }


def _badness(key: str, value: float | None) -> str:
    """Return a number that is the larger the worse, as an attribute; empty for what was not measured, which comes last."""
    if value is None or not math.isfinite(value):
        return ""
    return repr(-value if key in WORST_LOW else value)


def _shown_values(measures: PromptMeasures) -> list[tuple[str, str]]:
    values = [(name, getattr(measures, key)) for key, name in RANKINGS.items() if key != "right_student"]
    rows = [(name, cell_text(float(f"{value:.3g}"))) for name, value in values if value is not None]
    if measures.right_student is not None and measures.right_teacher is not None:
        rows.append(("drawn right, student / teacher", f"{measures.right_student:.0%} / {measures.right_teacher:.0%}"))
    return rows


def _tiles(teacher: np.ndarray, student: np.ndarray, side: int) -> dict[str, str]:
    # uint8 would wrap around:
    difference = np.abs(teacher.astype(np.int16) - student) * DIFFERENCE_FACTOR
    pictures = {"teacher": teacher, "student": student, "difference": difference.clip(0, 255).astype(np.uint8)}
    return {name: tile(picture, side) for name, picture in pictures.items()}


def tile_side(num_tiles: int) -> int:
    """Return the largest side of a tile in pixels, so that all of them stay within MAX_PIXELS."""
    return min(MAX_SIDE, max(32, int((MAX_PIXELS / num_tiles) ** 0.5)))


def tile(picture: np.ndarray, side: int) -> str:
    """Return a picture as a data URI, no larger than `side` pixels."""
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return data_uri(image)


def data_uri(image: "Image") -> str:
    """Return an image as a data URI of WebP, exact if it is small."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=max(image.size) <= LOSSLESS_SIDE, quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sample_frames(folder: Path) -> Iterator[dict]:
    """Yield at most MAX_SAMPLES sample pictures of a run's folder, evenly spread from the first to the last.

    Those that cannot be read, or are far too large, are left out.
    """
    from PIL import Image

    found = sample_files(folder)
    chosen = sorted({round(index) for index in np.linspace(0, len(found) - 1, MAX_SAMPLES)}) if found else []
    for step, file in (found[index] for index in chosen):
        try:
            with Image.open(file, formats=["PNG"]) as image:
                if image.width * image.height > MAX_SAMPLE_PIXELS:
                    continue
                picture = image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's words for a damaged file
            continue
        picture.thumbnail((SAMPLE_WIDTH, picture.height), Image.Resampling.LANCZOS)
        yield {"step": step, "uri": data_uri(picture), "width": picture.width, "height": picture.height}
