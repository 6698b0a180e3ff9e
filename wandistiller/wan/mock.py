"""`--teacher_path mock`: a Wan of seeded random weights, wider and deeper than the student, which needs no download."""

import hashlib
import zlib
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.model.config import StudentConfig
from wandistiller.wan.transformer_files import own_image_size, teacher_tensor_shapes
from wandistiller.wan.wan_files import WanFiles

MOCK_SEED = 20250728


class MockTransformer:
    """Random tensors under canonical names, each made when it is read; the interface is that of `TransformerTensors`."""

    def __init__(self, config: StudentConfig):
        self.location: str | Path = "mock"
        self.config = config
        self.student: StudentConfig | None = None
        self.ignored: dict[str, str] = {}
        self.heads_are_assumed = False
        self._shapes = teacher_tensor_shapes(config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        """Return the same values for the same name and shape, scaled so that activations and velocity stay near unit size."""
        generator = torch.Generator().manual_seed(MOCK_SEED ^ zlib.crc32(name.encode()))
        shape = self._shapes[name]
        values = torch.randn(shape, generator=generator)
        if name.endswith("scale_shift_table"):
            return values / shape[-1] ** 0.5
        if "norm" in name:
            return values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        if name.endswith("bias"):
            return values * 0.02
        return values / values[0].numel() ** 0.5

    def fingerprint(self) -> str:
        return hashlib.sha256(f"mock {MOCK_SEED} {self.config.to_json()}".encode()).hexdigest()


def mock_shape(student: StudentConfig) -> StudentConfig:
    """Return the shape of a Wan with a quarter more heads, layers and FFN neurons than a student, at least one more of each."""

    def larger(count: int) -> int:
        return count + max(1, count // 4)

    head_dim = student.head_dim
    if head_dim % 2 or head_dim < 6:  # a lite student's heads need not suit RoPE
        head_dim = 8
    heads = larger(-(-student.hidden_size // head_dim))
    is_wan = student.block == "wan"
    patch_size = student.patch_size if is_wan else 2
    return StudentConfig(
        block="wan",
        hidden_size=heads * head_dim,
        depth=larger(student.depth),
        num_heads=heads,
        ffn_dim=larger(student.ffn_dim),
        num_channels=student.num_channels,
        image_size=own_image_size(patch_size),
        patch_size=patch_size,
        text_max_length=student.text_max_length,
        text_encoder_output_dim=student.text_encoder_output_dim,
        freq_dim=student.freq_dim if is_wan else 256,
        eps=student.eps,
    )


def mock_wan_files(student: StudentConfig) -> WanFiles:
    """Return the mock around a student's shape, to be used as a Wan on disk is."""
    transformer = MockTransformer(mock_shape(student))
    return WanFiles("mock", {"high": transformer}, vae_scale_factor=student.vae_scale_factor)
