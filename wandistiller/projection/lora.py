"""A Wan LoRA cut for a student: its matrices by the part of the teacher that the student was made of.

What a LoRA adds to a weight is `up @ down`. The student has some rows and columns of that weight, and of the product these are the
same rows of `up` and columns of `down`, so that the cut is exact: it is what the student's projection would gain from a teacher
with the LoRA in it. Changes of layers that the student does not have are left out.

A student is a Wan, so the file is a Wan LoRA for its exports, of canonical names for diffusers or of original ones for ComfyUI.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.tensor_files import write_tensors
from wandistiller.model.config import StudentConfig
from wandistiller.projection.project import kept_indices
from wandistiller.projection.selection import Selection
from wandistiller.wan.lora import Change, Lora
from wandistiller.wan.names import PATCH_KERNEL, to_original
from wandistiller.wan.transformer_files import teacher_tensor_shapes


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
        total = torch.zeros(self.shapes[name])
        if name in self.low_rank:
            up, down = self.low_rank[name]
            total += (up @ down).reshape(total.shape)
        return total + self.differences.get(name, 0)

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
    if (pair := change.read_low_rank()) is None:
        difference = scale * change.read().reshape(shape)
        for dim, indices in kept.items():
            difference = difference.index_select(dim, indices)
        return difference
    up, down = pair
    if 0 in kept:
        up = up.index_select(0, kept[0])
    if 1 in kept:  # of the patch kernel the columns stay whole, since latent channels are never cut
        down = down.index_select(1, kept[1])
    return scale * up, down


# ---- the file ----


def write_lora(student: StudentLora, path: str | Path, file_format: str) -> None:
    """Write a LoRA for a student's exports, whole or not at all.

    A file for diffusers holds products alone. ComfyUI ("original") also takes whole differences.
    """
    tensors = _for_comfyui(student) if file_format == "original" else _for_diffusers(student)
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})


def _for_diffusers(student: StudentLora) -> dict[str, Tensor]:
    tensors = {}
    for name, (up, down) in student.low_rank.items():
        stem, shape = f"transformer.{name.removesuffix('.weight')}", student.shapes[name]
        tensors[f"{stem}.lora_A.weight"] = down.reshape(-1, *shape[1:])  # the patch kernel's is a convolution
        tensors[f"{stem}.lora_B.weight"] = up.reshape(*up.shape, *[1] * (len(shape) - 2))
    return tensors


def _for_comfyui(student: StudentLora) -> dict[str, Tensor]:
    """A product where nothing else changes the tensor, and the whole difference otherwise: of two, ComfyUI takes the last."""
    tensors = {}
    for name in student.names():
        stem, _, kind = name.rpartition(".")
        module = f"diffusion_model.{to_original(stem if kind in ('weight', 'bias') else name)}"
        if (
            name in student.differences or name == PATCH_KERNEL
        ):  # which diffusers refuses as a product, and skips like this
            tensors[f"{module}.{'diff_b' if kind == 'bias' else 'diff'}"] = student.delta(name)
        else:
            up, down = student.low_rank[name]
            tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    return tensors
