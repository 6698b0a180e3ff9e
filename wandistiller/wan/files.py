"""Any Wan text-to-video checkpoint on disk, or on the hub -> its experts and what the folder around them says.

Layouts: a diffusers pipeline folder or bare transformer folder, an original Wan folder (one or two experts), a single
safetensors file with original names (ComfyUI's, also fp8 and fp8_scaled), and a hub id. Only safetensors and JSON are read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from wandistiller.files.checked_json import (
    COMPONENT,
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    TEXT,
    WHOLE,
    TeacherFileError,
    numbers,
    read_json,
    setting,
)
from wandistiller.files.hub import fetch, is_hub_id
from wandistiller.model.config import StudentConfig
from wandistiller.wan.names import teacher_record
from wandistiller.wan.transformer_files import (
    LAYOUTS,
    LOCAL_LAYOUTS,
    REFUSED_CLASSES,
    WanTransformer,
    refuse_kind,
    refuse_settings,
    stored_tensors,
)
from wandistiller.wan.vae import read_vae_config

WEIGHTS = "diffusion_pytorch_model"
LATENT_SETTINGS = ("latents_mean", "latents_std", "vae_scale_factor")
RECORD_KINDS = {
    "shift": POSITIVE,
    "guidance_scale": NOT_NEGATIVE,
    "guidance_scale_2": NOT_NEGATIVE,
    "num_inference_steps": WHOLE,
    "negative_prompt": TEXT,
    "vae_scale_factor": WHOLE,
}
TEXT_ENCODER_SOURCE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # all released Wans share this encoder


# ---- folders ----


def _safe_name(name: object, index: Path) -> str:
    """A shard's file name from an index: a path in a file is never followed outside its folder."""
    parts = PurePosixPath(str(name)).parts
    if not isinstance(name, str) or "\\" in name or PurePosixPath(name).is_absolute() or ".." in parts or not parts:
        raise TeacherFileError(f"{index}: names the shard {name!r}, which lies outside its folder")
    return name


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one transformer: those its index names, or the only one there is."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        # The plain name first: others are variants such as fp16.
        return _indexed_files(next((path for path in indexes if path.name.startswith(f"{WEIGHTS}.")), indexes[0]))
    files = sorted(folder.glob(f"{WEIGHTS}*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")])
        only = (
            f"; {pickled[0].name} is a pickle, which is never opened: get the safetensors version"
            if pickled
            else f"; allowed: {LAYOUTS}"
        )
        raise TeacherFileError(f"{folder}: holds no .safetensors weights{only}")
    return [path for path in files if path.name == f"{WEIGHTS}.safetensors"] or files


def check_weights(folder: Path) -> None:
    """Refuse a folder without weights, or with weights cut short; only headers are read."""
    for path in _weight_files(folder):
        stored_tensors(path)


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TeacherFileError(f"{index}: has no weight_map; copy the checkpoint again")
    names = dict.fromkeys(_safe_name(name, index) for name in weight_map.values())
    files = [index.parent / name for name in names]
    if missing := [path.name for path in files if not path.is_file()]:
        raise TeacherFileError(
            f"{index.parent}: {len(missing)} of {len(files)} shards are missing, the first is {missing[0]}"
        )
    return files


def _open_transformer_folder(folder: Path) -> WanTransformer:
    if not folder.is_dir():
        raise TeacherFileError(f"{folder}: there is no such folder")
    config_path = folder / "config.json"
    settings = read_json(config_path) if config_path.is_file() else {}
    refuse_settings(settings, folder)
    return WanTransformer(folder, _weight_files(folder), settings)


@dataclass
class WanFiles:
    """A teacher on disk: its experts and what the folder around them says.

    Attributes:
        location: what the user gave.
        experts: {"high": ...} or {"high": ..., "low": ...} (noise level).
        boundary_ratio, flow_shift: as the pipeline folder records them, else None.
        latents_mean, latents_std, vae_scale_factor: from vae/config.json, else None.
        record: teacher_record.json (the demo teacher's own defaults), or what an exported student says of itself; else empty.
    """

    location: str
    experts: dict[str, WanTransformer]
    boundary_ratio: float | None = None
    flow_shift: float | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    vae_scale_factor: int | None = None
    record: dict = field(default_factory=dict)
    _find_text_encoder: Callable[[], tuple[Path, Path]] | None = None

    @property
    def config(self) -> StudentConfig:
        return self.experts["high"].config

    @property
    def is_mock(self) -> bool:
        return self.location == "mock"

    def complete_from_vae(self, config_path: Path) -> None:
        """Take what is not known of the latents yet from a VAE's config.json."""
        vae = read_vae_config(config_path, self.config.num_channels)
        for name in LATENT_SETTINGS:
            if getattr(self, name) is None:
                setattr(self, name, getattr(vae, name))

    def expert(self, name: str) -> WanTransformer:
        if name not in self.experts:
            raise TeacherFileError(f'{self.location}: has no expert "{name}"; it has: {", ".join(self.experts)}')
        return self.experts[name]

    def text_encoder(self) -> tuple[Path, Path]:
        """Folders of the UMT5 encoder and its tokenizer (a hub checkpoint fetches them now)."""
        if self._find_text_encoder is None:
            raise TeacherFileError(
                f"{self.location}: has no text encoder beside it; give --text_encoder_path a folder with text_encoder/ "
                f"and tokenizer/, such as a copy of {TEXT_ENCODER_SOURCE} (only these two folders are needed)"
            )
        return self._find_text_encoder()


def find_text_encoder(path: str | Path) -> tuple[Path, Path]:
    """Encoder and tokenizer folders from `--text_encoder_path`: a pipeline folder, a hub id, or the encoder folder itself."""
    folder = Path(path)
    if not folder.exists() and is_hub_id(path):
        folder = fetch(str(path), ["text_encoder/*", "tokenizer/*"], "a local folder with text_encoder/ and tokenizer/")
    if (folder / "text_encoder").is_dir():
        return folder / "text_encoder", folder / "tokenizer"
    if (folder / "config.json").is_file():
        beside = folder.parent / "tokenizer"
        return folder, beside if beside.is_dir() else folder
    what = "holds no text encoder" if folder.exists() else "there is no such folder"
    raise TeacherFileError(
        f"{path}: {what}; --text_encoder_path takes a folder with text_encoder/ and tokenizer/, "
        f"such as a copy of {TEXT_ENCODER_SOURCE} (only these two folders are needed)"
    )


def _open_pipeline_folder(folder: Path, location: str) -> WanFiles:
    index_path = folder / "model_index.json"
    index = read_json(index_path)
    name = str(index.get("_class_name"))
    refuse_kind(REFUSED_CLASSES.get(name), folder)
    if not name.startswith("Wan"):
        raise TeacherFileError(f"{folder}: model_index.json is that of a {name}, not of a WanPipeline")
    experts = {"high": _open_transformer_folder(folder / "transformer")}
    if (setting(index, "transformer_2", COMPONENT, index_path) or [None])[0] is not None:
        experts["low"] = _open_transformer_folder(folder / "transformer_2")
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_path) if scheduler_path.is_file() else {}
    shifts = [setting(scheduler, key, POSITIVE, scheduler_path) for key in ("flow_shift", "shift")]
    record_path = folder / "teacher_record.json"
    wan_files = WanFiles(
        location,
        experts,
        boundary_ratio=setting(index, "boundary_ratio", RATIO, index_path),
        flow_shift=next((shift for shift in shifts if shift is not None), None),
        record=read_json(record_path) if record_path.is_file() else {},
        _find_text_encoder=(lambda: find_text_encoder(folder)) if (folder / "text_encoder").is_dir() else None,
    )
    if (vae_path := folder / "vae" / "config.json").is_file():
        wan_files.complete_from_vae(vae_path)
    return wan_files


def _open_original_folder(folder: Path, location: str) -> WanFiles:
    if (folder / "high_noise_model").is_dir() or (folder / "low_noise_model").is_dir():
        experts = {side: _open_transformer_folder(folder / f"{side}_noise_model") for side in ("high", "low")}
    else:
        experts = {"high": _open_transformer_folder(folder)}
    encoders = sorted(folder.glob("models_t5_*.pth"))
    find = None
    if encoders:

        def find() -> tuple[Path, Path]:
            raise TeacherFileError(
                f"{encoders[0]}: is Wan's text encoder as a pickle in its original layout, which is not opened here; give "
                f"--text_encoder_path a folder with text_encoder/ and tokenizer/ in transformers' format, such as a copy "
                f"of {TEXT_ENCODER_SOURCE} (only these two folders are needed; the encoder is the same)"
            )

    return WanFiles(location, experts, _find_text_encoder=find)


def _open_folder(folder: Path, location: str) -> WanFiles:
    if (folder / "model_index.json").is_file():
        return _open_pipeline_folder(folder, location)
    if (folder / "student_config.json").is_file():
        raise TeacherFileError(
            f"{folder}: is a student, not a Wan checkpoint; to use it as a teacher, export it first: python "
            "export_student.py --format pipeline"
        )
    return _open_original_folder(folder, location)


# ---- hub ----

_TRANSFORMER_FILES = [
    "model_index.json",
    "teacher_record.json",
    "config.json",
    "diffusion_pytorch_model*",
    "transformer/*",
    "transformer_2/*",
    "high_noise_model/*",
    "low_noise_model/*",
    "scheduler/*",
    "vae/config.json",
]


# ---- opening ----


def _open_single_file(path: Path) -> WanTransformer:
    if path.suffix != ".safetensors":
        raise TeacherFileError(f"{path}: a {path.suffix or 'file without suffix'} is not read; allowed: {LAYOUTS}")
    beside = path.with_name("config.json")  # a transformer folder's own file means the folder's shape
    is_of_folder = path.name.startswith("diffusion_pytorch_model") and beside.is_file()
    return WanTransformer(path, [path], read_json(beside) if is_of_folder else None)


def open_wan_files(teacher_path: str | Path, low_noise_path: str | Path | None = None) -> WanFiles:
    """Open a teacher by its headers; no weight is read yet.

    Args:
        teacher_path: folder, .safetensors file or hub id (`mock` is made by `mock_teacher.mock_wan_files`).
        low_noise_path: the low-noise expert where the two come as two files; teacher_path is then the high-noise one.

    Raises:
        TeacherFileError: missing, damaged, contradictory, or of another kind; one sentence says which.
    """
    location = str(teacher_path)
    path = Path(teacher_path)
    if path.is_file():
        wan_files = WanFiles(location, {"high": _open_single_file(path)})
    elif path.is_dir():
        wan_files = _open_folder(path, location)
    elif is_hub_id(location):
        wan_files = _open_folder(
            fetch(location, _TRANSFORMER_FILES, f"a local copy as {LOCAL_LAYOUTS}, or mock"), location
        )
        wan_files._find_text_encoder = lambda: find_text_encoder(location)
    else:
        raise TeacherFileError(f"{location}: there is no such file or folder; allowed: {LAYOUTS}")
    if low_noise_path is not None:
        _add_low_noise_file(wan_files, Path(low_noise_path))
    _check_experts_agree(wan_files)
    _complete_from_student(wan_files)
    return wan_files


def _add_low_noise_file(wan_files: WanFiles, path: Path) -> None:
    if "low" in wan_files.experts:
        raise TeacherFileError(f"{wan_files.location}: already has a low-noise expert; leave --teacher_path_low out")
    if not path.exists():
        raise TeacherFileError(f"{path}: there is no such file or folder (--teacher_path_low)")
    wan_files.experts["low"] = _open_transformer_folder(path) if path.is_dir() else _open_single_file(path)


def _check_experts_agree(wan_files: WanFiles) -> None:
    shapes = {name: expert.config for name, expert in wan_files.experts.items()}
    if len(set(map(StudentConfig.to_json, shapes.values()))) > 1:
        raise TeacherFileError(f"{wan_files.location}: the high-noise and the low-noise expert differ in shape")


def _complete_from_student(wan_files: WanFiles) -> None:
    """Where no folder around the transformer says how it is sampled, the file of an exported student does itself."""
    if not wan_files.record and (student := wan_files.experts["high"].student):
        wan_files.record = teacher_record(student)
    record, where = wan_files.record, f"{wan_files.location}, what it records of itself"
    statistics = numbers(wan_files.config.num_channels)
    for name, kind in (RECORD_KINDS | {"latents_mean": statistics, "latents_std": statistics}).items():
        setting(record, name, kind, where)
    for name in LATENT_SETTINGS:
        if getattr(wan_files, name) is None:
            setattr(wan_files, name, record.get(name))
