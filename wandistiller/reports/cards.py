"""Model cards in the hub's format: README.md of a student's folder, and README.md of a folder exported for diffusers.

    write_model_card(folder)
    write_export_card(folder, name, config, "pipeline", "bf16")

A student's card is made of what its folder holds (student_config.json, metrics.jsonl, evaluation.json and the pictures), so
that it can be written again when something is added.
"""

import json
import sys
from pathlib import Path

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
    newest_noise_part,
    noise_text,
    read_metrics,
    training_seconds,
)
from wandistiller.reports.progress import format_duration
from wandistiller.reports.tables import cell_text, comparison_rows, markdown_table
from wandistiller.sampling.recorded import trained_sizes, weights_digest

FENCE = "````"  # longer than any fence that a command is likely to hold
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
THIS_FOLDER = "path/to/this/folder"
DEFAULT_SLOTS = 512  # max_sequence_length of WanPipeline.__call__
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
    record, lines = config.distillation or {}, read_metrics(folder / METRICS_NAME)
    evaluation = read_evaluation(folder)
    parts = [
        f"{front_matter(record, 'wandistiller', ['wan', 'text-to-image', 'distillation'])}\n"
        f"{CARD_MARK}; it is written again when the student is measured. -->",
        f"# {plain(folder.resolve().name)}",
        introduction(config, record),
        *pictures(folder),
        "## How it was made",
        markdown_table(("", ""), facts(config, record, lines)),
    ]
    for entry in record.get("commands", []):
        since = f"From step {entry['from_step']} on, with" if entry["from_step"] else "With"
        parts += [f"{since} learning rate {entry['lr']:g} and this command:", f"{FENCE}\n{entry['command']}\n{FENCE}"]
    if lines:
        parts += [
            "## Training",
            training_text(lines),
            markdown_table(("noise level", "first tenth", "last tenth"), losses(lines)),
        ]
    if (folder / LOSS_PLOT_NAME).is_file():
        parts.append(f"![Loss by noise level]({LOSS_PLOT_NAME})")
    if rows := evaluation_rows(evaluation):
        parts += ["## Evaluation", *rows]
        if (folder / GALLERY_NAME).is_file():
            parts.append(
                f"[{GALLERY_NAME}]({GALLERY_NAME}) shows every prompt, the worst first; it opens from disk in a browser."
            )
    parts += ["## Use", *use(config), "## Limits", limits(config, record), "## Licence", licence(record)]
    return "\n\n".join(parts) + "\n"


def front_matter(record: dict, library_name: str, tags: list[str]) -> str:
    """Return the YAML that the hub reads at the top of a card."""
    from huggingface_hub import CardData  # unlike ModelCardData it keeps the order given here

    data = CardData(
        license="apache-2.0" if is_apache(record) else "other",
        base_model=record.get("base_model"),
        library_name=library_name,
        pipeline_tag="text-to-image",
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def plain(text: object) -> str:
    """Escape text so that a markdown table or heading shows it as it is."""
    one_line = " ".join(str(text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_|<>[]#" else sign for sign in one_line)


def introduction(config: StudentConfig, record: dict) -> str:
    few = record.get("student_steps")
    steps = few or record.get("num_inference_steps")
    return (
        f"A text-to-image transformer of {config.num_parameters:,} parameters that draws what {teacher_name(record)} draws "
        f"in one frame, at {sizes_text(config)} pixels in {steps} steps"
        f"{' (the teacher takes ' + str(record.get('num_inference_steps')) + ')' if few else ''}. It was distilled with "
        "WanDistiller from text prompts alone. It has learnt the teacher's guided answer, so it takes one pass a step and no "
        "negative prompt."
    )


def sizes_text(config: StudentConfig) -> str:
    """Return the sizes that a student was trained at in words."""
    return ", ".join(f"{size.width} x {size.height}" for size in trained_sizes(config))


def teacher_name(record: dict) -> str:
    """Name the teacher by its hub id, or by its file or folder without the path, which is nobody else's business."""
    if base_model := record.get("base_model"):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    name = local_name(record)
    return f"the Wan checkpoint `{name}`" if name else "a Wan checkpoint"


def local_name(record: dict) -> str | None:
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


def comfyui_use(config: StudentConfig, file: str) -> str:
    """Return how ComfyUI draws with an exported file, as markdown."""
    warnings = [f"- {warning}." for warning in comfyui_warnings(config)]
    told = f"{file} goes to ComfyUI's models/diffusion_models: {comfyui_settings(config)}."
    return "\n\n".join([told, *(["\n".join(warnings)] if warnings else [])])


def gguf_use(config: StudentConfig) -> str:
    """Return how ComfyUI-GGUF draws with an exported file, as markdown."""
    return (
        "For [ComfyUI-GGUF](https://github.com/city96/ComfyUI-GGUF); VAE and text encoder are its teacher's. The file goes into "
        f"`models/diffusion_models`; nodes: {comfyui_settings(config, LOADERS['gguf'])}."
    )


def facts(config: StudentConfig, record: dict, lines: list[dict]) -> list[tuple[str, object]]:
    """Return rows of what was done. What the record does not hold is left out."""
    guidance = [f"{record[name]:g}" for name in ("guidance_scale", "guidance_scale_2") if record.get(name) is not None]
    rows = [
        ("teacher", plain(record.get("base_model") or local_name(record))),
        (
            "with the LoRA",
            ", ".join(f"{plain(lora['file'])} at {lora['scale']:g}" for lora in record.get("teacher_loras") or []),
        ),
        ("its settings", plain(record.get("preset"))),
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
    return [(name, value) for name, value in rows if value not in (None, "", "None")]


def training_text(lines: list[dict]) -> str:
    first, last = map(cell_text, loss_change(lines))
    text = f"Mean squared error of the velocity: {first} over the first tenth of the steps, {last} over the last."
    if errors := held_out_error(lines):
        text += f" At held-out states, which it has not learnt from, at the end: {held_out_text(errors)}."
    if parts := newest_noise_part(lines):
        text += f" Of {noise_text(parts)}."
    return text


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


def evaluation_rows(results: dict) -> list[str]:
    """Return an evaluation as text and a table, or nothing if it lacks something."""
    try:
        num_trained = results.get("num_trained_prompts", 0)
        prompts = f"prompts, {num_trained} of them trained on" if num_trained else "held-out prompts"
        about = (
            f"`evaluate_student.py` on {results['num_prompts']} {prompts}, noises of each: {results['num_seeds']}, the "
            "same for both:"
        )
        return [about, markdown_table(("", "student", "teacher", "student / teacher"), comparison_rows(results))]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return []


def use(config: StudentConfig) -> list[str]:
    """Say how to draw with the folder."""
    exported = (
        "For diffusers and ComfyUI, which need none of that code, there are exports:\n\n```\n"
        "python export_student.py --student path/to/this/folder --format pipeline --output path/to/a/new/folder\n"
        "python export_student.py --student path/to/this/folder --format original --output student.safetensors\n```"
    )
    return [USE, *([exported] if config.block == "wan" else [])]


def is_apache(record: dict) -> bool:
    """Return whether the teacher is known to be under Apache-2.0: a released Wan, or the demo's, which is part of this code.

    The record of an export knows the demo's teacher only by its world.
    """
    is_demo = record.get("world") == DEMO_WORLD or record.get("teacher_path") == f"./{DEMO_TEACHER}"
    return is_demo or str(record.get("base_model")).startswith("Wan-AI/")


def limits(config: StudentConfig, record: dict) -> str:
    is_square = trained_sizes(config) == [square(config.image_size)]
    what, at = ("square pictures", config.image_size) if is_square else ("pictures", sizes_text(config))
    texts = [
        f"It draws single {what}; it was trained at {at} pixels alone, on "
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


def drawing(config: StudentConfig, folder: str, dtype: str, *, prompt: str, link: bool = False) -> str:
    """Return Python that draws a prompt with an exported pipeline, in diffusers' number of steps if none is recorded.

    Args:
        folder: folder of the pipeline.
        dtype: "fp32", "bf16" or "fp16", the precision of the transformer. The VAE stays in float32, as every Wan's does.
        prompt: what to draw.
        link: whether the text encoder is a link to the teacher's own folder.
    """
    record = config.distillation or {}
    load = f'"{folder}"'
    remark = ""
    if dtype != "fp32":
        load += f', dtype={{"default": torch.{TORCH_NAMES[dtype]}, "vae": torch.float32}}'
    elif link:
        load += ", dtype=torch.float32"
        remark = "# The linked text encoder would load in the precision that its own config names, often bf16:\n"
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
        f"{remark}pipe = WanPipeline.from_pretrained({load})\n"
        f"prompt = {json.dumps(prompt, ensure_ascii=False)}\n"
        f'pipe(prompt, {", ".join(settings)}).frames[0][0].save("picture.png")'
    )


def write_export_card(
    folder: Path, name: str, config: StudentConfig, export_format: str, dtype: str, *, prompt: str, link: bool = False
) -> None:
    """Write the card into an exported folder.

    Args:
        name: name that the folder will have in the end.
        config: the student's, with the record that is published.
        prompt: what the lines to copy draw.
    """
    if export_format == "gguf":
        card = export_card(name, config, gguf_use(config), "gguf")
    else:
        use = pipeline_use(config, dtype, prompt, link) if export_format == "pipeline" else TRANSFORMER_USE
        card = export_card(name, config, use)
    write_text(folder / CARD_NAME, card)


TRANSFORMER_USE = (
    "The transformer alone; VAE, text encoder, tokenizer and scheduler are its teacher's:\n\n```python\n"
    "from diffusers import WanTransformer3DModel\n\n"
    f'transformer = WanTransformer3DModel.from_pretrained("{THIS_FOLDER}")\n```'
)


def pipeline_use(config: StudentConfig, dtype: str, prompt: str, link: bool) -> str:
    """Return the lines that draw with an exported pipeline, as markdown."""
    return f"```python\n{drawing(config, THIS_FOLDER, dtype, prompt=prompt, link=link)}\n```"


def silent_mistakes(config: StudentConfig) -> str:
    """Return a table of what goes wrong in diffusers without a word, because its defaults are those of Wan's videos."""
    slots, shift = config.text_max_length, (config.distillation or {}).get("shift")
    rows = [
        ("`pipe(...)`", "`guidance_scale=1.0`", "5.0: what was guided already is guided again, in twice the time"),
        ("`pipe(...)`", "`num_frames=1`", "81: a video, which it has not learnt"),
        ("`pipe.encode_prompt(...)`", f"`max_sequence_length={slots}`", "226: another padding, other pictures"),
        (
            "`FlowMatchEulerDiscreteScheduler`, any other scheduler",
            f"its `shift` or `flow_shift`{'' if shift is None else f' {shift:g}'}, as `scheduler/` of a pipeline has it under both names",
            "1.0: other noise levels",
        ),
        (
            "`WanTransformer3DModel.from_single_file(...)`",
            "`config=` a folder of format diffusers",
            "a released model's shape, or the configuration of an image-to-video one",
        ),
    ]
    if slots != DEFAULT_SLOTS:
        rows.insert(
            2, ("`pipe(...)`", f"`max_sequence_length={slots}`", f"{DEFAULT_SLOTS}: another padding, other pictures")
        )
    return markdown_table(("call", "give it", "left out"), rows)


def export_card(name: str, config: StudentConfig, use: str, library: str = "diffusers") -> str:
    """Return the card of an exported folder as text; `use` says how to draw with it, in `library` if that is diffusers."""
    record = config.distillation or {}
    text = (
        f"A text-to-image transformer of {config.num_parameters:,} parameters, distilled with WanDistiller from "
        f"{teacher_name(record)}. It "
        "draws single pictures and makes no video. It has learnt the teacher's guided answer: guidance is 1.0, and there is no "
        "negative prompt."
    )
    parts = [front_matter(record, library, ["wan", "distillation"]), f"# {name}", text, "## Use", use]
    if library == "diffusers":
        parts += [
            "Left out, these go wrong in silence, because diffusers' defaults are those of videos:",
            silent_mistakes(config),
        ]
    if record:
        made = [(what, value) for what, value in facts(config, record, []) if what != "guidance"]
        made.append(("guidance", "1.0 (the teacher's is learnt)"))
        parts += ["## How it was made", markdown_table(("", ""), made), "## Limits", limits(config, record)]
    terms = "Apache-2.0, as its teacher is." if is_apache(record) else "The teacher's licence holds for its students."
    return "\n\n".join([*parts, "## Licence", terms]) + "\n"
