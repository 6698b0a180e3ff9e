"""Write a wan student as other tools keep a Wan: a diffusers transformer folder, or a file of original names.

Each carries the student's own config in the metadata of its weights, so that `wandistiller.wan.layouts` opens it as a teacher.
"""

from pathlib import Path

from torch import Tensor

from wandistiller import __version__
from wandistiller.files.atomic import write_json
from wandistiller.files.clone import DEMO_TEACHER, DEMO_WORLD
from wandistiller.files.hub import hub_id
from wandistiller.files.safetensors_files import write_tensors
from wandistiller.model.config import StudentConfig
from wandistiller.projection.comfyui import comfyui_metadata
from wandistiller.projection.lift import lift
from wandistiller.wan.names import transformer_settings

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def write_original_file(tensors: dict[str, Tensor], config: StudentConfig, path: Path, dtype: str = "fp32") -> None:
    """Write one safetensors file of original Wan names, whole or not at all; `tensors` is the student's state dict."""
    _save(lift(tensors, dtype, original=True), config, path, comfyui_metadata(config))


def write_transformer_folder(
    tensors: dict[str, Tensor], config: StudentConfig, folder: Path, dtype: str = "fp32"
) -> None:
    """Write config.json and weights of a diffusers WanTransformer3DModel into an existing folder."""
    write_json(folder / "config.json", transformer_settings(config), end="\n", indent=2)
    _save(lift(tensors, dtype), config, folder / WEIGHTS_NAME)


def published(config: StudentConfig) -> StudentConfig:
    """Return the config of an export: without commands and paths of this machine, and with the demo's world."""
    if not (record := config.distillation):
        return config
    kept = {
        name: value
        for name, value in record.items()
        if name not in ("command", "commands", "extra_prompts")
        and (not name.endswith("_path") or _is_of_hub(value, record))
    }
    if record.get("teacher_path") == f"./{DEMO_TEACHER}":
        kept |= {"world": DEMO_WORLD}
    if loras := record.get("teacher_loras"):
        kept["teacher_loras"] = [{name: lora[name] for name in lora if name != "path"} for lora in loras]
    return config.replace(distillation=kept)


def _is_of_hub(value: object, record: dict) -> bool:
    """Return whether a recorded path is of the hub; a folder data/name looks like a hub id, but `base_model` tells them apart."""
    return isinstance(value, str) and (
        value == record.get("base_model") or (hub_id(value) == value != record.get("teacher_path"))
    )


def _save(
    tensors: dict[str, Tensor], config: StudentConfig, path: Path, more_metadata: dict[str, str] | None = None
) -> None:
    """Write weights with the student's config in their metadata, and the version that exported them."""
    about = {"format": "pt", "student_config": config.to_json(), "wandistiller_version": __version__}
    write_tensors(path, tensors, about | (more_metadata or {}))
