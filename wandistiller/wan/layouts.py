"""A Wan text-to-video model on disk or on the hub: its experts, and what the folder around them says of it.

It may be a diffusers pipeline folder (modular or not) or bare transformer folder, an original Wan folder (one or two experts), a
file of weights with any prefix (ComfyUI's, also fp8, fp8_scaled and whole checkpoints; GGUF; .pth), ComfyUI's models/, or a hub id.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from wandistiller.errors import UserError
from wandistiller.files.hub import local_path, place_of
from wandistiller.files.json_files import COMPONENT, POSITIVE, RATIO, read_json, setting
from wandistiller.files.weights import is_weight_file, weight_files
from wandistiller.model.config import CONFIG_NAME, WEIGHTS_NAME, StudentConfig
from wandistiller.wan.names import COMFYUI_FOLDERS, comfyui_models, refuse_other_kind, side_of, teacher_record
from wandistiller.wan.record_kinds import SAMPLING_KINDS, latents_kinds
from wandistiller.wan.transformer_files import LAYOUTS, LOCAL_LAYOUTS, WanTransformer, open_transformer
from wandistiller.wan.vae import read_vae_config
from wandistiller.wan.wan_files import SAME_EXPERTS, WanFiles, mock_wan_files

MODULAR_INDEX = "modular_model_index.json"
# Other files with Wan in their names that lie in these folders
_OTHERS = re.compile(r"(?<!t)i2v|flf2v|vace|animate|s2v|fun|camera|lora|vae|umt5|control", re.IGNORECASE)
_HUB_FILES = ["*.json", WEIGHTS_NAME, "diffusion_pytorch_model*.safetensors"] + [
    f"{folder}/*.safetensors" for folder in ("transformer", "transformer_2", "high_noise_model", "low_noise_model")
]


def open_teacher(
    teacher_path: str | Path | WanFiles, config: StudentConfig | None, low_noise_path: str | Path | None = None
) -> WanFiles:
    """Open a teacher by its headers, from disk or hub, or make the mock around `config`; one already open is returned."""
    if isinstance(teacher_path, WanFiles):
        return teacher_path
    if str(teacher_path) != "mock":
        return open_wan_files(teacher_path, low_noise_path)
    if low_noise_path is not None:
        raise UserError("--teacher_path_low belongs to a --teacher_path with the high-noise expert, not to mock")
    if config is None:
        raise UserError("the mock teacher is made around a student's shape; give --student_config")
    return mock_wan_files(config)


def open_wan_files(teacher_path: str | Path, low_noise_path: str | Path | None = None) -> WanFiles:
    """Open a Wan by its headers; no weight is read yet.

    Args:
        teacher_path: a folder, .safetensors or .gguf file, or hub id (`mock` is made by `mock_wan_files`).
        low_noise_path: the low-noise expert where the two are two files; teacher_path is then the high-noise one.

    Raises:
        UserError: the Wan is missing, damaged, contradictory, or of another kind.
    """
    location, path = str(teacher_path), place_of(teacher_path, _HUB_FILES, f"a local copy as {LOCAL_LAYOUTS}, or mock")
    wan_files = _open_folder(path, location) if path.is_dir() else WanFiles(location, {"high": _open_expert(path)})
    if low_noise_path is not None:
        if "low" in wan_files.experts:
            raise UserError(f"{location}: already has a low-noise expert; leave --teacher_path_low out")
        low = _open_expert(local_path(low_noise_path))
        wan_files = replace(wan_files, experts={**wan_files.experts, "low": low})
    _check_experts_agree(wan_files)
    return _with_own_record(wan_files)


def _open_expert(place: Path) -> WanTransformer:
    """Open one transformer: its folder, or one file of weights."""
    if place.is_dir():
        return open_transformer(place, weight_files(place, LAYOUTS), _read_if_there(place / "config.json"))
    if not os.path.exists(place):
        raise UserError(f"{place}: there is no such file or folder; allowed: {LAYOUTS}")
    if not is_weight_file(place):
        raise UserError(f"{place}: a {place.suffix or 'file without suffix'} is not read; allowed: {LAYOUTS}")
    # A transformer folder's own file means the folder's shape.
    is_of_folder = place.name.startswith("diffusion_pytorch_model")
    return open_transformer(place, [place], _read_if_there(place.with_name("config.json")) if is_of_folder else {})


def _read_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _open_pipeline_folder(folder: Path, location: str, index_name: str) -> WanFiles:
    """Open what diffusers saved: the tensors decide whether it is a Wan, whatever the pipeline is called."""
    index_path = folder / index_name
    index = read_json(index_path)
    name = str(index.get("_class_name"))
    refuse_other_kind([name], folder)
    is_modular = index_name == MODULAR_INDEX
    if not (folder / "transformer").is_dir():
        raise UserError(
            f"{folder}: has no transformer/ folder, and its {index_name} is that of a {name}; give a WanPipeline, or the repository "
            "that its parts lie in"
        )
    experts = {"high": _open_expert(folder / "transformer")}
    second = None if is_modular else (setting(index, "transformer_2", COMPONENT, index_path) or [None])[0]
    if second is not None or (is_modular and (folder / "transformer_2").is_dir()):
        experts["low"] = _open_expert(folder / "transformer_2")
    scheduler_path, vae = folder / "scheduler" / "scheduler_config.json", folder / "vae"
    scheduler = _read_if_there(scheduler_path)
    flow_shift, shift = (setting(scheduler, key, POSITIVE, scheduler_path) for key in ("flow_shift", "shift"))
    told = {"shift": flow_shift or shift, "boundary_ratio": setting(index, "boundary_ratio", RATIO, index_path)}
    record = told | _read_if_there(folder / "teacher_record.json")
    if (vae / "config.json").is_file():
        record |= read_vae_config(vae, experts["high"].config.num_channels)
    return WanFiles(location, experts, record, name)


def _comfyui_experts(models: Path) -> dict[str, Path]:
    """Return the only Wan in ComfyUI's models/, or two experts that their names tell apart."""
    found = sorted(
        path
        for name in COMFYUI_FOLDERS
        for path in (models / name).rglob("*")
        if is_weight_file(path) and re.search("wan", path.name, re.I) and not _OTHERS.search(path.name)
    )
    sides = {side_of(path): path for path in found}
    if len(found) == 2 and set(sides) == {"high", "low"}:
        return {"high": sides["high"], "low": sides["low"]}
    if len(found) == 1:
        return {"high": found[0]}
    names = ", ".join(str(path.relative_to(models)) for path in found) or "none"
    raise UserError(
        f"{models}: one Wan text-to-video, or a high-noise and a low-noise expert, were looked for in {', '.join(COMFYUI_FOLDERS)}; "
        f"found: {names}. Give one by its name, and a second expert as --teacher_path_low"
    )


def _open_folder(folder: Path, location: str) -> WanFiles:
    for index_name in ("model_index.json", MODULAR_INDEX):
        if (folder / index_name).is_file():
            return _open_pipeline_folder(folder, location, index_name)
    if (folder / CONFIG_NAME).is_file():
        return WanFiles(location, {"high": _open_student(folder)})
    places = {side: folder / f"{side}_noise_model" for side in ("high", "low")}  # of an original release
    if models := comfyui_models(folder):
        places = _comfyui_experts(models)
    elif not any(place.is_dir() for place in places.values()):
        places = {"high": folder}
    return WanFiles(location, {side: _open_expert(place) for side, place in places.items()})


def _open_student(folder: Path) -> WanTransformer:
    config = StudentConfig.load(folder)
    config.check_is_wan(folder, "no teacher")
    return replace(open_transformer(folder, [folder / WEIGHTS_NAME], {}, config), config=config)


def _check_experts_agree(wan_files: WanFiles) -> None:
    if len(wan_files.experts) == 1:
        return
    high, low = wan_files.experts.values()
    if high.config != low.config:
        raise UserError(f"{wan_files.location}: the high-noise and the low-noise expert differ in shape")
    if {path.resolve() for path in high.files} & {path.resolve() for path in low.files}:
        raise UserError(f"{wan_files.location}: {SAME_EXPERTS}")


def _with_own_record(wan_files: WanFiles) -> WanFiles:
    """Check what this Wan records of itself: its folder, or the student that is in its files."""
    student = wan_files.experts["high"].student
    record = {name: value for name, value in wan_files.record.items() if value is not None}
    record |= teacher_record(student) if student else {}
    for name, kind in (SAMPLING_KINDS | latents_kinds(wan_files.config.num_channels)).items():
        setting(record, name, kind, f"{wan_files.location}, what it records of itself")
    return replace(wan_files, record=record)
