"""One Wan transformer in files of weights: its tensors under canonical names, read one at a time, and its own shape.

The shape comes from the tensors and from the config.json beside them, which must agree. Other kinds of Wan than
text-to-video are refused.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.gguf_files import require_architecture
from wandistiller.files.json_files import POSITIVE, WHOLE, setting
from wandistiller.files.weights import Stored, admit, all_tensors, digest_of, header_of, is_gguf
from wandistiller.model.config import ConfigError, StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.wan.lora import Lora
from wandistiller.wan.names import (
    PATCH_KERNEL,
    harmless_reason,
    own_names,
    refuse_other_kind,
    relative_of_wan,
    title_of,
    to_canonical,
    transformer_settings,
)

WAN_HEAD_DIM = 128
GGUF_ARCHITECTURE = "wan"
# Some converters name themselves instead; ComfyUI-GGUF goes by the tensors there, as is done here.
_GGUF_ARCHITECTURES = (GGUF_ARCHITECTURE, "pig", "cow")
LOCAL_LAYOUTS = (
    "a diffusers pipeline folder (model_index.json), its transformer folder, an original Wan folder (config.json + "
    "diffusion_pytorch_model*.safetensors, or high_noise_model/ and low_noise_model/), ComfyUI's models/, one .safetensors, .gguf or "
    ".pth file"
)
LAYOUTS = f"{LOCAL_LAYOUTS}, a hub id, or mock"


@dataclass(frozen=True)
class WanTransformer:
    """One Wan transformer (one expert) on disk, or the mock, whose tensors are read on demand.

    Attributes:
        location: the folder or file it comes from.
        config: its own shape as a StudentConfig.
        weights: its tensors by canonical names, each with a shape and `read()`.
        files: that they are read from; empty for the mock.
        ignored: the reason for each tensor in the files that is no weight of a text-to-video Wan.
        student: the config of the student that was exported to these files, else None.
        heads_are_assumed: whether nothing tells how wide a head is, so that Wan's width is taken.
        title: what its files call it in their metadata.
        loras: those that it is read with.
    """

    location: str | Path
    config: StudentConfig
    weights: Mapping[str, Any]
    files: Sequence[Path] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    student: StudentConfig | None = None
    heads_are_assumed: bool = False
    title: str = ""
    loras: tuple[Lora, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: weight.shape for name, weight in self.weights.items()}

    def read(self, name: str) -> Tensor:
        """Read a tensor to the CPU by its canonical name: in float32 where a LoRA changes it, else as it is stored."""
        tensor = self.weights[name].read()
        for lora in self.loras:
            tensor = lora.added_to(name, tensor)
        return tensor

    def fingerprint(self) -> str:
        """Return a digest of every byte of its files."""
        if self.files:
            return digest_of(self.files)
        return hashlib.sha256(f"{self.location} {self.config.to_json()}".encode()).hexdigest()


def open_transformer(
    location: Path, files: Sequence[Path], settings: dict, student: StudentConfig | None = None
) -> WanTransformer:
    """Open a transformer by the headers of its files.

    Args:
        settings: the config.json beside them, or empty.
        student: the student that the files are.

    Raises:
        UserError: they hold no text-to-video Wan, not all of it, or more than it.
    """
    found = all_tensors(files)
    for path in filter(is_gguf, files):
        require_architecture(path, _GGUF_ARCHITECTURES, "a Wan text-to-video transformer")
        found = {name: stored.with_shape(_whole_shape(name, stored.shape, found)) for name, stored in found.items()}
    found = own_names(re.escape(PATCH_KERNEL), to_canonical, found, files[0])
    refuse_other_kind(found, location)
    metadata = {name: text for name, text in header_of(files[0]).metadata.items() if isinstance(text, str)}
    # What export_student.py writes there tells the heads and eps, which no tensor does.
    if student is None and (told := metadata.get("student_config")):
        student = StudentConfig.from_json(told, f"{files[0]}, student_config in its metadata")
    if student is not None:
        settings = settings or transformer_settings(student)
        if PATCH_KERNEL in found and len(kernel := found[PATCH_KERNEL].shape) == 4:  # but for this frame it is a Wan
            found[PATCH_KERNEL] = found[PATCH_KERNEL].with_shape((*kernel[:2], 1, *kernel[2:]))
    config = _own_shape({name: stored.shape for name, stored in found.items()}, settings, location)
    weights, ignored = admit(
        found,
        teacher_tensor_shapes(config),
        location,
        what="Wan text-to-video",
        harmless=harmless_reason,
        suggested=relative_of_wan,
    )
    is_assumed = not {"num_attention_heads", "num_heads", "attention_head_dim"} & settings.keys()
    return WanTransformer(location, config, weights, files, ignored, student, is_assumed, title_of(metadata))


def _whole_shape(name: str, shape: tuple[int, ...], found: Mapping[str, Stored]) -> tuple[int, ...]:
    """Return the shape of a GGUF's tensor with the dimensions that ggml drops: it keeps four at most, and none of 1 in front."""
    if name.endswith(("modulation", "scale_shift_table")) and len(shape) == 2:
        return (1, *shape)
    if name.endswith(PATCH_KERNEL) and len(shape) == 4 and shape[2] == shape[3]:
        # Either the one frame of the kernel is gone, or the first two dimensions are one.
        bias = found.get(name.removesuffix(".weight") + ".bias")
        if bias is not None and shape[0] * shape[1] % bias.shape[0] == 0:
            return (bias.shape[0], shape[0] * shape[1] // bias.shape[0], 1, *shape[2:])
    return shape


def teacher_tensor_shapes(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    """Return the canonical names and shapes of the 3D transformer of this 2D shape, whose patch kernel has depth 1."""
    with torch.device("meta"):
        tensors = WanLiteStudent(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    out_channels, in_channels, *patch = shapes[PATCH_KERNEL]
    shapes[PATCH_KERNEL] = (out_channels, in_channels, 1, *patch)
    return shapes


def _own_shape(shapes: Mapping[str, tuple[int, ...]], settings: dict, where: Path) -> StudentConfig:
    """Return the shape that the tensors have, with heads and eps from the config.json, which must agree in the rest."""
    _refuse_settings(settings, where)
    try:
        hidden_size, in_channels, *kernel = shapes[PATCH_KERNEL]
        ffn_dim = shapes["blocks.0.ffn.net.0.proj.weight"][0]
        text_dim = shapes["condition_embedder.text_embedder.linear_1.weight"][1]
        freq_dim = shapes["condition_embedder.time_embedder.linear_1.weight"][1]
        out_rows = shapes["proj_out.weight"][0]
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"{where}: holds no Wan transformer (the tensors patch_embedding, blocks.0, text and time embedding, head "
            f"were looked for); allowed: {LAYOUTS}"
        ) from None
    if len(kernel) != 3 or kernel[0] != 1 or kernel[1] != kernel[2]:
        raise UserError(f"{where}: patch kernel {kernel}; one frame is exactly 2D only for a kernel (1, p, p)")
    if out_rows != in_channels * kernel[1] * kernel[2]:
        raise UserError(
            f"{where}: takes {in_channels} input channels and gives others, as an image-to-video (I2V) does; WanDistiller projects "
            "text-to-video models only"
        )
    numbers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,5})\.", name))}
    depth = next(number for number in itertools.count() if number not in numbers)  # a later block is a stranger
    sizes = {"dim": hidden_size, "num_layers": depth, "ffn_dim": ffn_dim, "freq_dim": freq_dim, "text_dim": text_dim}
    if settings.get("patch_size") not in (None, kernel, kernel[1]):
        raise UserError(f"{where}: config.json says patch_size {settings['patch_size']}, the tensors have {kernel}")
    sizes |= dict.fromkeys(("in_channels", "in_dim", "out_channels", "out_dim"), in_channels)
    for key, size in sizes.items():
        if (given := setting(settings, key, WHOLE, f"{where}, config.json")) not in (None, size):
            raise UserError(f"{where}: config.json says {key} {given}, the tensors have {size}")
    try:
        return StudentConfig(
            block="wan",
            hidden_size=hidden_size,
            depth=depth,
            num_heads=_num_heads(hidden_size, settings, where),
            ffn_dim=ffn_dim,
            num_channels=in_channels,
            text_encoder_output_dim=text_dim,
            freq_dim=freq_dim,
            patch_size=kernel[1],
            image_size=own_image_size(kernel[1]),
            eps=setting(settings, "eps", POSITIVE, f"{where}, config.json") or 1e-6,
        )
    except ConfigError as error:
        raise UserError(f"{where}: the transformer's shape cannot work: {error}") from None


def own_image_size(patch_size: int) -> int:
    """Return an image size for a Wan on disk, which names none: about 512 pixels, in whole patches behind both released VAEs."""
    unit = 16 * patch_size
    return max(1, 512 // unit) * unit


def _num_heads(hidden_size: int, settings: dict, where: Path) -> int:
    keys = ("num_attention_heads", "num_heads", "attention_head_dim")
    heads, of_original, head_dim = (setting(settings, key, WHOLE, f"{where}, config.json") for key in keys)
    if None not in (heads, of_original) and heads != of_original:
        raise UserError(f"{where}: config.json says {heads} and {of_original} heads")
    heads = heads or of_original
    if heads and head_dim not in (None, hidden_size / heads):
        raise UserError(
            f"{where}: config.json says {heads} heads of {head_dim} channels, the tensors have {hidden_size} channels"
        )
    head_dim = head_dim or WAN_HEAD_DIM
    if heads is None and hidden_size % head_dim:
        raise UserError(
            f"{where}: width {hidden_size} is not a multiple of head_dim {head_dim}, and no config.json tells the number of heads; "
            "use the folder layout, whose config.json has num_heads"
        )
    return heads or hidden_size // head_dim


def _refuse_settings(settings: dict, where: Path) -> None:
    """Refuse other kinds of Wan by what their config says, and variants whose maths would differ."""
    is_given_pictures = settings.get("image_dim") or settings.get("added_kv_proj_dim")
    told = [str(settings.get(key)) for key in ("_class_name", "model_type")]
    refuse_other_kind([*told, "i2v"] if is_given_pictures else told, where)
    expected = {"qk_norm": (True, "rms_norm_across_heads"), "cross_attn_norm": (True,), "window_size": ([-1, -1],)}
    for key, allowed in expected.items():
        if key in settings and settings[key] not in allowed:
            raise UserError(
                f"{where}: config.json has {key} {settings[key]!r}; a Wan text-to-video has {allowed[-1]!r}"
            )
