"""The model card of an export, README.md in the hub's format; its prose lies in page/*.md, and all that a template is given is escaped."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from wandistiller.files.clone import DEMO_WORLD
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import square
from wandistiller.students.record import StudentRecord, trained_sizes

PAGE = Path(__file__).with_name("page")
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
THIS_FOLDER = "path/to/this/folder"
# A student of the demo's world knows coloured shapes alone.
DEMO_PROMPT, ANY_PROMPT = "a large yellow circle on the left, on a white background", "a lighthouse in a storm"


class Markdown(str):
    """Text that is markdown already, which a template takes as it is."""


def plain(value: object) -> str:
    """Escape a value so that markdown, in a table too, shows it as it is on one line; control characters become blanks."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())
    return "".join(f"\\{sign}" if sign in "\\`*_|<>[]#" else sign for sign in line)


def _escaped(value: object) -> object:
    return value if isinstance(value, Markdown) else plain(value)


def fill_in(template: str, **values: object) -> Markdown:
    """Return a template of page/ with the values filled in, escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # nosec B701 # markdown, which `finalize` escapes
        loader=FileSystemLoader(PAGE),
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return Markdown(environment.get_template(template).render(values).strip() + "\n")


def export_card(name: str, config: StudentConfig, is_pipeline: bool, dtype: str, has_scheduler: bool = True) -> str:
    """Return the card of an exported folder as text; `config` holds the record that is published."""
    from wandistiller.model.sizes import count_parameters

    record, sizes = config.distillation or {}, trained_sizes(config)
    return fill_in(
        "export_card.md",
        config=config,
        num_parameters=f"{count_parameters(config).total:,}",
        record=defaultdict(lambda: None, record),
        teacher=teacher_name(record),
        sizes=", ".join(f"{size.width} x {size.height}" for size in sizes),
        is_square=sizes == [square(config.image_size)],
        is_apache=record.get("world") == DEMO_WORLD or str(record.get("base_model")).startswith("Wan-AI/"),
        base_model=Markdown(json.dumps(record.get("base_model"))),
        name=name,
        has_scheduler=has_scheduler,
        drawing=Markdown(drawing(config, THIS_FOLDER, dtype)) if is_pipeline else None,
    )


def teacher_name(record: Mapping) -> Markdown:
    """Name the teacher by its hub id, which is all that is published of where it was."""
    base_model = record.get("base_model")
    linked = f"[{plain(base_model)}](https://huggingface.co/{quote(base_model)})" if base_model else "a Wan checkpoint"
    return Markdown(linked)


def example_prompt(config: StudentConfig) -> str:
    """Return a prompt to show a student with; never one of its training prompts, which are its owner's."""
    return DEMO_PROMPT if StudentRecord.of(config).world == DEMO_WORLD else ANY_PROMPT


def drawing(config: StudentConfig, folder: str, dtype: str) -> str:
    """Return Python that draws a prompt with an exported pipeline, in the recorded number of steps.

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
