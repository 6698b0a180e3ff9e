"""One Wan transformer in safetensors or GGUF files: its tensors under canonical names, read one at a time, and its own shape.

The shape comes from the tensors and from the config.json beside them, which must agree. Other kinds of Wan than
text-to-video are refused.
"""

import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wandistiller.files.checked_json import POSITIVE, WHOLE, TeacherFileError, setting
from wandistiller.files.gguf_files import read_gguf_header
from wandistiller.files.safetensors_files import read_header
from wandistiller.files.torch_files import SUFFIXES as TORCH_SUFFIXES
from wandistiller.files.weights import Stored, admit, all_tensors, digest_of, is_gguf
from wandistiller.model.config import ConfigError, StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.wan.gguf_weights import as_wan_tensors, refuse_architecture
from wandistiller.wan.names import (
    PATCH_KERNEL,
    canonical_tensors,
    harmless_reason,
    other_wan_kind,
    relative_of_wan,
    transformer_settings,
)

WAN_HEAD_DIM = 128
HEAD_KEYS = {"num_attention_heads", "num_heads", "attention_head_dim"}
LOCAL_LAYOUTS = (
    "a diffusers pipeline folder (model_index.json), its transformer folder, an original Wan folder (config.json + "
    "diffusion_pytorch_model*.safetensors, or high_noise_model/ and low_noise_model/), ComfyUI's models/, one .safetensors, .gguf or "
    ".pth file"
)
LAYOUTS = f"{LOCAL_LAYOUTS}, a hub id, or mock"
# These are the names of a StudentConfig's dimensions in diffusers' and in the original's config.json.
_CONFIG_KEYS = {
    "hidden_size": ("dim",),
    "depth": ("num_layers",),
    "ffn_dim": ("ffn_dim",),
    "num_channels": ("in_channels", "in_dim"),
    "text_encoder_output_dim": ("text_dim",),
    "freq_dim": ("freq_dim",),
}
REFUSED_CLASSES = {
    "WanImageToVideoPipeline": "an image-to-video (I2V)",
    "WanVACEPipeline": "a VACE (editing)",
    "WanVACETransformer3DModel": "a VACE (editing)",
    "VaceWanModel": "a VACE (editing)",
    "WanAnimatePipeline": "an Animate",
    "WanAnimateTransformer3DModel": "an Animate",
    "WanAnimateModel": "an Animate",
    "WanModel_S2V": "a speech-to-video (S2V)",
}
_REFUSED_MODEL_TYPES = {
    "i2v": "an image-to-video (I2V)",
    "flf2v": "a first-last-frame-to-video (FLF2V)",
    "vace": "a VACE (editing)",
    "animate": "an Animate",
    "s2v": "a speech-to-video (S2V)",
}


def refuse_kind(kind: str | None, where: object) -> None:
    """Refuse another kind of Wan; None stands for text-to-video."""
    if kind:
        raise TeacherFileError(
            f"{where}: this is {kind} checkpoint; WanDistiller projects text-to-video models only "
            "(Wan2.1-T2V-1.3B/14B, Wan2.2-T2V-A14B, Wan2.2-TI2V-5B)"
        )


def _exported_student(path: Path) -> StudentConfig | None:
    """Read the config that export_student.py wrote into the file's metadata, for the heads and eps that no tensor tells."""
    if path.suffix in TORCH_SUFFIXES:
        return None
    metadata = read_gguf_header(path).texts if is_gguf(path) else read_header(path).metadata
    text = metadata.get("student_config")
    if text is None:
        return None
    return StudentConfig.from_json(text, f"{path}, student_config in its metadata")


class TransformerTensors(Protocol):
    """One transformer that a teacher is read from: a `WanTransformer` on disk, or the mock. `WanTransformer` describes the members."""

    location: str | Path
    config: StudentConfig
    student: StudentConfig | None
    ignored: dict[str, str]
    heads_are_assumed: bool

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...
    def fingerprint(self) -> str: ...


class WanTransformer:
    """One Wan transformer (one expert), whose tensors are read on demand under canonical names.

    Attributes:
        location: the folder or file it comes from.
        config: its own shape as a StudentConfig.
        ignored: the reason for each tensor in the files that is no weight of a text-to-video Wan.
        student: the config of the student that was exported to these files, else None.
        heads_are_assumed: whether nothing tells how wide a head is, so that Wan's width is taken.
    """

    def __init__(self, location: Path, files: list[Path], settings: dict | None = None):
        """Read the headers of `files`; `settings` is the config.json beside them, if there is one."""
        self.location: str | Path = location
        self.files = files
        found = _wan_tensors(files)
        refuse_kind(other_wan_kind(list(found)), location)
        self.student = _exported_student(files[0])
        if not settings and self.student is not None:
            settings = transformer_settings(self.student)
        self.heads_are_assumed = not settings or not HEAD_KEYS & settings.keys()
        self.config = _own_shape({name: stored.shape for name, stored in found.items()}, settings or {}, location)
        expected = teacher_tensor_shapes(self.config)
        self._weights, self.ignored = admit(
            found, expected, location, what="Wan text-to-video", harmless=harmless_reason, suggested=relative_of_wan
        )

    def names(self) -> list[str]:
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights[name].shape

    def read(self, name: str) -> Tensor:
        """Read a tensor by its canonical name, as `Weight.read` does."""
        return self._weights[name].read()

    def fingerprint(self) -> str:
        """Return a digest of every byte of its files."""
        return digest_of(self.files)


def _wan_tensors(files: list[Path]) -> dict[str, Stored]:
    """Return the tensors of files by canonical names, in the shapes that a Wan's have."""
    found = all_tensors(files)
    if any(map(is_gguf, files)):
        found = as_wan_tensors(found)
        for path in filter(is_gguf, files):
            refuse_architecture(path)
    return canonical_tensors(found, files[0])


def teacher_tensor_shapes(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    """Return the canonical names and shapes of the 3D transformer of this 2D shape, whose patch kernel has depth 1."""
    with torch.device("meta"):
        tensors = WanLiteStudent(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    out_channels, in_channels, *patch = shapes[PATCH_KERNEL]
    shapes[PATCH_KERNEL] = (out_channels, in_channels, 1, *patch)
    return shapes


def _own_shape(shapes: dict[str, tuple[int, ...]], settings: dict, where: Path) -> StudentConfig:
    """Return the shape that the tensors have, with heads and eps from the config.json, which must agree in the rest."""
    refuse_settings(settings, where)
    try:
        hidden_size, in_channels, *kernel = shapes["patch_embedding.weight"]
        ffn_dim = shapes["blocks.0.ffn.net.0.proj.weight"][0]
        text_dim = shapes["condition_embedder.text_embedder.linear_1.weight"][1]
        freq_dim = shapes["condition_embedder.time_embedder.linear_1.weight"][1]
        out_rows = shapes["proj_out.weight"][0]
    except (KeyError, IndexError, ValueError):
        raise TeacherFileError(
            f"{where}: holds no Wan transformer (the tensors patch_embedding, blocks.0, text and time embedding, head "
            f"were looked for); allowed: {LAYOUTS}"
        ) from None
    if len(kernel) != 3 or kernel[0] != 1 or kernel[1] != kernel[2]:
        raise TeacherFileError(f"{where}: patch kernel {kernel}; one frame is exactly 2D only for a kernel (1, p, p)")
    if out_rows != in_channels * kernel[1] * kernel[2]:
        refuse_kind(f"an image-conditioned ({in_channels} input channels)", where)
    depth = len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})
    found: dict[str, Any] = {
        "hidden_size": hidden_size,
        "depth": depth,
        "ffn_dim": ffn_dim,
        "num_channels": in_channels,
        "text_encoder_output_dim": text_dim,
        "freq_dim": freq_dim,
    }
    for name, from_tensors in found.items():
        from_config, keys = _config_value(settings, name, where)
        if from_config not in (None, from_tensors):
            raise TeacherFileError(
                f"{where}: config.json says {name} {from_config} ({keys}), the tensors have {from_tensors}"
            )
    try:
        return StudentConfig(
            block="wan",
            num_heads=_num_heads(hidden_size, settings, where),
            patch_size=kernel[1],
            image_size=own_image_size(kernel[1]),
            eps=setting(settings, "eps", POSITIVE, f"{where}, config.json") or 1e-6,
            **found,
        )
    except ConfigError as error:
        raise TeacherFileError(f"{where}: the transformer's shape cannot work: {error}") from None


def own_image_size(patch_size: int) -> int:
    """Return an image size for a Wan on disk, which names none: about 512 pixels, in whole patches behind both released VAEs."""
    unit = 16 * patch_size
    return max(1, 512 // unit) * unit


def _config_value(settings: dict, name: str, where: Path) -> tuple[int | None, str]:
    """Return what config.json says of a dimension, None where it says nothing, and the key it has there."""
    if name == "hidden_size" and "dim" not in settings:
        heads, head_dim = (_count(settings, key, where) for key in ("num_attention_heads", "attention_head_dim"))
        return heads * head_dim if heads and head_dim else None, "num_attention_heads x attention_head_dim"
    for key in _CONFIG_KEYS[name]:
        if (value := _count(settings, key, where)) is not None:
            return value, key
    return None, ""


def _count(settings: dict, key: str, where: Path) -> int | None:
    return setting(settings, key, WHOLE, f"{where}, config.json")


def _num_heads(hidden_size: int, settings: dict, where: Path) -> int:
    heads = _count(settings, "num_attention_heads", where) or _count(settings, "num_heads", where)
    if heads is not None:
        return heads
    head_dim = _count(settings, "attention_head_dim", where) or WAN_HEAD_DIM
    if hidden_size % head_dim:
        raise TeacherFileError(
            f"{where}: width {hidden_size} is not a multiple of head_dim {head_dim}, and no config.json tells the "
            "number of heads; use the folder layout, whose config.json has num_heads"
        )
    return hidden_size // head_dim


def refuse_settings(settings: dict, where: Path) -> None:
    """Refuse other kinds of Wan by what their config says, and variants whose maths would differ."""
    refuse_kind(REFUSED_CLASSES.get(str(settings.get("_class_name"))), where)
    refuse_kind(_REFUSED_MODEL_TYPES.get(str(settings.get("model_type", "")).lower()), where)
    if settings.get("image_dim") or settings.get("added_kv_proj_dim"):
        refuse_kind("an image-to-video (I2V)", where)
    expected = {
        "qk_norm": (True, "rms_norm_across_heads"),
        "cross_attn_norm": (True,),
        "window_size": ([-1, -1],),
    }
    for key, allowed in expected.items():
        if key in settings and settings[key] not in allowed:
            raise TeacherFileError(
                f"{where}: config.json has {key} {settings[key]!r}; a Wan text-to-video has {allowed[-1]!r}"
            )
