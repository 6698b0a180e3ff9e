"""Write a wan student as other tools keep a Wan: a diffusers transformer folder, a pipeline folder, or a file of original names.

Each carries the student's own config in the metadata of its weights, so that `wandistiller.wan.layouts` opens it as a teacher.
"""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wandistiller import __version__
from wandistiller.errors import UserError
from wandistiller.files.atomic import write_json
from wandistiller.files.checked_json import COMPONENT, read_json, setting
from wandistiller.files.hub import hub_id
from wandistiller.files.safetensors_files import write_tensors
from wandistiller.model.config import StudentConfig
from wandistiller.projection.comfyui import comfyui_metadata
from wandistiller.projection.lift import lift
from wandistiller.sampling.sampler import SamplingOptions, wan_scheduler
from wandistiller.students.parts import teacher_paths
from wandistiller.wan.layouts import open_wan_files
from wandistiller.wan.names import teacher_record, transformer_settings

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


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a WanPipeline that a student draws with beside its transformer.

    Attributes:
        folders: the folders of "vae", "text_encoder" and "tokenizer".
        classes: library and class of the two text parts, as `text_classes` finds them.
        link: whether an export links to these folders instead of copying them.
    """

    folders: dict[str, Path]
    classes: dict[str, list[str]]
    link: bool


def write_pipeline_parts(
    config: StudentConfig, folder: Path, options: SamplingOptions, parts: PipelineParts, dtype: str = "fp32"
) -> None:
    """Write all of a WanPipeline folder but its transformer, into an existing folder.

    Args:
        options: how the student draws; the scheduler is that of `wandistiller.sampling.sampler`. A WanPipeline cannot be given
            noise levels, so for "flow_euler" it is Euler's method at the pipeline's own: 0.001 off for 4
            steps at shift 5, 0.002 for 8.
        dtype: precision of the transformer. With fp32 a copied text encoder is marked to be loaded in float32 as well:
            transformers takes the precision that its config names, and one of bf16 would draw other pictures than the
            student does here.
    """
    for name, source in parts.folders.items():
        _place(source, folder / name, parts.link)
    if dtype == "fp32" and not parts.link:
        _load_as_float32(folder / "text_encoder" / "config.json")
    sampler = "euler" if options.sampler == "flow_euler" else options.sampler
    scheduler = wan_scheduler(options.shift, options.num_inference_steps, sampler)
    # UniPC calls the shift flow_shift and FlowMatchEulerDiscreteScheduler calls it shift, so that from_config would drop it:
    scheduler.register_to_config(shift=options.shift)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        **parts.classes,
    }
    write_json(folder / "model_index.json", dict(sorted(index.items())), end="\n", indent=2)
    write_json(folder / "teacher_record.json", teacher_record(config), end="\n", indent=2)


def text_classes(encoder: Path) -> dict[str, list[str]]:
    """Return library and class of text encoder and tokenizer: as the folder around them says, else the released Wans'."""
    classes = {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    index_path = encoder.parent / "model_index.json"
    index = read_json(index_path) if index_path.is_file() else {}
    return {name: setting(index, name, COMPONENT, index_path) or default for name, default in classes.items()}


def published(config: StudentConfig, teacher_path: str | None = None) -> StudentConfig:
    """Return the config that an export carries: without commands and paths of this machine, and with the teacher's world.

    Args:
        teacher_path: where the teacher is, if not where the record says; a teacher that is not there tells of no world.
    """
    if not (record := config.distillation):
        return config
    kept = {
        name: value
        for name, value in record.items()
        if name not in ("command", "commands", "extra_prompts")
        and (not name.endswith("_path") or _is_of_hub(value, record))
    }
    if loras := record.get("teacher_loras"):
        kept["teacher_loras"] = [{name: lora[name] for name in lora if name != "path"} for lora in loras]
    if "world" not in kept and "teacher_path" in record:
        with contextlib.suppress(UserError):  # the teacher may be gone
            teacher = teacher_paths(config, teacher_path)[0]
            world = open_wan_files(teacher).record.get("world") if Path(teacher).exists() else None
            kept |= {"world": world} if world else {}
    return config.replace(distillation=kept)


def _is_of_hub(value: object, record: dict) -> bool:
    """Tell whether a recorded path is of the hub; a folder data/name looks like a hub id, but `base_model` tells them apart."""
    return isinstance(value, str) and (
        value == record.get("base_model") or (hub_id(value) == value != record.get("teacher_path"))
    )


def _save(
    tensors: dict[str, Tensor], config: StudentConfig, path: Path, more_metadata: dict[str, str] | None = None
) -> None:
    """Write weights with the student's config in their metadata, and the version that exported them."""
    about = {"format": "pt", "student_config": config.to_json(), "wandistiller_version": __version__}
    write_tensors(path, tensors, about | (more_metadata or {}))


def _load_as_float32(config_path: Path) -> None:
    """Make float32 the precision that transformers loads this model in."""
    settings = read_json(config_path)
    settings.pop("torch_dtype", None)  # transformers before 5 has this key
    write_json(config_path, settings | {"dtype": "float32"}, end="\n", indent=2)


def _place(source: Path, target: Path, link: bool) -> None:
    """Copy a folder without its pickles, or link to it."""
    if link:
        target.symlink_to(source.resolve(), target_is_directory=True)
    else:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.bin", "*.pth", "*.pt", "*.ckpt", ".*"))
