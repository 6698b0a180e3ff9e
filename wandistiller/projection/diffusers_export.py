"""A wan student on disk as other tools have a Wan: a diffusers transformer folder, a whole pipeline, one file of original names.

Each carries the student's own config in the metadata of its weights, so that it is a teacher again (`wan_checkpoint`).
"""

import contextlib
import json
import shutil
from pathlib import Path

from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.atomic import write_json
from wandistiller.files.hub import hub_id
from wandistiller.files.safetensors_files import write_tensors
from wandistiller.model.config import StudentConfig
from wandistiller.projection.comfyui import comfyui_metadata
from wandistiller.projection.lift import lift
from wandistiller.sampling.recorded import teacher_paths
from wandistiller.sampling.sampler import SamplingOptions, wan_scheduler
from wandistiller.wan.files import open_wan_files
from wandistiller.wan.names import teacher_record, transformer_settings

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def write_original_file(tensors: dict[str, Tensor], config: StudentConfig, path: Path, dtype: str = "fp32") -> None:
    """One safetensors file of original Wan names, whole or not at all; `tensors` is the student's state dict."""
    _save(lift(tensors, dtype, original=True), config, path, comfyui_metadata(config))


def write_transformer_folder(
    tensors: dict[str, Tensor], config: StudentConfig, folder: Path, dtype: str = "fp32"
) -> None:
    """config.json and weights of a diffusers WanTransformer3DModel, into an existing folder."""
    write_json(folder / "config.json", transformer_settings(config), end="\n", indent=2)
    _save(lift(tensors, dtype), config, folder / WEIGHTS_NAME)


def write_pipeline_parts(
    config: StudentConfig,
    folder: Path,
    options: SamplingOptions,
    parts: dict[str, Path],
    classes: dict[str, list],
    *,
    link: bool,
    dtype: str = "fp32",
) -> None:
    """All of a WanPipeline folder but its transformer.

    Args:
        options: how the student draws; the scheduler is that of `wandistiller.sampling.sampler`.
        parts: the folders of "vae", "text_encoder" and "tokenizer".
        classes: library and class of the two text parts, as `text_classes` finds them.
        link: make links to these folders instead of copies.
        dtype: of the transformer. With fp32 the copied text encoder is to be loaded so too: transformers takes the precision
            that its config names, and one of bf16 would draw other pictures than the student does here.
    """
    for name, source in parts.items():
        _place(source, folder / name, link)
    if dtype == "fp32" and not link:
        _load_as_float32(folder / "text_encoder" / "config.json")
    wan_scheduler(options.shift, options.num_inference_steps, options.sampler).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        **classes,
    }
    write_json(folder / "model_index.json", dict(sorted(index.items())), end="\n", indent=2)
    write_json(folder / "teacher_record.json", teacher_record(config), end="\n", indent=2)


def text_classes(encoder: Path) -> dict[str, list]:
    """Library and class of text encoder and tokenizer: as the pipeline folder around them says, else the released Wans'."""
    classes = {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    index_path = encoder.parent / "model_index.json"
    index = json.loads(index_path.read_text(encoding="utf-8")) if index_path.is_file() else {}
    return {name: index.get(name, default) for name, default in classes.items()}


def published(config: StudentConfig, teacher_path: str | None = None) -> StudentConfig:
    """The config as it leaves this machine: without commands and paths of it, and with the world that its teacher knows.

    Args:
        teacher_path: the teacher where it is not where the record says; one that is not there tells of no world.
    """
    if not (record := config.distillation):
        return config
    kept = {
        name: value
        for name, value in record.items()
        if name not in ("command", "commands") and (not name.endswith("_path") or _is_of_hub(value, record))
    }
    if "world" not in kept and "teacher_path" in record:
        with contextlib.suppress(UserError):  # a teacher that is no longer there
            teacher = teacher_paths(config, teacher_path)[0]
            world = open_wan_files(teacher).record.get("world") if Path(teacher).exists() else None
            kept |= {"world": world} if world else {}
    return config.replace(distillation=kept)


def _is_of_hub(value: object, record: dict) -> bool:
    """A folder data/name looks as a hub id does; the record says of its teacher which of the two it was."""
    return isinstance(value, str) and (
        value == record.get("base_model") or (hub_id(value) == value != record.get("teacher_path"))
    )


def _save(
    tensors: dict[str, Tensor], config: StudentConfig, path: Path, more_metadata: dict[str, str] | None = None
) -> None:
    write_tensors(path, tensors, {"format": "pt", "student_config": config.to_json(), **(more_metadata or {})})


def _load_as_float32(config_path: Path) -> None:
    """Name float32 as the precision that transformers loads this model in."""
    settings = json.loads(config_path.read_text(encoding="utf-8"))
    settings.pop("torch_dtype", None)  # the same key in transformers before 5
    write_json(config_path, settings | {"dtype": "float32"}, end="\n", indent=2)


def _place(source: Path, target: Path, link: bool) -> None:
    """A copy of a folder without its pickles, or a link to it."""
    if link:
        target.symlink_to(source.resolve(), target_is_directory=True)
    else:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.bin", "*.pth", "*.pt", "*.ckpt", ".*"))
