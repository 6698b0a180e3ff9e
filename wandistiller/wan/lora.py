"""A Wan LoRA: read from its file by the names of the tensors that it changes, and merged into a teacher as that is read.

One tensor of the teacher is in memory at a time. The sum is made in float32, whatever the two are stored in: an fp8 or otherwise
quantised tensor comes as its reader gives it, is changed, and becomes what the run keeps its teacher in, as without a LoRA.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError, shown
from wandistiller.files.checked_json import read_json
from wandistiller.files.hub import local_path
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.safetensors_files import StoredTensor, read_header
from wandistiller.files.weights import Weight, file_digest
from wandistiller.model.config import StudentConfig
from wandistiller.wan.lora_keys import HADAMARD, KRONECKER, LoraError, read_keys
from wandistiller.wan.transformer_files import TransformerTensors
from wandistiller.wan.wan_files import MergedLora, WanFiles

PEFT_METADATA = "lora_adapter_metadata"  # where diffusers keeps the alphas of a LoRA that it saves
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LARGEST_SCALE = 1e6  # of an alpha or a scale; people use up to some hundreds
_FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class LowRank:
    """`factor * up @ down`, the change of a matrix; that of the patch kernel is made of two kernels."""

    up: StoredTensor
    down: StoredTensor
    factor: float

    def read(self) -> tuple[Tensor, Tensor]:
        """Return (out, rank) and (rank, in) in float32, the factor in the first."""
        up = Weight(self.up).read().float().flatten(1) * self.factor
        return up, Weight(self.down).read().float().flatten(1)


@dataclass(frozen=True)
class Difference:
    """`factor` times what its parts stand for, the change of a whole tensor: a difference, or LyCORIS's product of matrices."""

    parts: Mapping[str, StoredTensor]
    factor: float

    def read(self) -> Tensor:
        return self.factor * _whole({name: Weight(stored).read().float() for name, stored in self.parts.items()})

    def shape(self) -> torch.Size:
        """Return the shape of what the parts make.

        Raises:
            RuntimeError: they do not go together.
        """
        return _whole({name: torch.empty(part.shape, device="meta") for name, part in self.parts.items()}).shape


Change = LowRank | Difference


def _whole(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix of LoHa, (a1 b1) * (a2 b2), or of LoKr, w1 (x) w2 (LyCORIS: functional/loha.py, functional/lokr.py)."""
    if "diff" in parts:
        return parts["diff"]
    if "hada_w1_a" in parts:
        return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    first, second = (
        parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)).contiguous(), second.contiguous())


@dataclass(frozen=True)
class Lora:
    """What a LoRA adds to each tensor that it changes, by canonical names; nothing of it stays in memory.

    Attributes:
        shapes: those of the tensors of the Wan that it is for.
        magnitudes: of a DoRA the length that each row of a matrix gets.
    """

    path: Path
    sha256: str
    scale: float
    changes: Mapping[str, Sequence[Change]]
    shapes: Mapping[str, tuple[int, ...]]
    magnitudes: Mapping[str, StoredTensor]

    def added_to(self, name: str, tensor: Tensor) -> Tensor:
        """Return a teacher's tensor with what this LoRA adds to it; one that it does not change comes back as it is."""
        if name not in self.changes:
            return tensor
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        if name not in self.magnitudes:
            return _changed(tensor, self.changes[name], self.scale)
        # DoRA (arXiv:2402.09353, eq. 5): the changed rows get learnt lengths. A scale goes part of the way, as ComfyUI has it.
        rows = _changed(tensor, self.changes[name], 1.0).flatten(1)
        lengths = Weight(self.magnitudes[name]).read().reshape(-1, 1).to(rows.dtype)
        return tensor.lerp((rows * (lengths / rows.norm(dim=1, keepdim=True))).reshape(tensor.shape), self.scale)


def _changed(tensor: Tensor, changes: Sequence[Change], scale: float) -> Tensor:
    for change in changes:
        if isinstance(change, Difference):
            tensor = tensor + scale * change.read().reshape(tensor.shape).to(tensor.dtype)
        else:
            up, down = (part.to(tensor.dtype) for part in change.read())
            tensor = torch.addmm(tensor.flatten(1), up, down, alpha=scale).reshape(tensor.shape)
    return tensor


def open_lora(path: str | Path, scale: float, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """Open a LoRA for a Wan whose tensors have these shapes, and read it once: its digest, and whether its numbers are numbers.

    Raises:
        LoraError: it is missing, damaged, of another model, or of a kind that is not merged.
    """
    path = local_path(path)
    if not path.is_file():
        raise LoraError(f"{path}: there is no such file; give a LoRA as FILE.safetensors, or FILE.safetensors:SCALE")
    if path.suffix != ".safetensors":
        raise LoraError(
            f"{path}: is no .safetensors file; LoRAs are read from these alone, since a pickle is never opened"
        )
    if not abs(scale) <= _LARGEST_SCALE:
        raise LoraError(f"{path}: a scale of {scale:g}; allowed: a number of at most {_LARGEST_SCALE:g}")
    stored = read_header(path).tensors
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    scaled_biases = set()
    for key, read in read_keys(path, stored, shapes).items():
        _check_numbers(stored[key])
        if read.part in parts[read.tensor]:
            raise LoraError(f"{path}: changes {read.tensor} twice, the second time as {key}; save the LoRA again")
        parts[read.tensor][read.part] = stored[key]
        if read.is_scaled:
            scaled_biases.add(read.tensor)
    reader = _Reader(path, parts, shapes, _peft_factors(path))
    changes = {name: reader.changes(name, is_scaled=name in scaled_biases) for name in parts}
    magnitudes = {name: reader.magnitude(name) for name, of_tensor in parts.items() if "magnitude" in of_tensor}
    if reader.factors.is_dora and not magnitudes:
        raise LoraError(f"{path}: says that it is a DoRA (use_dora) and holds no lengths; save the LoRA again")
    return Lora(path, file_digest(path), scale, changes, shapes, magnitudes)


def _check_numbers(stored: StoredTensor) -> None:
    if stored.dtype not in _FLOATS:
        raise LoraError(f"{stored.path}: {stored.key} is stored as {stored.dtype}; allowed: fp32, fp16, bf16, fp8")
    Weight(stored).read()


@dataclass(frozen=True)
class _Reader:
    """Puts the parts that change one tensor together, and holds them against its shape."""

    path: Path
    parts: Mapping[str, Mapping[str, StoredTensor]]
    shapes: Mapping[str, tuple[int, ...]]
    factors: "_Factors"

    def changes(self, name: str, *, is_scaled: bool) -> list[Change]:
        parts = self.parts[name]
        found: list[Change] = []
        if "diff" in parts:
            found.append(self._difference(name, parts["diff"], is_scaled))
        if "down" in parts or "up" in parts:
            found.append(self._low_rank(name))
        for method in (KRONECKER, HADAMARD):
            if own := {part: parts[part] for part in method if part in parts}:
                found.append(self._lycoris(name, own))
        if not found:
            raise LoraError(
                f"{self.path}: has {', '.join(parts)} for {name} and nothing to change it with; copy it again"
            )
        return found

    def magnitude(self, name: str) -> StoredTensor:
        stored, rows = self.parts[name]["magnitude"], self.shapes[name][0]
        if stored.shape not in ((rows,), (rows, 1)):
            raise self._other_shape(name, f"lengths of {_times(stored.shape)} (a DoRA, one of each row)")
        return stored

    def _difference(self, name: str, stored: StoredTensor, is_scaled: bool) -> Difference:
        shape = self.shapes[name]
        if [size for size in stored.shape if size > 1] != [size for size in shape if size > 1]:
            raise self._other_shape(name, "a difference of " + _times(stored.shape))
        weight = self.parts.get(f"{name.removesuffix('bias')}weight", {})
        rank = weight["up"].shape[1] if "up" in weight and len(weight["up"].shape) > 1 else None
        return Difference({"diff": stored}, self.factors.of(name, rank) if is_scaled else 1.0)

    def _low_rank(self, name: str) -> LowRank:
        parts, shape = self.parts[name], self.shapes[name]
        if not {"down", "up"} <= parts.keys():
            key = parts["up" if "up" in parts else "down"].key
            raise LoraError(f"{self.path}: has one of the two matrices that change {name}, {key}; copy it again")
        up, down = parts["up"], parts["down"]
        is_matrix = len(shape) > 1 and len(up.shape) > 1 and len(down.shape) > 1
        sizes = (*up.shape[:2], down.shape[0], math.prod(down.shape[1:])) if is_matrix else ()
        rank = up.shape[1] if is_matrix else 0
        if sizes != (shape[0], rank, rank, math.prod(shape[1:])) or math.prod(up.shape[2:]) != 1 or not rank:
            raise self._other_shape(name, f"matrices of {_times(up.shape)} and {_times(down.shape)}")
        return LowRank(up, down, self._alpha(name, rank) or self.factors.of(name, rank))

    def _lycoris(self, name: str, own: Mapping[str, StoredTensor]) -> Difference:
        """Return a product of LyCORIS, whose alpha is divided by the rank of what is a product in it."""
        inner = next((own[part] for part in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b") if part in own), None)
        rank = inner.shape[0] if inner is not None and inner.shape else 0
        change = Difference(own, (self._alpha(name, rank) if rank else None) or 1.0)
        given = " and ".join(_times(stored.shape) for stored in own.values())
        try:
            made, shape = change.shape(), self.shapes[name]
        except (RuntimeError, KeyError, IndexError):
            raise self._other_shape(name, f"matrices of {given}, which do not go together") from None
        if made[0] != shape[0] or made.numel() != math.prod(shape):
            raise self._other_shape(name, f"matrices of {given}")
        return change

    def _alpha(self, name: str, rank: int) -> float | None:
        """Return alpha / rank, None where the file has no alpha of this tensor."""
        if (stored := self.parts[name].get("alpha")) is None:
            return None
        if math.prod(stored.shape) != 1:
            raise LoraError(f"{self.path}: {stored.key} is {_times(stored.shape)}, and an alpha is one number")
        if not 0 < abs(alpha := float(stored.read())) <= _LARGEST_SCALE:
            raise LoraError(
                f"{self.path}: {stored.key} is {alpha:g}; allowed: a number above 0, at most {_LARGEST_SCALE:g}"
            )
        return alpha / rank

    def _other_shape(self, name: str, given: str) -> LoraError:
        return LoraError(
            f"{self.path}: changes {name}, which is {_times(self.shapes[name])} in this Wan, by {given}; it is a LoRA of another model: "
            "give one that was trained on a Wan of this size"
        )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


# ---- factors that are not in the tensors ----


@dataclass(frozen=True)
class _Factors:
    """PEFT's alphas: what a product is multiplied by where its file has no `.alpha` for it."""

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    rank: float | None = None
    uses_root: bool = False
    is_dora: bool = False

    def of(self, name: str, rank: int | None) -> float:
        """Return the factor for a tensor; without a rank of its own (a bias) that of the config counts."""
        module = name.rpartition(".")[0]
        # The first pattern that fits counts, from a dot on or, with ^, from the start (peft: utils/other.py, get_pattern_key).
        fitting = (own for pattern, own in self.alphas.items() if re.match(rf"(?:.*\.)?(?:{pattern})$", module))
        alpha = next(fitting, self.alpha)
        rank_or_none = rank or self.rank
        if alpha is None or not rank_or_none:
            return 1.0
        return alpha / (math.sqrt(rank_or_none) if self.uses_root else rank_or_none)


def _peft_factors(path: Path) -> _Factors:
    """Read the alphas that diffusers keeps in a file's metadata, and PEFT in a file beside its own."""
    metadata, beside = read_header(path).metadata, path.with_name(_PEFT_CONFIG)
    if PEFT_METADATA in metadata:
        where = f"{path}, {PEFT_METADATA} in its metadata"
        try:
            values = parse_json(metadata[PEFT_METADATA])
        except JsonError as error:
            raise LoraError(f"{where}: {error}; save the LoRA again") from None
    elif path.name == _PEFT_FILE and beside.is_file():
        where, values = str(beside), read_json(beside)
    else:
        return _Factors()
    if not isinstance(values, dict):
        raise LoraError(f"{where}: holds a {type(values).__name__}, not the settings of a LoRA; save the LoRA again")
    values = {name.removeprefix("transformer."): value for name, value in values.items()}
    alphas = values.get("alpha_pattern") or {}
    numbers = [value for value in (values.get("lora_alpha"), values.get("r")) if value is not None]
    if not isinstance(alphas, dict) or not all(map(_is_positive, [*numbers, *alphas.values()])):
        raise LoraError(f"{where}: lora_alpha, r and alpha_pattern must be numbers above 0; save the LoRA again")
    if bad := [pattern for pattern in alphas if not _is_quick_pattern(pattern)]:
        raise LoraError(
            f"{where}: alpha_pattern holds {shown(bad[0])}, which is no plain pattern of names; save the LoRA again"
        )
    return _Factors(
        values.get("lora_alpha"), alphas, values.get("r"), bool(values.get("use_rslora")), bool(values.get("use_dora"))
    )


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


# ---- merging ----


class MergedTransformer:
    """A transformer whose tensors are read with LoRAs in them; `TransformerTensors` describes the members."""

    def __init__(self, transformer: TransformerTensors, loras: Sequence[Lora]):
        self.transformer = transformer
        self.loras = loras
        self.location = transformer.location
        self.config: StudentConfig = transformer.config
        self.student = transformer.student
        self.ignored = transformer.ignored
        self.heads_are_assumed = transformer.heads_are_assumed

    def names(self) -> list[str]:
        return self.transformer.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.transformer.shape(name)

    def read(self, name: str) -> Tensor:
        """Read a tensor with what the LoRAs add to it, in float32; one that they leave alone comes as it is stored."""
        tensor = self.transformer.read(name)
        for lora in self.loras:
            tensor = lora.added_to(name, tensor)
        return tensor

    def fingerprint(self) -> str:
        """Return that of the transformer as it lies on disk."""
        return self.transformer.fingerprint()


def shapes_of(transformer: TransformerTensors) -> dict[str, tuple[int, ...]]:
    return {name: transformer.shape(name) for name in transformer.names()}


LoraFiles = Sequence[tuple[str | Path, float]]


def merge_loras(wan_files: WanFiles, high: LoraFiles | None = None, low: LoraFiles | None = None) -> WanFiles:
    """Return a Wan that is read with LoRAs in it; each is opened and checked now, and merged as tensors are read.

    Args:
        high: files and scales for the only expert, or for the high-noise one of two.
        low: those for the low-noise expert.

    Raises:
        LoraError: one of them cannot be merged into this Wan.
        UserError: there is no low-noise expert.
    """
    experts, merged = dict(wan_files.experts), list(wan_files.loras)
    for name, files in (("high", high), ("low", low)):
        if not files:
            continue
        if name not in experts:
            raise UserError(
                f"--teacher_lora_low {files[0][0]}: {wan_files.location} has one expert; give it as --teacher_lora"
            )
        shapes = shapes_of(experts[name])
        loras = [open_lora(path, scale, shapes) for path, scale in files]
        experts[name] = MergedTransformer(experts[name], loras)
        merged += [
            MergedLora(name, str(lora.path), lora.sha256, lora.scale, len(lora.changes), len(shapes)) for lora in loras
        ]
    return replace(wan_files, experts=experts, loras=tuple(merged))
