"""Model cards in the hub's format: README.md of a student's folder, and README.md of a folder exported for diffusers.

    write_model_card(folder)
    write_export_card(folder, name, config, "pipeline", "bf16", prompt="...")

The prose lies in page/*.md. A student's card is made of what its folder holds (student_config.json, metrics.jsonl, evaluation.json
and the pictures), so that it can be written again when something is added. Whatever a template is given is escaped for markdown.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
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
    GALLERY_NAME,
    LOSS_PLOT_NAME,
    METRICS_NAME,
    has_mark,
    sample_files,
)
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import square
from wandistiller.projection.comfyui import LOADERS, comfyui_settings, comfyui_warnings
from wandistiller.reports.metrics import (
    bucket_name,
    held_out_error,
    held_out_text,
    loss_change,
    loss_change_by_sigma,
    read_metrics,
    training_seconds,
)
from wandistiller.reports.progress import format_duration
from wandistiller.reports.tables import cell_text, comparison_rows, markdown_table
from wandistiller.students.record import trained_sizes, weights_digest

PAGE = Path(__file__).with_name("page")
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
THIS_FOLDER = "path/to/this/folder"
DEFAULT_SLOTS = 512  # max_sequence_length of WanPipeline.__call__


class Markdown(str):
    """Text that is markdown already, which a template takes as it is."""


def plain(value: object) -> str:
    """Escape a value so that markdown, in a table too, shows it as it is; control characters become blanks."""
    return "".join(f"\\{sign}" if sign in "\\`*_|<>[]#" else sign for sign in one_line(value))


def one_line(value: object) -> str:
    """Return a value as one line of printable letters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())


def fenced(command: str) -> Markdown:
    """Return a command as a code block that nothing in it ends."""
    longest = max((len(run) for run in re.findall("`+", command)), default=0)
    fence = "`" * max(4, longest + 1)
    return Markdown(f"{fence}\n{command}\n{fence}")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Markdown:
    """Return a markdown table of escaped cells."""
    return Markdown(markdown_table(head, ([_escaped(cell) for cell in row] for row in rows)))


def _escaped(value: object) -> object:
    return value if isinstance(value, Markdown) else plain(value)


def fill_in(template: str, **values: object) -> Markdown:
    """Return a template of page/ with the values filled in, escaped."""
    return Markdown(_templates().get_template(template).render(values).strip() + "\n")


def _templates():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # nosec B701 # markdown, which `finalize` escapes
        loader=FileSystemLoader(PAGE),
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"table": table, "fenced": fenced}
    return environment


def write_model_card(folder: Path) -> Path | None:
    """Write the card of a student's folder. Return None if a README.md that a person wrote is in its place."""
    file = folder / CARD_NAME
    if file.exists() and not has_mark(file):
        return None
    config = StudentConfig.load(folder)
    card = model_card(folder, config)
    write_text(file, card)
    return file


def try_to_write_model_card(folder: Path) -> Path | None:
    """Write the card at the end of work that a card must not turn into a failure; print what stands in its way."""
    try:
        file = write_model_card(folder)
    except OSError as error:
        print(f"No model card: {folder / CARD_NAME} cannot be written ({error.strerror})", file=sys.stderr)
        return None
    except Exception as error:  # whatever a damaged record or evaluation holds: the work is worth more than its card
        print(f"No model card: what {folder} holds cannot be told ({first_line(error)})", file=sys.stderr)
        return None
    if file is None:
        print(f"{folder / CARD_NAME} is not a card of ours and stays as it is")
    return file


def model_card(folder: Path, config: StudentConfig) -> str:
    """Return the card of a student's folder as text."""
    record, steps = config.distillation or {}, read_metrics(folder / METRICS_NAME)
    errors = held_out_error(steps)
    return fill_in(
        "student_card.md",
        front_matter=front_matter(record, "wandistiller", ["wan", "text-to-image", "distillation"]),
        mark=Markdown(f"{CARD_MARK}; it is written again when the student is measured. -->"),
        name=folder.resolve().name,
        config=config,
        record=defaultdict(lambda: None, record),
        introduction=introduction(config),
        pictures=[(Markdown(link), what) for link, what in shown_pictures(folder).items()],
        facts=facts(config, record, steps),
        steps=steps,
        loss_change=[cell_text(value) for value in loss_change(steps)] if steps else (),
        held_out=errors and held_out_text(errors),
        losses=losses(steps) if steps else (),
        has_plot=(folder / LOSS_PLOT_NAME).is_file(),
        plot_name=Markdown(LOSS_PLOT_NAME),
        evaluation=evaluation_text(read_evaluation(folder)),
        has_gallery=(folder / GALLERY_NAME).is_file(),
        gallery_name=Markdown(GALLERY_NAME),
        limits=limits(config),
        is_apache=is_apache(record),
    )


def front_matter(record: dict, library_name: str, tags: list[str]) -> Markdown:
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


def introduction(config: StudentConfig) -> Markdown:
    """Return the paragraph that says what a student is."""
    record = defaultdict(lambda: None, config.distillation or {})
    return Markdown(_words().introduction(config, record, sizes_text(config), teacher_name(record)).strip())


def limits(config: StudentConfig) -> Markdown:
    """Return the list of what a student does not do."""
    is_square = trained_sizes(config) == [square(config.image_size)]
    record = defaultdict(lambda: None, config.distillation or {})
    return Markdown(_words().limits(config, record, sizes_text(config), is_square).strip())


def _words():
    return _templates().get_template("words.md").module


def sizes_text(config: StudentConfig) -> str:
    """Return the sizes that a student was trained at in words."""
    return ", ".join(f"{size.width} x {size.height}" for size in trained_sizes(config))


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


def shown_pictures(folder: Path) -> dict[str, str]:
    """Return the newest sample picture, and the evaluation's picture if it shows this student: by their names, what they show."""
    found = sample_files(folder)[-1:]
    about = {file.relative_to(folder).as_posix(): "Prompts of the training, drawn" for _, file in found}
    if read_evaluation(folder) and (folder / COMPARISON_NAME).is_file():
        about[COMPARISON_NAME] = "Prompts of the evaluation, drawn"
    return about


def pictures(folder: Path) -> list[str]:
    """Return the pictures of a student's folder as markdown."""
    return [
        f"![{what} by teacher and student from the same noise]({link})" for link, what in shown_pictures(folder).items()
    ]


def with_pictures(card: str, folder: Path) -> str:
    """Return the card of an export with the pictures of the student's own folder above its use."""
    return card.replace("\n\n## Use\n", "\n\n" + "\n\n".join([*pictures(folder), "## Use\n"]), 1)


def comfyui_use(config: StudentConfig, file: str) -> Markdown:
    """Return how ComfyUI draws with an exported file, as markdown."""
    told = f"{plain(file)} goes to ComfyUI's models/diffusion_models: {comfyui_settings(config)}."
    warnings = "\n".join(f"- {warning}." for warning in comfyui_warnings(config))
    return Markdown(f"{told}\n\n{warnings}".strip())


def gguf_use(config: StudentConfig) -> Markdown:
    """Return how ComfyUI-GGUF draws with an exported file, as markdown."""
    return Markdown(
        "For [ComfyUI-GGUF](https://github.com/city96/ComfyUI-GGUF); VAE and text encoder are its teacher's. The file goes into "
        f"`models/diffusion_models`; nodes: {comfyui_settings(config, LOADERS['gguf'])}."
    )


def facts(config: StudentConfig, record: dict, lines: list[dict]) -> list[tuple[str, object]]:
    """Return rows of what was done. What the record does not hold is left out."""
    guidance = [f"{record[name]:g}" for name in ("guidance_scale", "guidance_scale_2") if record.get(name) is not None]
    rows = [
        ("teacher", record.get("base_model") or local_name(record)),
        (
            "with the LoRA",
            ", ".join(f"{lora['file']} at {lora['scale']:g}" for lora in record.get("teacher_loras") or []),
        ),
        ("its settings", record.get("preset")),
        ("shift", record.get("shift")),
        ("guidance", " and ".join(guidance)),
        ("guided at sigma", " to ".join(f"{sigma:g}" for sigma in record.get("guidance_range") or [])),
        ("sampling steps", record.get("student_steps") or record.get("num_inference_steps")),
        ("teacher's sampler", record.get("teacher_sampler")),
        ("block", config.block),
        ("parameters", f"{config.num_parameters:,}"),
        ("width, depth, heads", f"{config.hidden_size}, {config.depth}, {config.num_heads}"),
        ("starts from", record.get("init")),
        ("teacher's layers", ", ".join(map(str, record.get("layers") or []))),
        ("training states", record.get("states")),
        ("noise levels", " to ".join(f"{sigma:g}" for sigma in record.get("sigma_range") or [])),
        ("prompts", record.get("num_prompts")),
        ("optimiser steps", record.get("num_train_steps")),
        ("samples a step", record.get("batch_size")),
        ("batches the teacher answered", record.get("num_teacher_batches")),
        ("training time", format_duration(training_seconds(lines)) if lines else None),
    ]
    return [(name, value) for name, value in rows if value not in (None, "")]


def losses(lines: list[dict]) -> list[tuple[str, str, str]]:
    changes = loss_change_by_sigma(lines)
    return [
        (f"sigma {bucket_name(bucket, len(changes))}", cell_text(first), cell_text(last))
        for bucket, (first, last) in enumerate(changes)
    ]


def read_evaluation(folder: Path) -> dict:
    """Return what evaluate_student.py measured of the weights in the folder; nothing if it did not, or the file is damaged."""
    file = folder / EVALUATION_NAME
    try:
        results = load_json(file)
        measured_weights = results["student_sha256"]
    except (JsonError, KeyError, TypeError):
        return {}
    return results if measured_weights and measured_weights == weights_digest(folder) else {}


def evaluation_text(results: dict) -> dict | None:
    """Return an evaluation's numbers and rows for the card, or None if it lacks something."""
    try:
        num_trained = results.get("num_trained_prompts", 0)
        return {
            "num_prompts": results["num_prompts"],
            "num_seeds": results["num_seeds"],
            "prompts": f"prompts, {num_trained} of them trained on" if num_trained else "held-out prompts",
            "rows": comparison_rows(results),
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def is_apache(record: dict) -> bool:
    """Return whether the teacher is known to be under Apache-2.0: a released Wan, or the demo's, which is part of this code.

    The record of an export knows the demo's teacher only by its world.
    """
    is_demo = record.get("world") == DEMO_WORLD or record.get("teacher_path") == f"./{DEMO_TEACHER}"
    return is_demo or str(record.get("base_model")).startswith("Wan-AI/")


def drawing(config: StudentConfig, folder: str, dtype: str, *, prompt: str) -> str:
    """Return Python that draws a prompt with an exported pipeline, in diffusers' number of steps if none is recorded.

    Args:
        folder: folder of the pipeline.
        dtype: "fp32", "bf16" or "fp16", the precision of the transformer. The VAE stays in float32, as every Wan's does.
        prompt: what to draw.
    """
    record = config.distillation or {}
    load = f'"{folder}"'
    if dtype != "fp32":
        load += f', dtype={{"default": torch.{TORCH_NAMES[dtype]}, "vae": torch.float32}}'
    steps = record.get("student_steps") or record.get("num_inference_steps")
    slots = config.text_max_length
    settings = ["num_frames=1", "guidance_scale=1.0"]
    settings += [f"num_inference_steps={steps}"] if steps else []
    size = trained_sizes(config)[0]
    settings += [f"height={size.height}", f"width={size.width}", 'output_type="pil"']
    settings += ["generator=torch.Generator().manual_seed(0)"]
    settings += [f"max_sequence_length={slots}"] if slots != DEFAULT_SLOTS else []
    return (
        "import torch\n"
        "from diffusers import WanPipeline\n\n"
        f"pipe = WanPipeline.from_pretrained({load})\n"
        f"prompt = {json.dumps(prompt, ensure_ascii=False)}\n"
        f'pipe(prompt, {", ".join(settings)}).frames[0][0].save("picture.png")'
    )


def write_export_card(
    folder: Path, name: str, config: StudentConfig, export_format: str, dtype: str, *, prompt: str
) -> None:
    """Write the card into a folder for diffusers.

    Args:
        name: name that the folder will have in the end.
        config: the student's, with the record that is published.
        prompt: what the lines to copy draw.
    """
    use = pipeline_use(config, dtype, prompt) if export_format == "pipeline" else TRANSFORMER_USE
    write_text(folder / CARD_NAME, export_card(name, config, use))


TRANSFORMER_USE = (
    "The transformer alone; VAE, text encoder, tokenizer and scheduler are its teacher's:\n\n```python\n"
    "from diffusers import WanTransformer3DModel\n\n"
    f'transformer = WanTransformer3DModel.from_pretrained("{THIS_FOLDER}")\n```'
)


def pipeline_use(config: StudentConfig, dtype: str, prompt: str) -> str:
    """Return the lines that draw with an exported pipeline, as markdown."""
    return f"```python\n{drawing(config, THIS_FOLDER, dtype, prompt=prompt)}\n```"


def export_card(name: str, config: StudentConfig, use: str, library: str = "diffusers") -> str:
    """Return the card of an exported folder as text; `use` says as markdown how to draw with it, in `library` if that is diffusers."""
    record = config.distillation or {}
    made = [(what, value) for what, value in facts(config, record, []) if what != "guidance"]
    return fill_in(
        "export_card.md",
        front_matter=front_matter(record, library, ["wan", "distillation"]),
        name=name,
        config=config,
        record=defaultdict(lambda: None, record),
        teacher=teacher_name(record),
        use=Markdown(use),
        library=library,
        slots=config.text_max_length,
        default_slots=DEFAULT_SLOTS,
        facts=[*made, ("guidance", "1.0 (the teacher's is learnt)")],
        limits=limits(config),
        is_apache=is_apache(record),
    )
