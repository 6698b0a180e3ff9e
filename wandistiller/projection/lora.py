"""A Wan LoRA cut for a student: its matrices by the part of the teacher that the student was made of.

What a LoRA adds to a weight is `up @ down`. The student has some rows and columns of that weight, and of the product these are the
same rows of `up` and columns of `down`, so that the cut is exact: it is what the student's projection would gain from a teacher
with the LoRA in it. Changes of layers that the student does not have are left out.

A student is a Wan, so the file is a Wan LoRA for its exports, of canonical names for diffusers or of original ones for ComfyUI.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.safetensors_files import write_tensors
from wandistiller.model.config import StudentConfig
from wandistiller.projection.project import kept_indices
from wandistiller.projection.selection import Selection
from wandistiller.wan.lora import Change, Difference, Lora
from wandistiller.wan.names import PATCH_KERNEL, to_original
from wandistiller.wan.transformer_files import teacher_tensor_shapes

# The names of a file, by its format: the prefix of a module's name, and what follows it for down, up and bias.
_NAMES = {
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight", "lora_B.bias"),
    "original": ("diffusion_model.", "lora_down.weight", "lora_up.weight", "diff_b"),
}
_NORMS = re.compile(r"\.norm(?:_[qk]|2)\.")


@dataclass
class StudentLora:
    """A LoRA's changes of a student's tensors, by canonical names of the student.

    Attributes:
        shapes: of all the student's tensors, in 3D.
        low_rank: up (out, rank) and down (rank, in) of each matrix that a product changes, scales and alphas in the first.
        differences: the changes of whole tensors.
        dropped: the teacher's tensors that the LoRA changes and this student does not have.
    """

    shapes: Mapping[str, tuple[int, ...]]
    low_rank: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.low_rank, *self.differences]))

    def delta(self, name: str) -> Tensor:
        """Return the change of a tensor of the student in 3D, in float32."""
        shape = self.shapes[name]
        total = torch.zeros(shape)
        if name in self.low_rank:
            up, down = self.low_rank[name]
            total += (up @ down).reshape(shape)
        if name in self.differences:
            total += self.differences[name]
        return total

    def add(self, name: str, changes: Iterable[tuple[Tensor, Tensor] | Tensor]) -> None:
        """Add changes of one tensor; products lie beside one another, so that their ranks add up."""
        for change in changes:
            if isinstance(change, Tensor):
                self.differences[name] = self.differences.get(name, 0) + change
            elif name in self.low_rank:
                up, down = self.low_rank[name]
                self.low_rank[name] = torch.cat([up, change[0]], dim=1), torch.cat([down, change[1]])
            else:
                self.low_rank[name] = change


def cut_loras(loras: Sequence[Lora], selection: Selection, config: StudentConfig) -> StudentLora:
    """Cut LoRAs of a teacher for the student that `selection` makes of it; several are added up.

    Args:
        config: the student's, of wan blocks.
    """
    student = StudentLora(teacher_tensor_shapes(config))
    for lora in loras:
        if lora.magnitudes:
            raise UserError(
                f"{lora.path}: is a DoRA, whose lengths are those of the teacher's rows; of a student it would be another"
            )
        for name, changes in lora.changes.items():
            own_name = _student_name(name, selection.layers)
            if own_name is None:
                student.dropped.append(name)
                continue
            shape = lora.shapes[name]
            student.add(own_name, (_cut(change, name, shape, selection, lora.scale) for change in changes))
    return student


def _student_name(teacher_name: str, layers: list[int]) -> str | None:
    """Return the student's name of a teacher's tensor; None where the layer is not kept."""
    match = re.match(r"blocks\.(\d+)\.(.+)", teacher_name)
    if match is None:
        return teacher_name
    return f"blocks.{layers.index(int(match[1]))}.{match[2]}" if int(match[1]) in layers else None


def _cut(
    change: Change, name: str, shape: tuple[int, ...], selection: Selection, scale: float
) -> tuple[Tensor, Tensor] | Tensor:
    """Return the student's part of a change, with the LoRA's scale."""
    kept = kept_indices(name, shape, selection)
    if isinstance(change, Difference):
        difference = scale * change.read().reshape(shape)
        for dim, indices in kept.items():
            difference = difference.index_select(dim, indices)
        return difference
    up, down = change.read()
    if 0 in kept:
        up = up.index_select(0, kept[0])
    if 1 in kept:  # of the patch kernel the columns stay whole, since latent channels are never cut
        down = down.index_select(1, kept[1])
    return scale * up, down


# ---- the file ----


def lora_tensors(student: StudentLora, file_format: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return a LoRA's tensors under the names of a file, and the names of changes that such a file cannot hold.

    diffusers takes products alone, with a bias for all of them or for none. A whole difference of a matrix becomes a product of
    full rank, and a layer whose bias alone changes gets a product of zeros. ComfyUI takes whole differences too.
    """
    is_original = file_format == "original"
    prefix, down_name, up_name, bias_name = _NAMES[file_format]
    tensors: dict[str, Tensor] = {}
    whole = list(filter(_is_whole, student.names()))
    if is_original:
        tensors |= {prefix + _whole_name(name): student.delta(name) for name in whole}
    for stem, (up, down, bias) in _modules(student).items():
        name = prefix + (to_original(stem) if is_original else stem)
        if is_original and f"{stem}.weight" == PATCH_KERNEL:  # diffusers refuses a product here, but skips a difference
            tensors[f"{name}.diff"] = student.delta(PATCH_KERNEL)
        else:
            tensors |= {f"{name}.{down_name}": down, f"{name}.{up_name}": up}
        if bias is not None:
            tensors[f"{name}.{bias_name}"] = bias
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, [] if is_original else whole


def _is_whole(name: str) -> bool:
    """Return whether a tensor is a norm's or a table, no part of a linear layer or kernel."""
    return bool(_NORMS.search(name)) or not name.endswith((".weight", ".bias"))


def _whole_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if kind == "bias":
        return f"{to_original(stem)}.diff_b"
    return f"{to_original(stem if kind == 'weight' else name)}.diff"


def _modules(student: StudentLora) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Return up, down and bias of each linear layer that is changed, and of the patch kernel."""
    stems = dict.fromkeys(name.rpartition(".")[0] for name in student.names() if not _is_whole(name))
    has_bias = any(f"{stem}.bias" in student.differences for stem in stems)
    modules = {}
    for stem in stems:
        up, down = _product(student, f"{stem}.weight")
        bias = student.differences.get(f"{stem}.bias", torch.zeros(len(up))) if has_bias else None
        modules[stem] = up, down, bias
    return modules


def _product(student: StudentLora, name: str) -> tuple[Tensor, Tensor]:
    """Return the whole change of a matrix as a product, its factors in the shapes that layers of a LoRA have."""
    shape = student.shapes[name]
    rows, columns = shape[0], math.prod(shape[1:])
    pairs = [student.low_rank[name]] if name in student.low_rank else []
    if name in student.differences:
        difference = student.differences[name].reshape(rows, columns)
        pairs.append((torch.eye(rows), difference) if rows <= columns else (difference, torch.eye(columns)))
    if not pairs:
        pairs = [(torch.zeros(rows, 1), torch.zeros(1, columns))]
    up, down = torch.cat([pair[0] for pair in pairs], dim=1), torch.cat([pair[1] for pair in pairs])
    return up.reshape(*up.shape, *[1] * (len(shape) - 2)), down.reshape(-1, *shape[1:])


def write_lora(student: StudentLora, path: str | Path, file_format: str) -> list[str]:
    """Write a LoRA for a student's exports, whole or not at all; return the names of changes that the format cannot hold."""
    tensors, left_out = lora_tensors(student, file_format)
    write_tensors(path, tensors, {"format": "pt"})
    return left_out
