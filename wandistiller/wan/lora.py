"""A Wan LoRA: read from its file by the names of the tensors that it changes, and merged into a teacher as that is read.

One tensor of the teacher is in memory at a time. The sum is made in float32, whatever the two are stored in: an fp8 or otherwise
quantised tensor comes as its reader gives it, is changed, and becomes what the run keeps its teacher in, as without a LoRA.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.checked_json import read_json
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.safetensors_files import StoredTensor, read_header
from wandistiller.files.weights import Weight, file_digest, stored_tensors
from wandistiller.model.config import StudentConfig
from wandistiller.wan.lora_keys import LoraError, LoraKey, read_keys
from wandistiller.wan.transformer_files import TransformerTensors
from wandistiller.wan.wan_files import MergedLora, WanFiles

PEFT_METADATA = "lora_adapter_metadata"  # where diffusers keeps the alphas of a LoRA that it saves
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
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
    """`factor * stored`, the change of a whole tensor."""

    stored: StoredTensor
    factor: float

    def read(self) -> Tensor:
        return Weight(self.stored).read().float() * self.factor


Change = LowRank | Difference


@dataclass(frozen=True)
class Lora:
    """What a LoRA adds to each tensor that it changes, by canonical names; nothing of it stays in memory.

    Attributes:
        shapes: those of the tensors of the Wan that it is for.
    """

    path: Path
    sha256: str
    scale: float
    changes: Mapping[str, Sequence[Change]]
    shapes: Mapping[str, tuple[int, ...]]

    def added_to(self, name: str, tensor: Tensor) -> Tensor:
        """Return a teacher's tensor with what this LoRA adds to it; one that it does not change comes back as it is."""
        for change in self.changes.get(name, ()):
            tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
            if isinstance(change, Difference):
                tensor = tensor + self.scale * change.read().reshape(tensor.shape).to(tensor.dtype)
            else:
                up, down = (part.to(tensor.dtype) for part in change.read())
                tensor = torch.addmm(tensor.flatten(1), up, down, alpha=self.scale).reshape(tensor.shape)
        return tensor


def open_lora(path: str | Path, scale: float, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """Open a LoRA for a Wan whose tensors have these shapes, and read it once: its digest, and whether its numbers are numbers.

    Raises:
        LoraError: it is missing, damaged, of another model, or of a kind that is not merged.
    """
    path = Path(path)
    if not path.is_file():
        raise LoraError(f"{path}: there is no such file; give a LoRA as FILE.safetensors, or FILE.safetensors:SCALE")
    if path.suffix != ".safetensors":
        raise LoraError(
            f"{path}: is no .safetensors file; LoRAs are read from these alone, since a pickle is never opened"
        )
    stored = {key: tensor for key, tensor in stored_tensors(path).items() if isinstance(tensor, StoredTensor)}
    keys = read_keys(path, stored, shapes)
    parts: dict[str, dict[str, tuple[LoraKey, StoredTensor]]] = defaultdict(dict)
    for key, read in keys.items():
        _check_numbers(stored[key])
        if read.part in parts[read.tensor]:
            raise LoraError(f"{path}: changes {read.tensor} twice, the second time as {key}; save the LoRA again")
        parts[read.tensor][read.part] = read, stored[key]
    factors = _peft_factors(path)
    changes = {name: _changes(path, name, of_tensor, factors, shapes[name]) for name, of_tensor in parts.items()}
    if not any(changes.values()):
        raise LoraError(f"{path}: holds {len(stored)} tensors and changes nothing with them; save the LoRA again")
    return Lora(path, file_digest(path), scale, changes, shapes)


def _check_numbers(stored: StoredTensor) -> None:
    if stored.dtype not in _FLOATS:
        raise LoraError(f"{stored.path}: {stored.key} is stored as {stored.dtype}; allowed: fp32, fp16, bf16, fp8")
    Weight(stored).read()


def _changes(
    path: Path,
    name: str,
    parts: Mapping[str, tuple[LoraKey, StoredTensor]],
    factors: "_Factors",
    shape: tuple[int, ...],
) -> list[Change]:
    """Put the parts that change one tensor together, and hold them against its shape."""
    found: list[Change] = []
    if "diff" in parts:
        key, stored = parts["diff"]
        if math.prod(stored.shape) != math.prod(shape) or [size for size in stored.shape if size > 1] != [
            size for size in shape if size > 1
        ]:
            raise _other_shape(path, name, shape, "a difference of " + _times(stored.shape))
        found.append(Difference(stored, factors.of(name, None) if key.is_scaled else 1.0))
    given = [part for part in ("down", "up") if part in parts]
    if len(given) == 1:
        raise LoraError(
            f"{path}: has one of the two matrices that change {name}, {parts[given[0]][1].key}; copy it again"
        )
    if given:
        up, down = parts["up"][1], parts["down"][1]
        is_matrix = len(shape) > 1 and len(up.shape) > 1 and len(down.shape) > 1
        sizes = (*up.shape[:2], down.shape[0], math.prod(down.shape[1:])) if is_matrix else ()
        rank = up.shape[1] if is_matrix else 0
        if sizes != (shape[0], rank, rank, math.prod(shape[1:])) or math.prod(up.shape[2:]) != 1 or not rank:
            raise _other_shape(path, name, shape, f"matrices of {_times(up.shape)} and {_times(down.shape)}")
        alpha = _alpha(parts["alpha"][1]) if "alpha" in parts else None
        found.append(LowRank(up, down, factors.of(name, rank) if alpha is None else alpha / rank))
    return found


def _other_shape(path: Path, name: str, shape: Sequence[int], given: str) -> LoraError:
    return LoraError(
        f"{path}: changes {name}, which is {_times(shape)} in this Wan, by {given}; it is a LoRA of another model: give one "
        "that was trained on a Wan of this size"
    )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _alpha(stored: StoredTensor) -> float:
    if math.prod(stored.shape) != 1:
        raise LoraError(f"{stored.path}: {stored.key} is {_times(stored.shape)}, and an alpha is one number")
    return float(stored.read())


# ---- factors that are not in the tensors ----


@dataclass(frozen=True)
class _Factors:
    """PEFT's alphas: what a product is multiplied by where its file has no `.alpha` for it."""

    alpha: float | None = None
    alphas: Mapping[str, float] | None = None
    rank: float | None = None
    uses_root: bool = False

    def of(self, name: str, rank: int | None) -> float:
        """Return the factor for a tensor; without a rank of its own (a bias) that of the config counts."""
        module = name.rpartition(".")[0]
        alpha = self.alpha
        for pattern, own in (self.alphas or {}).items():
            known = re.sub(r"[\\^$]", "", pattern)
            if module == known or module.endswith(f".{known}"):
                alpha = own
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
    if values.get("use_dora"):
        raise LoraError(f"{where}: is a DoRA (use_dora), which is not merged here; allowed: LoRA")
    alphas = values.get("alpha_pattern") or {}
    numbers = [value for value in (values.get("lora_alpha"), values.get("r")) if value is not None]
    if not isinstance(alphas, dict) or not all(map(_is_positive, [*numbers, *alphas.values()])):
        raise LoraError(f"{where}: lora_alpha, r and alpha_pattern must be numbers above 0; save the LoRA again")
    return _Factors(values.get("lora_alpha"), alphas, values.get("r"), bool(values.get("use_rslora")))


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e18  # type: ignore[operator]


# ---- merging ----


class MergedTransformer:
    """A transformer whose tensors are read with LoRAs in them; `TransformerTensors` describes the members."""

    def __init__(self, transformer: TransformerTensors, loras: Sequence[Lora]):
        self.transformer = transformer
        self.loras = loras
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
