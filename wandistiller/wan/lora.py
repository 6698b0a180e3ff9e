"""A Wan LoRA: read from its file by the names of the tensors that it changes, and merged into a teacher as that is read.

The layouts are diffusers' and PEFT's (`transformer.blocks.0.attn1.to_q.lora_A.weight`), kohya's and musubi-tuner's
(`lora_unet_blocks_0_self_attn_q.lora_down.weight` with `.alpha`), LyCORIS's (`lycoris_blocks_0_self_attn_q.lokr_w1`) and ComfyUI's
(`diffusion_model.blocks.0.self_attn.q.lora_up.weight`, and `.diff`, `.diff_b` and `.diff_m` of distilled LoRAs).

One tensor of the teacher is in memory at a time. The sum is made in float32, whatever the two are stored in: an fp8 or otherwise
quantised tensor comes as its reader gives it, is changed, and becomes what the run keeps its teacher in, as without a LoRA.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller.errors import UserError, shown
from wandistiller.files.hub import local_path
from wandistiller.files.json_files import JsonError, load_json, parse_json
from wandistiller.files.tensor_files import StoredTensor
from wandistiller.files.weights import FLOATS, Weight, header_of, kept_digest
from wandistiller.wan.names import WRAPPER, other_wan_kind, title_of, to_original

PEFT_METADATA = "lora_adapter_metadata"  # where diffusers keeps the alphas of a LoRA that it saves
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT's starts that move weights of the base model too, which such a LoRA belongs to
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LARGEST_SCALE = 1e6  # of an alpha or a scale; people use up to some hundreds
_INNER = ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")  # whose rows are the rank of a product
# What the Wan lies in by the names of a key, such as base_model.model., lora_unet_ or pipe.dit.
_PREFIX = re.compile(
    r"(?:(?:base_model|model|diffusion_model|transformer|unet|pipe|dit|module|net|lora|lycoris)[._]+)*"
)
# The parts of each way to change a tensor: a product, a difference, LyCORIS's products of Kronecker and Hadamard
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
METHODS = (("up", "down"), ("diff",), KRONECKER, HADAMARD)
# The end of a key, which part of a change it is, and of which tensor of the module; before ".weight" PEFT has its adapter's name.
_ENDS = [
    (r"\.(?:lora_A|lora_down|lora\.down)(?:\.[^.]+)?\.weight$", "down", ("weight",)),
    (r"\.(?:lora_B|lora_up|lora\.up)(?:\.[^.]+)?\.weight$", "up", ("weight",)),
    (r"\.alpha$", "alpha", ("weight",)),
    (r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)$", "magnitude", ("weight",)),
    (r"\.(?:diff|w_norm)$", "diff", ("weight", "table")),
    (r"\.(?:diff_b|b_norm)$", "diff", ("bias",)),
    (r"\.diff_m$", "diff", ("modulation",)),
    *((rf"\.{part}$", part, ("weight",)) for part in KRONECKER + HADAMARD),
]


@dataclass(frozen=True)
class Change:
    """`factor` times what its parts stand for: up @ down, a product of LyCORIS, or a difference as it is."""

    parts: Mapping[str, StoredTensor]
    factor: float

    def read_low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return up (out, rank) and down (rank, in) in float32, the factor in the first; None where it is no such product."""
        if "up" not in self.parts:
            return None
        parts = self._read()
        return self.factor * parts["up"].flatten(1), parts["down"].flatten(1)

    def read(self) -> Tensor:
        """Return the whole change in float32; of a kernel as a matrix, or in its own shape."""
        return self.factor * _whole(self._read())

    def _read(self) -> dict[str, Tensor]:
        return {name: Weight(stored).read().float() for name, stored in self.parts.items()}

    def shape(self) -> torch.Size:
        """Return the shape of what the parts make.

        Raises:
            RuntimeError, LookupError: they do not go together.
        """
        return _whole({name: torch.empty(part.shape, device="meta") for name, part in self.parts.items()}).shape


def _whole(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix of LoRA, of LoHa, (a1 b1) * (a2 b2), or of LoKr, w1 (x) w2 (LyCORIS: functional/loha.py, lokr.py)."""
    if "diff" in parts:
        return parts["diff"]
    if "up" in parts or "down" in parts:
        return parts["up"].flatten(1) @ parts["down"].flatten(1)
    if "hada_w1_a" in parts:
        return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    first, second = (
        parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)).contiguous(), second.contiguous())


@dataclass(frozen=True)
class Lora:
    """A LoRA: its changes of each tensor by canonical names; none of its values stays in memory.

    Attributes:
        title: what the file calls itself in its metadata.
        shapes: those of the tensors of the Wan that it is for.
        magnitudes: of a DoRA the length that each row of a matrix gets.
        expert: "high" or "low", which it is merged into.
    """

    path: Path
    sha256: str
    scale: float
    changes: Mapping[str, Sequence[Change]]
    shapes: Mapping[str, tuple[int, ...]]
    magnitudes: Mapping[str, StoredTensor]
    title: str = ""
    expert: str = "high"

    @property
    def identity(self) -> str:
        """The LoRA's part of a teacher's identity; a file may be renamed."""
        return f"{self.expert} {self.sha256[:16]} x {self.scale!r}"

    def record(self) -> dict[str, object]:
        """Return its entry in a student's record, but for the path."""
        return {"expert": self.expert, "file": self.path.name, "sha256": self.sha256, "scale": self.scale}

    def added_to(self, name: str, tensor: Tensor) -> Tensor:
        """Return a teacher's tensor with what this LoRA adds to it; one that it does not change comes back as it is."""
        if name not in self.changes:
            return tensor
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if name not in self.magnitudes:
            return self._changed(name, tensor, self.scale)
        # DoRA (arXiv:2402.09353, eq. 5): the changed rows get learnt lengths. A scale goes part of the way, as ComfyUI has it.
        rows = self._changed(name, tensor, 1.0).flatten(1)
        lengths = Weight(self.magnitudes[name]).read().reshape(-1, 1).to(rows.dtype)
        norms = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)  # a row of zeros has no direction, and stays
        return tensor.lerp((rows * (lengths / norms)).reshape(tensor.shape), self.scale)

    def _changed(self, name: str, tensor: Tensor, scale: float) -> Tensor:
        for change in self.changes[name]:
            tensor = torch.add(tensor, change.read().reshape(tensor.shape).to(tensor.dtype), alpha=scale)
        return tensor


def open_lora(path: str | Path, scale: float, shapes: Mapping[str, tuple[int, ...]], expert: str = "high") -> Lora:
    """Open a LoRA for a Wan whose tensors have these shapes, and read it once: its digest, and whether its numbers are numbers.

    Raises:
        UserError: it is missing, damaged, of another model, or of a kind that is not merged.
    """
    path = local_path(path)
    path = path / _PEFT_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a LoRA as FILE.safetensors, or FILE.safetensors:SCALE")
    if path.suffix.lower() != ".safetensors":
        raise UserError(
            f"{path}: is no .safetensors file; LoRAs are read from these alone, since a pickle is never opened"
        )
    if not abs(scale) <= _LARGEST_SCALE:
        raise UserError(f"{path}: a scale of {scale:g}; allowed: a number of at most {_LARGEST_SCALE:g}")
    tensors, metadata = header_of(path)
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for key, (part, name) in _read_keys(path, tensors, shapes).items():
        stored = tensors[key]
        if part in parts[name]:
            raise UserError(f"{path}: changes {name} twice, as {parts[name][part].key} and {key}; save the LoRA again")
        # An alpha may be a whole number, and without an end where it counts for nothing (LoKr of whole matrices).
        if part != "alpha":
            if stored.dtype not in FLOATS:
                raise UserError(f"{path}: {key} is stored as {stored.dtype}; allowed: fp32, fp16, bf16, fp8")
            Weight(stored).read()
        parts[name][part] = stored
    settings = peft_settings(path, metadata, parts)
    changes = {name: _changes(name, own, shapes[name], settings) for name, own in parts.items()}
    magnitudes = {name: own["magnitude"] for name, own in parts.items() if "magnitude" in own}
    for name, lengths in magnitudes.items():
        if lengths.shape not in ((shapes[name][0],), (shapes[name][0], 1)):
            raise _other_shape(name, shapes[name], [lengths], "lengths of a DoRA, one of each row, of ")
    if settings.get("use_dora") and not magnitudes:
        raise UserError(f"{path}: says that it is a DoRA (use_dora) and holds no lengths; save the LoRA again")
    return Lora(path, kept_digest(path), scale, changes, shapes, magnitudes, title_of(metadata), expert)


def _changes(
    name: str, own: Mapping[str, StoredTensor], shape: tuple[int, ...], settings: Mapping[str, Any]
) -> Sequence[Change]:
    """Put the parts that change one tensor together, and hold them against its shape."""
    changes = []
    for method in METHODS:
        parts = {part: own[part] for part in method if part in own}
        if not parts:
            continue
        rank = next((parts[part].shape[0] for part in _INNER if part in parts and parts[part].shape), 0)
        is_difference = "diff" in parts
        change = Change(parts, 1.0 if is_difference else _own_factor(own, rank) or peft_factor(settings, name, rank))
        try:
            made = change.shape()
        except (RuntimeError, LookupError):
            raise _other_shape(name, shape, parts.values(), "parts that do not go together, ") from None
        sizes = [[size for size in sizes if size > 1] for sizes in (made, shape)]
        fits = sizes[0] == sizes[1] if is_difference else (made[0], made.numel()) == (shape[0], math.prod(shape))
        if not fits or any(0 in stored.shape for stored in parts.values()):
            raise _other_shape(name, shape, parts.values())
        changes.append(change)
    if not changes:
        first = next(iter(own.values()))
        raise UserError(f"{first.path}: has {first.key} and nothing to change {name} with; copy it again")
    return changes


def _own_factor(own: Mapping[str, StoredTensor], rank: int) -> float | None:
    """Return alpha / rank, None where the file has no alpha of this tensor; alpha counts for nothing where whole matrices have no rank."""
    if (stored := own.get("alpha")) is None:
        return None
    if not rank:
        return 1.0
    alpha = float(stored.read()) if math.prod(stored.shape) == 1 else math.nan
    if not 0 < abs(alpha) <= _LARGEST_SCALE:
        raise UserError(
            f"{stored.path}: {stored.key} of shape {list(stored.shape)} is {alpha:g}; allowed: one number above 0, at most "
            f"{_LARGEST_SCALE:g}"
        )
    return alpha / rank


def _other_shape(name: str, shape: Sequence[int], given: Iterable[StoredTensor], what: str = "") -> UserError:
    stored = list(given)
    sizes = " and ".join("x".join(map(str, part.shape)) or "one number" for part in stored)
    return UserError(
        f"{stored[0].path}: changes {name}, which is {'x'.join(map(str, shape))} in this Wan, by {what}{sizes}; it is damaged, or a LoRA "
        "of another model: give one that was trained on a Wan of this size"
    )


# ---- factors that are not in the tensors ----


def peft_factor(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """Return what PEFT multiplies a product by where its file has no `.alpha` for it."""
    is_lycoris = settings.get("peft_type") in ("LOKR", "LOHA")
    alpha = _of_pattern(settings, "alpha_pattern", name, settings.get("alpha" if is_lycoris else "lora_alpha"))
    if is_lycoris:  # of whole matrices too
        rank = _of_pattern(settings, "rank_pattern", name, settings.get("r"))
    if not alpha or not rank:
        return 1.0
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_pattern(settings: Mapping[str, Any], patterns: str, name: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that fits a tensor, from a dot on or, with ^, from the start (peft: get_pattern_key)."""
    fitting = (value for pattern, value in (settings.get(patterns) or {}).items() if _fits(pattern, name))
    return next(fitting, otherwise)


def _fits(pattern: str, name: str) -> bool:
    modules = (spelling.rpartition(".")[0] for spelling in (name, to_original(name)))
    return any(re.match(rf"(?:.*\.)?(?:{_PREFIX.sub('', pattern, count=1)})$", module) for module in modules)


def peft_settings(path: Path, metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """Read the settings, alphas among them, that diffusers keeps in a file's metadata, and PEFT in a file beside its own."""
    where, beside = f"{path}, {PEFT_METADATA} in its metadata", path.with_name(_PEFT_CONFIG)
    try:
        if PEFT_METADATA in metadata:
            values = parse_json(metadata[PEFT_METADATA])
        elif path.name == _PEFT_FILE and beside.is_file():
            where, values = str(beside), load_json(beside)
        else:
            return {}
    except JsonError as error:
        raise UserError(f"{where}: {error}; save the LoRA again") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds a {type(values).__name__}, not the settings of a LoRA; save the LoRA again")
    values = {re.sub(r"^transformer(_2)?\.", "", name): value for name, value in values.items()}
    if str(start := values.get("init_lora_weights")).startswith(_MOVES_BASE):
        raise UserError(
            f"{where}: init_lora_weights is {shown(start)}, which changes the base model too; save the LoRA again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    single = {name: values[name] for name in ("lora_alpha", "alpha", "r") if values.get(name) is not None}
    alphas, ranks = (values.get(name) or {} for name in ("alpha_pattern", "rank_pattern"))
    if not all(isinstance(own, dict) and all(map(_is_positive, own.values())) for own in (single, alphas, ranks)):
        raise UserError(f"{where}: ranks, alphas and their patterns must be numbers above 0; save the LoRA again")
    for pattern in [*alphas, *ranks]:
        if not _is_quick_pattern(pattern):
            raise UserError(f"{where}: holds {shown(pattern)}, which is no plain pattern of names; save the LoRA again")
    if bad := [pattern for pattern in alphas if not any(_fits(pattern, name) for name in names)]:
        raise UserError(f"{where}: alpha_pattern holds {shown(bad[0])}, which is the name of no tensor; save it again")
    return values


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= _LARGEST_SCALE  # type: ignore[operator]


def _is_quick_pattern(pattern: str) -> bool:
    """Tell whether a regular expression of a stranger's file is one, and cannot take exponential time on a module's name."""
    quantifiers = re.findall(r"(?<!\\)[*+?{]", pattern)
    if len(pattern) > 1000 or len(quantifiers) > 4 or re.search(r"\)[*+?{]|\(\?", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


# ---- the names of a file's tensors ----


def _read_keys(path: Path, keys: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return for each key of a LoRA's file which part of a change it is, and the canonical name of the tensor that is changed.

    The parts are those of `METHODS`, and "alpha" of a product and "magnitude" of a DoRA.

    Args:
        names: the canonical names of the tensors of the Wan that it is for.

    Raises:
        UserError: there are none, or one of them belongs to no LoRA of such a Wan; the message names the first.
    """
    modules = _modules(names)
    found = {key: _read_key(key, modules) for key in keys}
    read = {key: place for key, place in found.items() if place is not None}
    if strange := [key for key in found if key not in read]:
        kind = other_wan_kind(map(_without_prefix, strange))
        what = f"is a LoRA of {kind} Wan" if kind else "is a LoRA of another model, of a larger Wan or of another kind"
        raise UserError(
            f"{path}: {what}: {len(strange)} of its {len(found)} keys change nothing of this text-to-video Wan, the first is "
            f"{shown(strange[0])}; give a LoRA, DoRA, LoKr, LoHa or differences that were trained on this Wan"
        )
    if not read:
        raise UserError(f"{path}: holds no tensors, so it is no LoRA")
    return read


def _modules(names: Iterable[str]) -> Mapping[str, dict[str, str]]:
    """Return the tensors of each module, as "weight", "bias" and tables, by both spellings of its name with _ for dots."""
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        for spelling in (name, to_original(name)):
            stem, _, kind = spelling.rpartition(".")
            places = {stem: kind}
            if kind not in ("weight", "bias"):  # a modulation table is no module, and its own name stands for it too
                places = {stem: "modulation", spelling: "table"}
            for place, what in places.items():
                modules.setdefault(place.replace(".", "_"), {})[what] = name
    return modules


def _without_prefix(key: str) -> str:
    """Return a key without the names of what the Wan lies in, of which tools write several."""
    return _PREFIX.sub("", WRAPPER.sub("", key), count=1)


def _read_key(key: str, modules: Mapping[str, dict[str, str]]) -> tuple[str, str] | None:
    """Return part and tensor of a key; None where no module has that name, or nothing that could be changed so."""
    bare = _without_prefix(key)
    for pattern, part, kinds in _ENDS:
        if match := re.search(pattern, bare):
            tensors = modules.get(bare[: match.start()].replace(".", "_"), {})
            return next(((part, tensors[kind]) for kind in kinds if kind in tensors), None)
    return None
