"""README.md of a folder exported for diffusers: a model card in the hub's format, and the lines that draw with it."""

from pathlib import Path

from wandistiller.files.atomic import write_text
from wandistiller.model.config import StudentConfig
from wandistiller.reports.cards import facts, is_apache, limits, table, teacher_name

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_THIS_FOLDER = "path/to/this/folder"


def drawing(config: StudentConfig, folder: str, dtype: str, *, link: bool = False) -> str:
    """Python that draws a prompt with an exported pipeline; of an untold number of steps, with diffusers' own.

    Args:
        folder: the pipeline's.
        dtype: of the transformer, "fp32", "bf16" or "fp16"; the VAE is kept in float32, as every Wan's.
        link: the text encoder is the teacher's own folder.
    """
    record = config.distillation or {}
    load = f'"{folder}"'
    remark = ""
    if dtype != "fp32":
        load += f', dtype={{"default": torch.{_TORCH_NAMES[dtype]}, "vae": torch.float32}}'
    elif link:
        load += ", dtype=torch.float32"
        remark = "# The linked text encoder would load in the precision that its own config names, often bf16:\n"
    steps = record.get("student_steps") or record.get("num_inference_steps")
    slots = config.text_max_length
    settings = ["num_frames=1", "guidance_scale=1.0"]
    settings += [f"num_inference_steps={steps}"] if steps else []
    settings += [f"height={config.image_size}", f"width={config.image_size}", 'output_type="pil"']
    settings += [f"max_sequence_length={slots}"] if slots != 512 else []
    return (
        "import torch\n"
        "from diffusers import WanPipeline\n\n"
        f"{remark}pipe = WanPipeline.from_pretrained({load})\n"
        'prompt = "a large blue circle on a white background"\n'
        f'pipe(prompt, {", ".join(settings)}).frames[0][0].save("picture.png")'
    )


def write_export_card(
    folder: Path, name: str, config: StudentConfig, export_format: str, dtype: str, *, link: bool = False
) -> None:
    """Write the card into an exported folder; `config` as `export.published` leaves it, `name` the folder's in the end."""
    write_text(folder / "README.md", _card(name, config, export_format, dtype, link))


def _card(name: str, config: StudentConfig, export_format: str, dtype: str, link: bool) -> str:
    record = config.distillation or {}
    base_model = record.get("base_model")
    licence = "apache-2.0" if is_apache(record) else "other"
    head = ["---", f"license: {licence}", *([f"base_model: {base_model}"] if base_model else [])]
    head += ["library_name: diffusers", "pipeline_tag: text-to-image", "tags:", "- wan", "- distillation", "---"]
    text = (
        f"A text-to-image transformer of {config.num_parameters:,} parameters, distilled with WanDistiller from "
        f"{teacher_name(record)}. It "
        "draws single pictures and makes no video. It has learnt the teacher's guided answer: guidance is 1.0, and there is no "
        "negative prompt."
    )
    if export_format == "pipeline":
        use = f"```python\n{drawing(config, _THIS_FOLDER, dtype, link=link)}\n```"
    else:
        use = (
            "The transformer alone; VAE, text encoder, tokenizer and scheduler are its teacher's:\n\n```python\n"
            "from diffusers import WanTransformer3DModel\n\n"
            f'transformer = WanTransformer3DModel.from_pretrained("{_THIS_FOLDER}")\n```'
        )
    parts = ["\n".join(head), f"# {name}", text, "## Use", use]
    if record:
        made = [(what, value) for what, value in facts(config, record, []) if what != "guidance"]
        made.append(("guidance", "1.0 (the teacher's is learnt)"))
        parts += ["## How it was made", table(("", ""), made), "## Limits", limits(config, record)]
    terms = (
        "Apache-2.0, as its teacher is." if licence == "apache-2.0" else "The teacher's licence holds for its students."
    )
    return "\n\n".join([*parts, "## Licence", terms]) + "\n"
