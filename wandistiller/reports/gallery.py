"""gallery.html: what an evaluation drew, as one page that opens from disk, asks the network for nothing and runs no script.

All of it lies in the one file: pictures as data URIs, plots as SVG, style. What comes from files is escaped.
"""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from wandistiller.evaluation.experiment import Drawn, Experiment, PromptMeasures
from wandistiller.files.output_folder import GALLERY_MARK, METRICS_NAME
from wandistiller.reports.metrics import read_metrics
from wandistiller.reports.plots import as_svg, frontier_figure, loss_figure
from wandistiller.reports.tables import HEAD, cell_text, comparison_rows, headline

PAGE = Path(__file__).with_name("page")
MAX_SIDE = 512  # pixels of a tile
MAX_PIXELS = 128e6  # of all tiles together, which are some 50 MB; those of more prompts are smaller
MAX_NOISES = 8  # of each prompt that are shown; the measures are of all
LOSSLESS_SIDE = 128  # pixels up to which a tile is kept exactly
QUALITY = 88  # of WebP


def gallery_page(
    results: dict, experiment: Experiment, by_prompt: Sequence[PromptMeasures], teacher: Drawn, student: Drawn
) -> str:
    """Return the page as text.

    Args:
        results: what evaluation.json holds; the student's folder may have metrics of its training.
        by_prompt: the measures of each prompt.
        teacher, student: what both drew.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(results["student"])
    figures = {
        "Frontier": frontier_figure(results["frontier"]) if "frontier" in results else None,
        "Training": loss_figure(read_metrics(folder / METRICS_NAME)),
    }
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Only our own mark, style and plots are trusted to be HTML:
    return environment.get_template("gallery.html").render(
        mark=Markup(f"{GALLERY_MARK}; it is written again when the student is measured. -->"),  # nosec B704
        style=Markup((PAGE / "gallery.css").read_text(encoding="utf-8")),  # nosec B704
        name=folder.resolve().name,
        about=results,
        headline=headline(results),
        head=HEAD,
        rows=comparison_rows(results),
        plots={name: Markup(as_svg(figure)) for name, figure in figures.items() if figure},  # nosec B704
        prompts=list(prompt_entries(experiment, by_prompt, {"teacher": teacher.pictures, "student": student.pictures})),
        num_noises=min(experiment.num_seeds, MAX_NOISES),
    )


def prompt_entries(
    experiment: Experiment, by_prompt: Sequence[PromptMeasures], pictures: Mapping[str, np.ndarray]
) -> Iterator[dict]:
    """Yield what the page shows of each prompt, the farthest from the teacher first: text, measures, and columns of pictures."""
    num_seeds = experiment.num_seeds
    shown = min(num_seeds, MAX_NOISES)
    side = tile_side(2 * shown * len(by_prompt))
    distances = [-math.inf if math.isnan(one.distance) else one.distance for one in by_prompt]
    for number in sorted(range(len(distances)), key=lambda number: -distances[number]):
        measures, samples = by_prompt[number], range(number * num_seeds, number * num_seeds + shown)
        facts = [f"distance {cell_text(float(f'{measures.distance:.3g}'))}"]
        if measures.right is not None:
            facts.append("drawn right: student {:.0%}, teacher {:.0%}".format(*measures.right))
        yield {
            "text": experiment.prompts[number],
            "facts": ", ".join(facts),
            "seeds": [experiment.seeds[sample] for sample in samples],
            "rows": {who: [tile(own[sample], side) for sample in samples] for who, own in pictures.items()},
        }


def tile_side(num_tiles: int) -> int:
    """Return the largest side of a tile in pixels, so that all of them stay within MAX_PIXELS."""
    return min(MAX_SIDE, max(32, int((MAX_PIXELS / num_tiles) ** 0.5)))


def tile(picture: np.ndarray, side: int) -> str:
    """Return a picture as a data URI of WebP, no larger than `side` pixels, and exact if it is small."""
    from PIL import Image

    image, buffer = Image.fromarray(picture), io.BytesIO()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(buffer, "WEBP", lossless=max(image.size) <= LOSSLESS_SIDE, quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
