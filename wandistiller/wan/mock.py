"""`--teacher_path mock`: a Wan of seeded random weights, wider and deeper than the student, which needs no download."""

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wandistiller.model.config import StudentConfig
from wandistiller.wan.transformer_files import WanTransformer, own_image_size, teacher_tensor_shapes
from wandistiller.wan.wan_files import WanFiles

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
    is_wan = student.block == "wan"
    patch_size = student.patch_size if is_wan else 2
    return replace(
        student,
        block="wan",
        hidden_size=heads * head_dim,
        depth=larger(student.depth),
        num_heads=heads,
        ffn_dim=larger(student.ffn_dim),
        image_size=own_image_size(patch_size),
        patch_size=patch_size,
        freq_dim=student.freq_dim if is_wan else 256,
        distillation=None,
    )


def mock_wan_files(student: StudentConfig) -> WanFiles:
    """Return the mock around a student's shape, to be used as a Wan on disk is."""
    config = mock_shape(student)
    weights = {name: RandomWeight(name, shape) for name, shape in teacher_tensor_shapes(config).items()}
    transformer = WanTransformer("mock", config, weights)
    return WanFiles("mock", {"high": transformer}, {"vae_scale_factor": student.vae_scale_factor})
