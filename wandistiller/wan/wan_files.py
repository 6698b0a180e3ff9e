"""A Wan: its experts by their headers, and what the folder around them says; and the mock, of seeded random weights, in its place."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.hub import local_path
from wandistiller.model.config import StudentConfig
from wandistiller.wan.lora import Lora, open_lora
from wandistiller.wan.text_encoder_files import TEXT_ENCODER_ADVICE, TextEncoderFiles, encoder_files, find_text_encoder
from wandistiller.wan.transformer_files import WanTransformer, own_image_size, teacher_tensor_shapes

SAME_EXPERTS = "is given as both experts; give the two files, or this one alone"


@dataclass(frozen=True)
class WanFiles:
    """A Wan on disk: its experts and what the folder around them says.

    Attributes:
        location: the path or hub id that the person gave.
        experts: {"high": ...}, or {"high": ..., "low": ...} where the noise levels are shared between two.
        record: how it is sampled and what its latents are, by the names of `TeacherSettings`: what its folder's index, scheduler,
            VAE and teacher_record.json (the demo teacher's own defaults) tell, or the student in it.
        pipeline: the class that the index of diffusers names, which may be another than WanPipeline.
        encoder: the text encoder that a run's prompts are embedded with; None before one is chosen, and of the mock.
    """

    location: str
    experts: Mapping[str, WanTransformer]
    record: dict = field(default_factory=dict)
    pipeline: str | None = None
    encoder: TextEncoderFiles | None = None

    @property
    def config(self) -> StudentConfig:
        return self.experts["high"].config

    @property
    def loras(self) -> tuple[Lora, ...]:
        return tuple(lora for expert in self.experts.values() for lora in expert.loras)

    @property
    def is_mock(self) -> bool:
        return self.location == "mock"

    def expert(self, name: str) -> WanTransformer:
        if name not in self.experts:
            raise UserError(f'{self.location}: has no expert "{name}"; it has: {", ".join(self.experts)}')
        return self.experts[name]

    def fingerprint(self) -> str:
        """Return a digest of every byte of every expert's files, and of the text encoder that they are asked with, wherever they lie.

        Merged LoRAs are left out; their own digests tell what they are.

        Raises:
            UserError: both experts have the same bytes.
        """
        digests = [expert.fingerprint() for expert in self.experts.values()]
        if len(set(digests)) < len(digests):
            raise UserError(f"{self.location}: {SAME_EXPERTS}")
        digests += [self.encoder.fingerprint()] if self.encoder else []
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

    def left_out(self) -> str | None:
        """Return one line for the screen on the tensors of its files that are no weights, with why they do no harm."""
        return left_out([*self.experts.values(), *([self.encoder.umt5] if self.encoder else [])])

    def text_encoder(self) -> TextEncoderFiles:
        """Find the text encoder that belongs to this Wan; one on the hub is fetched now."""
        place = local_path(self.location)
        if place.exists() and not (place / "text_encoder").is_dir() and not encoder_files(place):
            raise UserError(
                f"{self.location}: has no text encoder beside it; give --text_encoder_path {TEXT_ENCODER_ADVICE}"
            )
        return find_text_encoder(self.location)


def left_out(parts: Sequence[Any]) -> str | None:
    """Return one line for the screen on what transformers or text encoders have `ignored`; None where that is nothing."""
    reasons = Counter(reason for part in parts for reason in part.ignored.values())
    told = ", ".join(f"{count} ({reason})" for reason, count in reasons.items())
    return f"Tensors that are no weights: {told}" if told else None


LoraFiles = Sequence[tuple[str | Path, float]]


def merge_loras(wan_files: WanFiles, high: LoraFiles | None = None, low: LoraFiles | None = None) -> WanFiles:
    """Return a Wan that is read with LoRAs in it; each is opened and checked now, and merged as tensors are read.

    Args:
        high: files and scales for the only expert, or for the high-noise one of two.
        low: those for the low-noise expert.

    Raises:
        UserError: one of them cannot be merged into this Wan, or there is no low-noise expert.
    """
    experts = dict(wan_files.experts)
    for name, files in (("high", high), ("low", low)):
        if not files:
            continue
        if name not in experts:
            raise UserError(
                f"--teacher_lora_low {files[0][0]}: {wan_files.location} has one expert; give it as --teacher_lora"
            )
        own = experts[name]
        loras = [open_lora(path, scale, own.shapes, name) for path, scale in files]
        experts[name] = replace(own, loras=(*own.loras, *loras))
    return replace(wan_files, experts=experts)


# ---- `--teacher_path mock`: wider and deeper than the student, and no download ----

MOCK_SEED = 20250728


@dataclass(frozen=True)
class RandomWeight:
    """A tensor of random values, made when it is read: the same for the same name and shape."""

    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Return values of a size that keeps activations and velocity near unit size."""
        generator = torch.Generator().manual_seed(MOCK_SEED ^ zlib.crc32(self.name.encode()))
        values = torch.randn(self.shape, generator=generator)
        if self.name.endswith("scale_shift_table"):
            return values / self.shape[-1] ** 0.5
        if "norm" in self.name:
            return values * 0.1 + (1.0 if self.name.endswith("weight") else 0.0)
        if self.name.endswith("bias"):
            return values * 0.02
        return values / values[0].numel() ** 0.5


def mock_shape(student: StudentConfig) -> StudentConfig:
    """Return the shape of a Wan with a quarter more heads, layers and FFN neurons than a student, at least one more of each."""

    def larger(count: int) -> int:
        return count + max(1, count // 4)

    head_dim = student.head_dim
    if head_dim % 2 or head_dim < 6:  # a lite student's heads need not suit RoPE
        head_dim = 8
    heads = larger(-(-student.hidden_size // head_dim))
    patch_size = student.patch_size if student.is_wan else 2
    return replace(
        student,
        block="wan",
        hidden_size=heads * head_dim,
        depth=larger(student.depth),
        num_heads=heads,
        ffn_dim=larger(student.ffn_dim),
        image_size=own_image_size(patch_size),
        patch_size=patch_size,
        freq_dim=student.freq_dim if student.is_wan else 256,
        distillation=None,
    )


def mock_wan_files(student: StudentConfig) -> WanFiles:
    """Return the mock around a student's shape, to be used as a Wan on disk is."""
    config = mock_shape(student)
    weights = {name: RandomWeight(name, shape) for name, shape in teacher_tensor_shapes(config).items()}
    transformer = WanTransformer("mock", config, weights)
    return WanFiles("mock", {"high": transformer}, {"vae_scale_factor": student.vae_scale_factor})
