"""A Wan LoRA: read from its file by the names of the tensors that it changes, and merged into a teacher as that is read.

One tensor of the teacher is in memory at a time. The sum is made in float32, whatever the two are stored in: an fp8 or otherwise
quantised tensor comes as its reader gives it, is changed, and becomes what the run keeps its teacher in, as without a LoRA.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import shown
from wandistiller.files.checked_json import read_json
from wandistiller.files.hub import local_path
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.safetensors_files import StoredTensor, read_header
from wandistiller.files.weights import FLOATS, Weight, kept_digest
from wandistiller.wan.lora_keys import METHODS, LoraError, read_keys
from wandistiller.wan.names import title_of
from wandistiller.wan.transformer_files import Readable

PEFT_METADATA = "lora_adapter_metadata"  # where diffusers keeps the alphas of a LoRA that it saves
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LARGEST_SCALE = 1e6  # of an alpha or a scale; people use up to some hundreds
_INNER = ("down", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")  # whose rows are the rank of a product


@dataclass(frozen=True)
class Change:
    """`factor` times what its parts stand for: up @ down, a product of LyCORIS, or a difference as it is."""

    parts: Mapping[str, StoredTensor]
    factor: float

    @property
    def is_low_rank(self) -> bool:
        return "up" in self.parts

    def read_low_rank(self) -> tuple[Tensor, Tensor]:
        """Return up (out, rank) and down (rank, in) in float32, the factor in the first."""
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
        return tensor.lerp((rows * (lengths / rows.norm(dim=1, keepdim=True))).reshape(tensor.shape), self.scale)

    def _changed(self, name: str, tensor: Tensor, scale: float) -> Tensor:
        for change in self.changes[name]:
            tensor = torch.add(tensor, change.read().reshape(tensor.shape).to(tensor.dtype), alpha=scale)
        return tensor


def open_lora(path: str | Path, scale: float, shapes: Mapping[str, tuple[int, ...]], expert: str = "high") -> Lora:
    """Open a LoRA for a Wan whose tensors have these shapes, and read it once: its digest, and whether its numbers are numbers.

    Raises:
        LoraError: it is missing, damaged, of another model, or of a kind that is not merged.
    """
    path = local_path(path)
    if not path.is_file():
        raise LoraError(f"{path}: there is no such file; give a LoRA as FILE.safetensors, or FILE.safetensors:SCALE")
    if path.suffix.lower() != ".safetensors":
        raise LoraError(
            f"{path}: is no .safetensors file; LoRAs are read from these alone, since a pickle is never opened"
        )
    if not abs(scale) <= _LARGEST_SCALE:
        raise LoraError(f"{path}: a scale of {scale:g}; allowed: a number of at most {_LARGEST_SCALE:g}")
    header = read_header(path)
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for key, (part, name) in read_keys(path, header.tensors, shapes).items():
        stored = header.tensors[key]
        if stored.dtype not in FLOATS:
            raise LoraError(f"{path}: {key} is stored as {stored.dtype}; allowed: fp32, fp16, bf16, fp8")
        if part in parts[name]:
            raise LoraError(f"{path}: changes {name} twice, the second time as {key}; save the LoRA again")
        Weight(stored).read()
        parts[name][part] = stored
    reader = _Reader(path, parts, shapes, _peft_factors(path, header.metadata))
    changes = {name: reader.changes(name) for name in parts}
    magnitudes = {name: reader.magnitude(name) for name, of_tensor in parts.items() if "magnitude" in of_tensor}
    if reader.factors.is_dora and not magnitudes:
        raise LoraError(f"{path}: says that it is a DoRA (use_dora) and holds no lengths; save the LoRA again")
    return Lora(path, kept_digest(path), scale, changes, shapes, magnitudes, title_of(header.metadata), expert)


@dataclass(frozen=True)
class _Reader:
    """Puts the parts that change one tensor together, and holds them against its shape."""

    path: Path
    parts: Mapping[str, Mapping[str, StoredTensor]]
    shapes: Mapping[str, tuple[int, ...]]
    factors: "_Factors"

    def changes(self, name: str) -> list[Change]:
        parts = self.parts[name]
        of_methods = [{part: parts[part] for part in method if part in parts} for method in METHODS]
        found = [self._change(name, own) for own in of_methods if own]
        if not found:
            raise LoraError(
                f"{self.path}: has {', '.join(parts)} for {name} and nothing to change it with; copy it again"
            )
        return found

    def _change(self, name: str, own: Mapping[str, StoredTensor]) -> Change:
        if "up_bias" in own:  # PEFT's of lora_B, whose factor is that of the weight
            rank = _rank(self.parts.get(f"{name.removesuffix('bias')}weight", {}))
            change = Change({"diff": own["up_bias"]}, self.factors.of(name, rank))
        else:
            rank = _rank(own)
            change = Change(own, (self._alpha(name, rank) or self.factors.of(name, rank)) if rank else 1.0)
        given = " and ".join(_times(stored.shape) for stored in own.values())
        try:
            made, shape = change.shape(), self.shapes[name]
        except (RuntimeError, LookupError):
            raise self._other_shape(name, f"{given}, which do not go together") from None
        is_whole = "diff" in change.parts
        sizes = [[size for size in sizes if size > 1] for sizes in (made, shape)] if is_whole else []
        fits = sizes[0] == sizes[1] if is_whole else (made[0], made.numel()) == (shape[0], math.prod(shape))
        if not fits or any(0 in stored.shape for stored in own.values()):
            raise self._other_shape(name, given)
        return change

    def magnitude(self, name: str) -> StoredTensor:
        stored, rows = self.parts[name]["magnitude"], self.shapes[name][0]
        if stored.shape not in ((rows,), (rows, 1)):
            raise self._other_shape(name, f"lengths of {_times(stored.shape)} (a DoRA, one of each row)")
        return stored

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
            f"{self.path}: changes {name}, which is {_times(self.shapes[name])} in this Wan, by {given}; it is damaged, or a LoRA of another model: "
            "give one that was trained on a Wan of this size"
        )


def _rank(parts: Mapping[str, StoredTensor]) -> int:
    """Return the rank of a product, 0 of a whole difference."""
    inner = next((parts[part] for part in _INNER if part in parts), None)
    return inner.shape[0] if inner is not None and inner.shape else 0


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

    def of(self, name: str, rank: int) -> float:
        """Return the factor for a tensor; without a rank of its own (a bias) that of the config counts."""
        module = name.rpartition(".")[0]
        # The first pattern that fits counts, from a dot on or, with ^, from the start (peft: utils/other.py, get_pattern_key).
        fitting = (own for pattern, own in self.alphas.items() if re.match(rf"(?:.*\.)?(?:{pattern})$", module))
        alpha = next(fitting, self.alpha)
        rank_or_none = rank or self.rank
        if alpha is None or not rank_or_none:
            return 1.0
        return alpha / (math.sqrt(rank_or_none) if self.uses_root else rank_or_none)


def _peft_factors(path: Path, metadata: Mapping[str, str]) -> _Factors:
    """Read the alphas that diffusers keeps in a file's metadata, and PEFT in a file beside its own."""
    beside = path.with_name(_PEFT_CONFIG)
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


@dataclass(frozen=True)
class MergedWeight:
    """A tensor of a teacher with what LoRAs add to it: in float32 where they change it, else as it is stored."""

    weight: Readable
    name: str
    loras: Sequence[Lora]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self) -> Tensor:
        tensor = self.weight.read()
        for lora in self.loras:
            tensor = lora.added_to(self.name, tensor)
        return tensor
