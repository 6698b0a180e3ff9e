"""Model cards in the hub's format: README.md of a student's folder, and README.md of an export.

    try_to_write_model_card(folder)
    card = export_card(name, config, "pipeline", "bf16")

The prose lies in page/*.md. A student's card is made of what its folder holds (student_config.json, metrics.jsonl, evaluation.json
and the pictures), so that it can be written again when something is added. Whatever a template is given is escaped for markdown.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from wandistiller.errors import first_line
from wandistiller.files.atomic import write_text
from wandistiller.files.clone import DEMO_TEACHER, DEMO_WORLD
from wandistiller.files.json_files import JsonError, load_json
from wandistiller.files.output_folder import (
    CARD_MARK,
    CARD_NAME,
    COMPARISON_NAME,
    EVALUATION_NAME,
    FRONTIER_NAME,
    GALLERY_NAME,
    LOSS_PLOT_NAME,
    METRICS_NAME,
    RUN_NAME,
    has_mark,
    sample_files,
)
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import square
from wandistiller.reports.metrics import held_out_text, loss_change, newest_held_out, read_metrics, training_seconds
from wandistiller.reports.progress import format_duration
from wandistiller.reports.tables import HEAD, cell_text, comparison_rows, headline
from wandistiller.students.drawing import example_prompt
from wandistiller.students.record import StudentRecord, trained_sizes, weights_digest

PAGE = Path(__file__).with_name("page")
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
THIS_FOLDER = "path/to/this/folder"


# ---- markdown ----


class Markdown(str):
    """Text that is markdown already, which a template takes as it is."""


def plain(value: object) -> str:
    """Escape a value so that markdown, in a table too, shows it as it is; control characters become blanks."""
    return "".join(f"\\{sign}" if sign in "\\`*_|<>[]#" else sign for sign in one_line(value))


def one_line(value: object) -> str:
    """Return a value as one line of printable letters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Markdown:
    """Return a markdown table of escaped cells."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *([str(_escaped(cell)) for cell in row] for row in rows)]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def numbers(values: Iterable[float | None], between: str) -> str:
    """Join the numbers that are known."""
    return between.join(f"{value:g}" for value in values if value is not None)


def _escaped(value: object) -> object:
    return value if isinstance(value, Markdown) else plain(value)


def fill_in(template: str, **values: object) -> Markdown:
    """Return a template of page/ with the values filled in, escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from wandistiller.model.sizes import count_parameters

    environment = Environment(  # nosec B701 # markdown, which `finalize` escapes
        loader=FileSystemLoader(PAGE),
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"table": table, "count_parameters": count_parameters}
    environment.filters["numbers"] = numbers
    return Markdown(environment.get_template(template).render(values).strip() + "\n")


# ---- of a student ----


def try_to_write(file: Path, make: Callable[[], str]) -> Path | None:
    """Write a card or gallery, which must not turn finished work into a failure; print what stands in its way.

    A file of that name that a person wrote stays.
    """
    if file.exists() and not has_mark(file):
        print(f"{file} was not written by WanDistiller and stays as it is")
        return None
    try:
        write_text(file, make())
    except Exception as error:  # a full disk, or whatever a damaged record or evaluation holds
        print(f"No {file.name} in {file.parent}: {type(error).__name__}, {first_line(error)}", file=sys.stderr)
        return None
    return file


def try_to_write_model_card(folder: Path) -> Path | None:
    """Write the card of a student's folder, where `try_to_write` can."""
    return try_to_write(folder / CARD_NAME, lambda: model_card(folder))


def model_card(folder: Path) -> str:
    """Return the card of a student's folder as text."""
    config, steps = StudentConfig.load(folder), read_metrics(folder / METRICS_NAME)
    about, errors = about_student(config), newest_held_out(steps)
    return fill_in(
        "student_card.md",
        **about,
        front_matter=front_matter(about["record"], "wandistiller", ["wan", "text-to-image", "distillation"]),
        mark=Markdown(f"{CARD_MARK}; it is written again when the student is measured. -->"),
        name=folder.resolve().name,
        pictures=shown_pictures(folder),
        training_time=format_duration(training_seconds(steps)) if steps else None,
        loss_change=[cell_text(value) for value in loss_change(steps)] if steps else None,
        held_out=errors and held_out_text(errors),
        run=Markdown(RUN_NAME) if (folder / RUN_NAME).is_file() else None,
        plot=Markdown(LOSS_PLOT_NAME) if (folder / LOSS_PLOT_NAME).is_file() else None,
        evaluation=evaluation_of(folder),
        gallery=Markdown(GALLERY_NAME) if (folder / GALLERY_NAME).is_file() else None,
    )


def about_student(config: StudentConfig) -> dict:
    """Return what every template of a student takes."""
    record, sizes = config.distillation or {}, trained_sizes(config)
    return {
        "config": config,
        "record": defaultdict(lambda: None, record),
        "teacher": teacher_name(record),
        "teacher_file": local_name(record),
        "sizes": ", ".join(f"{size.width} x {size.height}" for size in sizes),
        "is_square": sizes == [square(config.image_size)],
        "is_apache": is_apache(record),
    }


def front_matter(record: Mapping, library_name: str, tags: list[str]) -> Markdown:
    """Return the YAML that the hub reads at the top of a card."""
    from huggingface_hub import CardData  # unlike ModelCardData it keeps the order given here

    data = CardData(
        license="apache-2.0" if is_apache(record) else "other",
        base_model=record.get("base_model"),
        library_name=library_name,
        pipeline_tag="text-to-image",
        tags=tags,
    )
    return Markdown(data.to_yaml() + "\n")


def teacher_name(record: Mapping) -> Markdown:
    """Name the teacher by its hub id, or by its file or folder without the path, which is nobody else's business."""
    if base_model := record.get("base_model"):
        return Markdown(f"[{plain(base_model)}](https://huggingface.co/{quote(base_model)})")
    name = local_name(record)
    return Markdown(f"the Wan checkpoint `{one_line(name).replace('`', '')}`" if name else "a Wan checkpoint")


def local_name(record: Mapping) -> str | None:
    """Return the name of the teacher's folder or file, without the path to it."""
    path = record.get("teacher_path")
    return Path(path).name if path else None


def is_apache(record: Mapping) -> bool:
    """Return whether the teacher is known to be under Apache-2.0: a released Wan, or the demo's, which is part of this code.

    The record of an export knows the demo's teacher only by its world.
    """
    is_demo = record.get("world") == DEMO_WORLD or record.get("teacher_path") == f"./{DEMO_TEACHER}"
    return is_demo or str(record.get("base_model")).startswith("Wan-AI/")


def shown_pictures(folder: Path) -> dict[Markdown, str]:
    """Return the newest sample picture, and the evaluation's pictures if they show this student: by their names, what they show."""
    found = sample_files(folder)[-1:]
    both = "by teacher and student from the same noise"
    shown = {file.relative_to(folder).as_posix(): f"Sample prompts, drawn {both}" for _, file in found}
    shown |= {COMPARISON_NAME: f"Prompts of the evaluation, drawn {both}"}
    shown |= {
        FRONTIER_NAME: "Cost of a picture and distance to the teacher's, of both in fewer steps: lower left is better"
    }
    measured = evaluation_of(folder) is not None
    return {
        Markdown(name): what
        for name, what in shown.items()
        if (folder / name).is_file() and (measured or name not in (COMPARISON_NAME, FRONTIER_NAME))
    }


def evaluation_of(folder: Path) -> dict | None:
    """Return numbers and rows of what evaluate_student.py measured; None if these weights were not, or the file is damaged."""
    try:
        results = load_json(folder / EVALUATION_NAME)
        digest, num_trained = results["student_sha256"], results.get("num_trained_prompts", 0)
        evaluation = {
            "num_prompts": results["num_prompts"],
            "num_seeds": results["num_seeds"],
            "prompts": f"prompts, {num_trained} of them trained on" if num_trained else "held-out prompts",
            "headline": headline(results),
            "table": table(HEAD, comparison_rows(results)),
        }
    except (JsonError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return evaluation if digest and digest == weights_digest(folder) else None


# ---- of an export ----


def export_card(name: str, config: StudentConfig, is_pipeline: bool, dtype: str) -> str:
    """Return the card of an exported folder as text; `config` holds the record that is published."""
    about = about_student(config)
    return fill_in(
        "export_card.md",
        **about,
        front_matter=front_matter(about["record"], "diffusers", ["wan", "distillation"]),
        name=name,
        drawing=Markdown(drawing(config, THIS_FOLDER, dtype)) if is_pipeline else None,
        training_time=None,
    )


def drawing(config: StudentConfig, folder: str, dtype: str) -> str:
    """Return Python that draws a prompt with an exported pipeline, in diffusers' number of steps if none is recorded.

    Args:
        folder: folder of the pipeline.
        dtype: "fp32", "bf16" or "fp16", the precision of the transformer. The VAE stays in float32, as every Wan's does.
    """
    record, size = StudentRecord.of(config), trained_sizes(config)[0]
    code = fill_in(
        "drawing.md",
        folder=Markdown(json.dumps(folder, ensure_ascii=False)),
        prompt=Markdown(json.dumps(example_prompt(config))),
        torch_dtype=None if dtype == "fp32" else TORCH_NAMES[dtype],
        steps=record.steps,
        size=size,
        slots=config.text_max_length,
    )
    return code.rstrip()
