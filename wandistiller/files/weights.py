"""The one door for weights: every tensor of a file is used, known to do no harm, or the file is refused by that tensor's name.

A model says which tensors it expects; the door pairs fp8 weights with their scales, holds shapes, precisions, scales and markers
against each other, and returns `Weight`s, whose numbers are checked to be finite as they are read.
"""

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from torch import Tensor

from wandistiller.errors import UserError, shown
from wandistiller.files.atomic import file_digest, write_text
from wandistiller.files.gguf_files import read_gguf_header
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.tensor_files import Header, StoredTensor, indexed_files, read_header, read_torch_header

Stored = StoredTensor  # of safetensors, GGUF or torch.save
WEIGHTS = "diffusion_pytorch_model"
_READERS = {".safetensors": read_header, ".gguf": read_gguf_header, **dict.fromkeys((".pth", ".pt"), read_torch_header)}
# What to do where a folder holds other files alone
_OTHERS = {
    ".gguf": "GGUF files are given by their names; of two experts the low-noise one as --teacher_path_low",
    **dict.fromkeys((".bin", ".pth", ".pt"), "a pickle, not looked for in a folder: get the safetensors version"),
}
_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FLOATS = ("F32", "F16", "BF16", "F64", *_FP8)
_SCALES = ("scale_weight", "weight_scale")
_MARKER = "scaled_fp8"  # its own type is that of the scaled weights; float32 stands for float8_e4m3fn (ComfyUI: model_detection.py)
_LAYER_MARKER = "comfy_quant"
_MOST_MARKER_BYTES = 4096
_MOST_TENSORS = 20_000  # of a file; with three scales a weight, a Wan with VAE and text encoder in one has 5,000
# Tensors that no weight is, whatever the model: their names, how many values they may have, and why they do no harm.
_HARMLESS = (
    (re.compile(r"(^|\.)spiece_model$"), 2**28, "the tokenizer's words, no weight"),
    (re.compile(r"^model_type\."), 16, "a marker of the kind of model"),
    (re.compile(r"(^|\.)logit_scale$"), 1, "a number of CLIP's that ComfyUI keeps beside every text encoder"),
)


def is_weight_file(path: Path) -> bool:
    """Tell by its suffix, of any case, whether a file holds tensors."""
    return path.suffix.lower() in _READERS


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def header_of(path: Path) -> Header:
    """Read every tensor of a .safetensors, .gguf or .pth file by its name there, and the metadata; no values are read."""
    header = _READERS.get(path.suffix.lower(), read_header)(path)
    if (count := len(header.tensors)) > _MOST_TENSORS:
        raise UserError(f"{path}: holds {count:,} tensors, as no model does; at most {_MOST_TENSORS:,}")
    return header


def stored_tensors(path: Path) -> dict[str, Stored]:
    return header_of(path).tensors


def weight_files(folder: Path, allowed: str = "*.safetensors") -> list[Path]:
    """Return the safetensors files of one model of diffusers or transformers: those that its index names, or the only one.

    Args:
        allowed: what might be given instead, for the message.
    """
    # The plain names are preferred, since others are variants such as fp16.
    plain = [folder / f"{stem}.safetensors{end}" for stem in (WEIGHTS, "model") for end in ("", ".index.json")]
    found = [path for path in plain if path.is_file()] or sorted(folder.glob("*.safetensors.index.json"))
    index = found[1] if len(found) > 1 and found[1].name.endswith(".json") else None
    if index and indexed_files(index) != found[:1]:
        raise UserError(f"{folder}: holds {found[0].name} and {index.name} of other files; remove one of the two")
    if found:
        return indexed_files(found[0]) if found[0].suffix == ".json" else found[:1]
    files = sorted(folder.glob(f"{WEIGHTS}*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix in _OTHERS)
        advice = f"; {others[0]}: {_OTHERS[others[0].suffix]}" if others else f"; allowed: {allowed}"
        raise UserError(f"{folder}: holds no .safetensors weights{advice}")
    return files


def all_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """Return the tensors of several files that are one model, in which none is there twice."""
    found: dict[str, Stored] = {}
    for path in files:
        tensors = stored_tensors(path)
        if twice := next((key for key in tensors if key in found), None):
            raise UserError(
                f"{path}: holds {twice}, which {found[twice].path.name} holds too; these are two models, give one file"
            )
        found.update(tensors)
    return found


@dataclass(frozen=True)
class Weight:
    """A tensor of a file, times its scale where it has one."""

    stored: Stored
    scale: Stored | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self) -> Tensor:
        """Read the weight to the CPU in its stored precision; one in fp8 or with a scale becomes float32, and all are finite."""
        values = self.stored.read()
        if self.stored.dtype in _FP8 or self.scale is not None:
            values = values.float()
        if self.scale is not None:
            scale = self.scale.read().float()
            rows, columns = _blocks(scale.shape, self.shape) or (1, 1)
            blocks = values.view(rows, -1, columns, prod(self.shape[1:]) // columns)
            blocks.mul_(scale.where(scale >= 0, math.nan).view(rows, 1, columns, 1))
        if values.numel() and not all(bound.isfinite() for bound in values.aminmax()):
            scale_too = f", or its scale {shown(self.scale.key)} some below 0" if self.scale else ""
            raise UserError(
                f"{self.stored.path}: {self.stored.key} holds numbers that are not finite{scale_too}; the file is damaged, copy it again"
            )
        return values


def _blocks(scale: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return into how many rows and columns of blocks a scale divides a weight; None where it does not fit.

    It may be of the whole, of each row (alone, or with dimensions of 1), or of each block of a matrix.
    """
    if prod(scale) == 1:
        return 1, 1
    if shape and scale[0] == shape[0] == prod(scale):
        return scale[0], 1
    if len(scale) == len(shape) == 2 and all(scale) and shape[0] % scale[0] == shape[1] % scale[1] == 0:
        return scale[0], scale[1]
    return None


_ENDS = {
    **dict.fromkeys(_SCALES, "fp8 scale, multiplied into its weight"),
    **dict.fromkeys(("scale_input", "input_scale"), "fp8 activation scale, not needed at higher precision"),
    _LAYER_MARKER: "marks fp8_scaled weights",
}


def admit(
    found: Mapping[str, Stored],
    expected: Mapping[str, tuple[int, ...]],
    where: object,
    *,
    what: str = "model",
    harmless: Callable[[str], str | None] = lambda name: None,
    suggested: Callable[[str], str | None] = lambda name: None,
) -> tuple[dict[str, Weight], dict[str, str]]:
    """Account for every tensor that was found.

    Args:
        found: by the names that the model has for them.
        expected: shapes of the model's own tensors.
        what: the model's name in messages.
        harmless: returns why another tensor does no harm, None where it is a stranger.
        suggested: returns what the name of a stranger suggests.

    Returns:
        The weights, and the reason for each tensor that is no weight of the model.

    Raises:
        UserError: one is missing, a stranger, of another shape or precision, or its scale does not fit.
    """
    if missing := [name for name in expected if name not in found]:
        raise UserError(
            f"{where}: {len(missing)} of {len(expected)} tensors of this {what} are missing, the first is {missing[0]}; the "
            "checkpoint is incomplete or another kind of model"
        )
    rest = dict(found)
    marker = _read_marker(rest)
    weights: dict[str, Weight] = {}
    ignored = {_MARKER: "marks fp8_scaled weights"} if marker else {}
    for name, shape in expected.items():
        stored, stem = rest.pop(name), name.removesuffix(".weight")
        if stored.shape != shape:
            raise UserError(
                f"{where}: {shown(stored.key)} has shape {list(stored.shape)}, a {what} of this size has {list(shape)}"
            )
        own = {end: rest.pop(f"{stem}.{end}") for end in _ENDS if f"{stem}.{end}" in rest}
        weights[name] = _weight(name, stored, own, marker)
        ignored |= {f"{stem}.{end}": _ENDS[end] for end in own}
    ignored |= {name: reason for name, stored in rest.items() if (reason := harmless(name) or _harmless(name, stored))}
    if strangers := [name for name in rest if name not in ignored]:
        raise UserError(
            f"{where}: tensors that are no part of a {what}: {len(strangers)}, the first is {shown(rest[strangers[0]].key)}: "
            + (suggested(strangers[0]) or "it is another kind of model, or more than one")
        )
    return weights, ignored


def _harmless(name: str, stored: Stored) -> str | None:
    size = prod(stored.shape)
    return next((reason for pattern, most, reason in _HARMLESS if pattern.search(name) and size <= most), None)


def _read_marker(rest: dict[str, Stored]) -> str | None:
    """Take the marker of a file of scaled fp8 weights, and return their type."""
    if (marker := rest.pop(_MARKER, None)) is None:
        return None
    dtype = "F8_E4M3" if marker.dtype == "F32" else marker.dtype
    if dtype not in _FP8 or prod(marker.shape) > 2:
        raise UserError(
            f"{marker.path}: {marker.key} is stored as {marker.dtype} of shape {list(marker.shape)}; allowed: up to two numbers of "
            "float8_e4m3fn or float8_e5m2, the type that it marks"
        )
    return dtype


def _weight(name: str, stored: Stored, own: Mapping[str, Stored], marker: str | None) -> Weight:
    """Hold a weight's precision, its scale and its markers against each other."""
    is_fp8, layer_marker = stored.dtype in _FP8, own.get(_LAYER_MARKER)
    scales = [own[end] for end in _SCALES if end in own]
    scale, wrong = scales[0] if scales else None, None
    if not is_gguf(stored.path) and stored.dtype not in FLOATS:
        wrong = "; allowed: fp32, fp16, bf16, fp8_e4m3fn, fp8_scaled"
    elif layer_marker and (quantised := _layer_format(layer_marker)) != _FP8.get(stored.dtype):
        wrong = f" and quantised as {shown(quantised)}; allowed: fp8_e4m3fn, fp8_scaled"
    elif is_fp8 and not scales and (marker or layer_marker):
        wrong = f" and scaled, but its scale ({name.removesuffix('.weight')}.scale_weight) is missing"
    elif is_fp8 and scales and marker not in (None, stored.dtype):
        wrong = f", {_MARKER} in the file says {marker}"
    if wrong:
        raise UserError(f"{stored.path}: {name} is stored as {stored.dtype}{wrong}")
    if scale and (len(scales) > 1 or scale.dtype not in FLOATS or not _blocks(scale.shape, stored.shape)):
        raise UserError(
            f"{stored.path}: {', '.join(shown(each.key) for each in scales)}: the scale of {name}, {list(stored.shape)}, has shape "
            f"{list(scale.shape)} in {scale.dtype}; allowed: one float for the whole, for each row, or for each block that divides it"
        )
    return Weight(stored, scale)


def _layer_format(marker: Stored) -> object:
    """Return the format that ComfyUI's newer files name of each layer, as JSON in a byte tensor."""
    if marker.dtype != "U8" or prod(marker.shape) > _MOST_MARKER_BYTES:
        return f"{marker.dtype} of shape {list(marker.shape)}"
    text = bytes(marker.read().flatten().tolist()).decode("utf-8", "replace")
    try:
        return parse_json(text).get("format")
    except (JsonError, AttributeError):
        return text


def digest_of(files: Iterable[Path]) -> str:
    """Return a digest of every byte of some files, wherever they lie and whatever they are called."""
    return hashlib.sha256(" ".join(sorted(map(kept_digest, files))).encode()).hexdigest()


_KEPT_FROM_BYTES = 2**26


def kept_digest(path: Path) -> str:
    """Return the sha256 of a file; one that has not changed since is not read again, and a large one by no later process either."""
    path = path.resolve()
    stat = path.stat()
    numbers = f" {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    state = hashlib.sha256(os.fsencode(path) + numbers.encode()).hexdigest()  # a name may be no text, and stays private
    return _digest(path, state, stat.st_size >= _KEPT_FROM_BYTES)


@lru_cache(maxsize=1000)
def _digest(path: Path, state: str, is_large: bool) -> str:
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wandistiller" / "digests" / state
    if is_large and kept.is_file():
        return kept.read_text(encoding="utf-8")
    digest = file_digest(path)
    if is_large:
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_text(kept, digest)
    return digest
