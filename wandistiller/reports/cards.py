"""README.md of a student's folder: a model card in the hub's format, filled from the run's own records.

    write_model_card(folder)

Everything comes from the folder (student_config.json, metrics.jsonl, evaluation.json and the pictures), so that whoever adds
to it may write the card again.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from wandistiller.files.atomic import atomic_path
from wandistiller.files.clone import DEMO_TEACHER
from wandistiller.files.output_folder import (
    CARD_MARK,
    CARD_NAME,
    COMPARISON_NAME,
    EVALUATION_NAME,
    LOSS_PLOT_NAME,
    METRICS_NAME,
    SAMPLES_NAME,
    is_card,
)
from wandistiller.model.config import StudentConfig
from wandistiller.reports.metrics import (
    bucket_name,
    held_out_error,
    loss_change,
    loss_change_by_sigma,
    read_metrics,
    training_seconds,
)
from wandistiller.reports.progress import format_duration
from wandistiller.reports.tables import cell_text
from wandistiller.sampling.recorded import weights_digest

FENCE = "````"  # longer than any that a command is likely to hold
HEAD = """\
---
license: {license}
{base_model}library_name: wandistiller
pipeline_tag: text-to-image
tags:
- wan
- text-to-image
- distillation
---
"""
USE = """\
In a clone of WanDistiller's repository:

```python
import torch
from wandistiller import WanLiteStudent

student = WanLiteStudent.from_pretrained("path/to/this/folder")
config = student.config
latents = torch.randn(1, config.num_channels, config.latent_size, config.latent_size)  # (z - mean) / std
prompt_embeds = torch.randn(1, 12, config.text_encoder_output_dim)  # of the teacher's text encoder
velocity = student(latents, torch.tensor([1000.0]), prompt_embeds, torch.tensor([12]))  # noise - x_0
```

From a prompt to a picture, with the teacher's text encoder and VAE:

```
python generate_images.py --student path/to/this/folder --prompt "..." --output pictures
```"""


def write_model_card(folder: Path) -> Path | None:
    """Write the card of a student's folder, whole or not at all; None where a README.md of someone else's is in its place."""
    file = folder / CARD_NAME
    if file.exists() and not is_card(file):
        return None
    config = StudentConfig.load(folder)
    card = model_card(folder, config)
    with atomic_path(file) as beside:
        beside.write_text(card, encoding="utf-8")
    return file


def try_to_write_model_card(folder: Path) -> Path | None:
    """The same, at the end of work that a card must not turn into a failure: what stands in its way is told."""
    try:
        file = write_model_card(folder)
    except OSError as error:
        print(f"No model card: {folder / CARD_NAME} cannot be written ({error.strerror})", file=sys.stderr)
        return None
    if file is None:
        print(f"{folder / CARD_NAME} is not a card of ours and stays as it is")
    return file


def model_card(folder: Path, config: StudentConfig) -> str:
    """The card as text."""
    record, lines = config.distillation or {}, read_metrics(folder / METRICS_NAME)
    base_model, evaluation = record.get("base_model"), read_evaluation(folder)
    parts = [
        HEAD.format(
            license="apache-2.0" if is_apache(record) else "other",
            base_model=f"base_model: {base_model}\n" if base_model else "",
        )
        + f"{CARD_MARK}; it is written again when the student is measured. -->",
        f"# {plain(folder.resolve().name)}",
        introduction(config, record),
        *pictures(folder, is_measured=bool(evaluation)),
        "## How it was made",
        table(("", ""), facts(config, record, lines)),
    ]
    for entry in record.get("commands", []):
        since = f"From step {entry['from_step']} on, with" if entry["from_step"] else "With"
        parts += [f"{since} learning rate {entry['lr']:g} and this command:", f"{FENCE}\n{entry['command']}\n{FENCE}"]
    if lines:
        parts += [
            "## Training",
            training_text(lines),
            table(("noise level", "first tenth", "last tenth"), losses(lines)),
        ]
    if (folder / LOSS_PLOT_NAME).is_file():
        parts.append(f"![Loss by noise level]({LOSS_PLOT_NAME})")
    if rows := evaluation_rows(evaluation):
        parts += ["## Evaluation", *rows]
    parts += ["## Use", *use(config), "## Limits", limits(config, record), "## Licence", licence(record)]
    return "\n\n".join(parts) + "\n"


def plain(text: object) -> str:
    """Text that a table or a heading of markdown shows as it is."""
    one_line = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_|<>[]#" else sign for sign in one_line)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def introduction(config: StudentConfig, record: dict) -> str:
    few = record.get("student_steps")
    steps = few or record.get("num_inference_steps")
    return (
        f"A text-to-image transformer of {config.num_parameters:,} parameters that draws what {teacher_name(record)} draws "
        f"in one frame, at {config.image_size} x {config.image_size} pixels in {steps} steps"
        f"{' (the teacher takes ' + str(record.get('num_inference_steps')) + ')' if few else ''}. It was distilled with "
        "WanDistiller from text prompts alone. It has learnt the teacher's guided answer, so it takes one pass a step and no "
        "negative prompt."
    )


def teacher_name(record: dict) -> str:
    """The teacher by its hub id, else by the name of what it was read from: where that lay is nobody else's business."""
    if base_model := record.get("base_model"):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    name = local_name(record)
    return f"the Wan checkpoint `{name}`" if name else "a Wan checkpoint"


def local_name(record: dict) -> str | None:
    """Of the teacher's folder or file, without the path to it."""
    path = record.get("teacher_path")
    return Path(path).name if path else None


def pictures(folder: Path, is_measured: bool) -> list[str]:
    """The newest sample picture, and the evaluation's where it is of this student."""
    found = sorted((folder / SAMPLES_NAME).glob("step_*.png"), key=lambda file: (len(file.name), file.name))[-1:]
    about = [(f"{SAMPLES_NAME}/{file.name}", "Prompts of the training, drawn") for file in found]
    if is_measured and (folder / COMPARISON_NAME).is_file():
        about.append((COMPARISON_NAME, "Prompts of the evaluation, drawn"))
    return [f"![{what} by teacher and student from the same noise]({link})" for link, what in about]


def facts(config: StudentConfig, record: dict, lines: list[dict]) -> list[tuple[str, object]]:
    """What was done, a row each; what the record does not hold is left out."""
    guidance = [f"{record[name]:g}" for name in ("guidance_scale", "guidance_scale_2") if record.get(name) is not None]
    rows = [
        ("teacher", plain(record.get("base_model") or local_name(record))),
        ("its settings", plain(record.get("preset"))),
        ("shift", record.get("shift")),
        ("guidance", " and ".join(guidance)),
        ("sampling steps", record.get("student_steps") or record.get("num_inference_steps")),
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
    return [(name, value) for name, value in rows if value not in (None, "", "None")]


def training_text(lines: list[dict]) -> str:
    first, last = loss_change(lines)
    text = (
        f"Mean squared error of the velocity: {first:.4g} over the first tenth of the steps, {last:.4g} over the last."
    )
    if errors := held_out_error(lines):
        named = " and ".join(f"{value:.3f} at {name.replace('_', ' ')}" for name, value in errors.items())
        text += f" Relative velocity error on held-out prompts at the end: {named}."
    return text


def losses(lines: list[dict]) -> list[tuple[str, str, str]]:
    changes = loss_change_by_sigma(lines)
    return [
        (f"sigma {bucket_name(bucket, len(changes))}", cell_text(first), cell_text(last))
        for bucket, (first, last) in enumerate(changes)
    ]


def read_evaluation(folder: Path) -> dict:
    """What evaluate_student.py has measured of the weights that are here; empty where it has not, or the file is damaged."""
    try:
        results = json.loads((folder / EVALUATION_NAME).read_text(encoding="utf-8"))
        measured_weights = results["student_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return results if measured_weights and measured_weights == weights_digest(folder) else {}


def evaluation_rows(results: dict) -> list[str]:
    """An evaluation as text and a table; nothing where it lacks something."""
    try:
        about = (
            f"`evaluate_student.py` on {results['num_prompts']} held-out prompts, noises of each: {results['num_seeds']}, the "
            "same for both:"
        )
        return [about, table(("", "student", "teacher", "student / teacher"), measured(results))]
    except (KeyError, TypeError):
        return []


def measured(results: dict) -> list[tuple[str, str, str, str]]:
    def row(name: str, *values: object) -> tuple[str, str, str, str]:
        student, teacher, ratio = (["" if value is None else cell_text(value) for value in values] + ["", ""])[:3]
        return name, student, teacher, ratio

    endpoint, rows = results["endpoint"], []
    if judged := results.get("accuracy"):
        shares = (f"{judged[who]['correct']:.1%}" for who in ("student", "teacher"))
        rows.append(("prompt drawn right", *shares, cell_text(judged["ratio"])))
    if "velocity_error" in results:
        rows.append(row("relative velocity error", results["velocity_error"]["mean"]))
    rows += [
        row("distance to the teacher's latents, relative", endpoint["latent_relative_error"]),
        row("PSNR, dB", endpoint["psnr_db"]),
        row("SSIM", endpoint["ssim"]),
    ]
    noise = results.get("noise")  # since they are measured, they stand in place of diversity
    rows += noise_rows(noise) if noise else []
    names = ("high_frequency_energy", *([] if noise else ["diversity"]), "prompt_sensitivity")
    compared = {name: results[name] for name in names}
    for name, values in (compared | results["cost"]).items():
        rows.append(row(name.replace("_", " "), values["student"], values["teacher"], values["ratio"]))
    return rows


def noise_rows(noise: dict) -> list[tuple[str, str, str, str]]:
    """What the noise decides in a picture, as `evaluation.noise_parts` defines it."""
    names = {"norm_ratio": "size", "cosine": "cosine to the teacher's", "gain": "gain"}
    return [(f"what the noise decides: {text}", "", "", cell_text(noise[name])) for name, text in names.items()]


def use(config: StudentConfig) -> list[str]:
    """How whoever has the folder draws with it."""
    exported = (
        "For diffusers and ComfyUI, which need none of that code, there are exports:\n\n```\n"
        "python export_student.py --student path/to/this/folder --format pipeline --output path/to/a/new/folder\n"
        "python export_student.py --student path/to/this/folder --format original --output student.safetensors\n```"
    )
    return [USE, *([exported] if config.block == "wan" else [])]


def is_apache(record: dict) -> bool:
    """Whether the teacher is known to be under Apache-2.0: a released Wan, or the demo's, which is part of this code and
    which an exported record knows by its world alone."""
    is_demo = record.get("world") == "shapes" or record.get("teacher_path") == f"./{DEMO_TEACHER}"
    return is_demo or str(record.get("base_model")).startswith("Wan-AI/")


def limits(config: StudentConfig, record: dict) -> str:
    texts = [
        f"It draws single square pictures; it was trained at {config.image_size} pixels alone, on "
        f"{record.get('num_prompts')} prompts. It makes no video.",
        "What the teacher cannot draw, it has not learnt; biases of the teacher's pictures are its own too.",
    ]
    low, high = record.get("sigma_range") or (0, 1)
    if (low, high) != (0, 1):
        texts.append(f"It knows the noise levels {low:g} to {high:g} alone and does not draw by itself.")
    return "\n".join(f"- {text}" for text in texts)


def licence(record: dict) -> str:
    origin = (
        "The weights were learnt from the teacher's answers"
        if record.get("init") == "random"
        else "The weights derive from those of the teacher"
    )
    if is_apache(record):
        return f"Apache-2.0. {origin}, which is under Apache-2.0 too."
    return (
        f"That of the teacher. {origin}, whose licence holds for its students; the released Wans are under Apache-2.0."
    )
