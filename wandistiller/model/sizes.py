"""Parameters of a model by its shape, and the bytes they take at each precision; nothing is allocated."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.lift import FP32_ISLANDS

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        float32: those that a projected model keeps in float32 whatever its dtype: norms, modulation, time embedding.
        block: of one block; block_matrices are the weights of its Linear layers, which fp8 covers.
    """

    total: int
    float32: int
    block: int
    block_matrices: int


def unfilled_model(config: StudentConfig, dtype: torch.dtype) -> WanLiteStudent:
    """A model on the meta device, in `dtype` but for what stays in float32 whatever the dtype; `to_empty` gives it memory."""
    with torch.device("meta"):
        model = WanLiteStudent(config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if FP32_ISLANDS.search(name) else dtype)
    return model


def count_parameters(config: StudentConfig) -> ParameterCount:
    return _count_parameters(config.replace(distillation=None))


@lru_cache(maxsize=16)
def _count_parameters(config: StudentConfig) -> ParameterCount:
    with torch.device("meta"):
        model = WanLiteStudent(config.replace(depth=1))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of_block = {name: size for name, size in sizes.items() if name.startswith("blocks.")}
    matrices = {name for name in of_block if model.get_parameter(name).ndim == 2}
    others = config.depth - 1  # blocks beside the one that was made
    islands = {name: size for name, size in sizes.items() if FP32_ISLANDS.search(name)}
    float32 = sum(size * (config.depth if name in of_block else 1) for name, size in islands.items())
    return ParameterCount(
        total=sum(sizes.values()) + others * sum(of_block.values()),
        float32=float32,
        block=sum(of_block.values()),
        block_matrices=sum(of_block[name] for name in matrices),
    )


def weight_bytes(config: StudentConfig, dtype: str) -> int:
    """Of one model projected to a precision."""
    count = count_parameters(config)
    matrices = config.depth * count.block_matrices if dtype == "fp8" else 0
    size = BYTES["bf16" if dtype == "fp8" else dtype]
    return BYTES["fp32"] * count.float32 + size * (count.total - count.float32 - matrices) + BYTES["fp8"] * matrices
