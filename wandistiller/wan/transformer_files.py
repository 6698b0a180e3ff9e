"""One Wan transformer in safetensors or GGUF files: its tensors under canonical names, read one at a time, and its own shape.

The shape comes from the tensors and from the config.json beside them, which must agree. Other kinds of Wan than
text-to-video are refused.
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wandistiller.files.checked_json import POSITIVE, WHOLE, TeacherFileError, setting
from wandistiller.files.gguf_files import SUFFIX as GGUF_SUFFIX
from wandistiller.files.gguf_files import GgufTensor
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.safetensors_files import open_safetensors, read_header
from wandistiller.model.config import ConfigError, StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.wan.gguf_weights import gguf_texts, stored_gguf_tensors
from wandistiller.wan.names import PATCH_KERNEL, other_wan_kind, to_canonical, transformer_settings, uses_original_names

WAN_HEAD_DIM = 128
HEAD_KEYS = {"num_attention_heads", "num_heads", "attention_head_dim"}
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
LOCAL_LAYOUTS = (
    "a diffusers pipeline folder (model_index.json), its transformer folder, an original Wan folder (config.json + "
    "diffusion_pytorch_model*.safetensors, or high_noise_model/ and low_noise_model/), one .safetensors or .gguf file"
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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, and the tensor that holds its fp8 scale, if any.

    Attributes:
        dtype: the stored precision as safetensors spells it, such as "BF16".
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    scale: "StoredTensor | GgufTensor | None" = None

    def read(self) -> Tensor:
        """Read the tensor to the CPU in its stored precision; an fp8 one becomes float32 times its scale."""
        # The file is opened for each tensor, since a mapping kept open would keep every page already read in memory.
        with open_safetensors(self.path) as file:
            tensor = file.get_tensor(self.key)
        return self._scaled(tensor)

    def read_row(self) -> Tensor:
        """Read the first row as `read` does, without the others."""
        with open_safetensors(self.path) as file:
            row = file.get_slice(self.key)[:1]
        return self._scaled(row)

    def _scaled(self, rows: Tensor) -> Tensor:
        if rows.dtype not in FP8_DTYPES:
            return rows
        if self.scale is None:
            return rows.float()
        scale = self.scale.read().float()
        return rows.float().mul_(
            scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (rows.ndim - 1))[: len(rows)]
        )


Stored = StoredTensor | GgufTensor


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == GGUF_SUFFIX


def stored_tensors(path: Path) -> Mapping[str, Stored]:
    """Return every tensor of a file by its name there; only the header is read."""
    if is_gguf(path):
        return stored_gguf_tensors(path)
    header = read_header(path)
    return {key: StoredTensor(path, key, shape, header.dtypes[key]) for key, shape in header.shapes.items()}


def _exported_student(path: Path) -> StudentConfig | None:
    """Read the config that export_student.py wrote into the file's metadata, for the heads and eps that no tensor tells."""
    metadata = gguf_texts(path) if is_gguf(path) else read_header(path).metadata
    text = metadata.get("student_config")
    if text is None:
        return None
    return StudentConfig.from_json(text, f"{path}, student_config in its metadata")


class TransformerTensors(Protocol):
    """One transformer that a teacher is read from: a `WanTransformer` on disk, or the mock. `WanTransformer` describes the members."""

    config: StudentConfig
    student: StudentConfig | None
    ignored: dict[str, str]
    heads_are_assumed: bool

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...
    def read_row(self, name: str) -> Tensor: ...


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
        self.location = location
        self.ignored: dict[str, str] = {}
        self._stored = self._index(files)
        self.student = _exported_student(files[0])
        if not settings and self.student is not None:
            settings = transformer_settings(self.student)
        self.heads_are_assumed = not settings or not HEAD_KEYS & settings.keys()
        self.config = _own_shape(self._shapes(), settings or {}, location)
        self._check_complete()

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def read(self, name: str) -> Tensor:
        """Read a tensor by its canonical name, as `StoredTensor.read` does."""
        return self._stored[name].read()

    def read_row(self, name: str) -> Tensor:
        """Read the first row of a tensor that has rows, as `read` would give it."""
        return self._stored[name].read_row()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self._stored.items()}

    def _index(self, files: list[Path]) -> dict[str, Stored]:
        """Return the weights of all files by their canonical names, those of fp8 with their scales."""
        found: dict[str, Stored] = {}
        for path in files:
            tensors = stored_tensors(path)
            if twice := next((key for key in tensors if key in found), None):
                raise TeacherFileError(
                    f"{path}: holds {twice}, which {found[twice].path.name} holds too; these are two models, give one file"
                )
            found.update(tensors)
        refuse_kind(other_wan_kind(list(found)), self.location)
        original = uses_original_names(list(found))
        plain = {to_canonical(key, original): stored for key, stored in found.items()}
        scaled_file = any(name == "scaled_fp8" or name.endswith(".comfy_quant") for name in plain)
        weights: dict[str, Stored] = {}
        for name, stored in plain.items():
            if reason := _no_weight_reason(name):
                self.ignored[name] = reason
            elif isinstance(stored, GgufTensor):
                weights[name] = stored
            elif stored.dtype in ("F8_E4M3", "F8_E5M2"):
                weights[name] = self._with_scale(name, stored, plain, scaled_file)
            elif stored.dtype in ("F32", "F16", "BF16", "F64"):
                weights[name] = stored
            else:
                raise TeacherFileError(
                    f"{stored.path}: {name} is stored as {stored.dtype}; allowed: fp32, fp16, bf16, fp8_e4m3fn, fp8_scaled"
                )
        return weights

    def _with_scale(self, name: str, stored: StoredTensor, plain: dict[str, Stored], scaled_file: bool) -> StoredTensor:
        stem = name.removesuffix(".weight")
        self._check_quant_format(stem, plain)
        for scale_name in (f"{stem}.scale_weight", f"{stem}.weight_scale"):
            if scale_name in plain:
                return replace(stored, scale=plain[scale_name])
        if scaled_file:
            raise TeacherFileError(
                f"{stored.path}: {name} is scaled fp8 but its scale ({stem}.scale_weight) is missing"
            )
        return stored

    @staticmethod
    def _check_quant_format(stem: str, plain: dict[str, Stored]) -> None:
        """Refuse other formats than fp8: ComfyUI's newer files name each layer's, as JSON in a byte tensor."""
        if f"{stem}.comfy_quant" not in plain:
            return
        marker = plain[f"{stem}.comfy_quant"]
        text = bytes(marker.read().tolist()).decode("utf-8", "replace")
        try:
            quant_format = parse_json(text).get("format")
        except (JsonError, AttributeError):
            quant_format = text
        if quant_format not in ("float8_e4m3fn", "float8_e5m2"):
            raise TeacherFileError(
                f"{marker.path}: {stem} is quantised as {reprlib.repr(quant_format)}; allowed: fp8_e4m3fn, fp8_scaled"
            )

    def _check_complete(self) -> None:
        """Refuse a transformer that lacks a tensor of its shape or has one of another size; set strangers aside by name."""
        expected = teacher_tensor_shapes(self.config)
        missing = [name for name in expected if name not in self._stored]
        if missing:
            raise TeacherFileError(
                f"{self.location}: {len(missing)} of {len(expected)} tensors of this Wan are missing, "
                f"the first is {missing[0]}; the checkpoint is incomplete or another kind of model"
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise TeacherFileError(
                    f"{self.location}: {name} has shape {list(self.shape(name))}, a Wan of this size has {list(shape)}"
                )
        for name in [name for name in self._stored if name not in expected]:
            self.ignored[name] = "no part of a text-to-video Wan"
            del self._stored[name]


def _no_weight_reason(name: str) -> str | None:
    """Return why a tensor is no weight itself; None where it is one."""
    if name == "scaled_fp8" or name.endswith(".comfy_quant"):
        return "marks fp8_scaled weights"
    if name.endswith((".scale_weight", ".weight_scale")):
        return "fp8 scale, multiplied into its weight"
    if name.endswith((".scale_input", ".input_scale")):
        return "fp8 activation scale, not needed at higher precision"
    return None


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
    depth = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name)))
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
