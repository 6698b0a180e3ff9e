"""How large a model of some shape is: its parameters, the bytes they take at each precision, and the FLOPs of a forward pass.

Models are made on the meta device here, which has shapes and no memory.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import FP32_ISLANDS, WanLiteStudent

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
BACKWARD_PASSES = 2  # a backward pass takes so many forward passes' FLOPs: each product has two gradients


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of a model.

    Attributes:
        total: all parameters.
        float32: parameters that stay in float32 whatever the dtype of the rest: norms, modulation, time embedding.
        block: parameters of one block.
        matrix_shapes: shapes of the weights of one block's Linear layers, which fp8 covers and Muon moves.
    """

    total: int
    float32: int
    block: int
    matrix_shapes: tuple[tuple[int, int], ...]

    @property
    def block_matrices(self) -> int:
        """Weights of one block's Linear layers."""
        return sum(rows * columns for rows, columns in self.matrix_shapes)


def unfilled_model(config: StudentConfig, dtype: torch.dtype) -> WanLiteStudent:
    """Return a model on the meta device; `to_empty` gives it memory.

    Args:
        dtype: precision of all parameters but those that stay in float32 whatever it is.
    """
    with torch.device("meta"):
        model = WanLiteStudent(config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if FP32_ISLANDS.search(name) else dtype)
    return model


@lru_cache(maxsize=16)
def count_parameters(config: StudentConfig) -> ParameterCount:
    with torch.device("meta"):
        model = WanLiteStudent(config.replace(depth=1))
    sizes = {
        name: parameter.numel() * (config.depth if name.startswith("blocks.") else 1)
        for name, parameter in model.named_parameters()
    }
    in_block = list(model.blocks.parameters())
    return ParameterCount(
        total=sum(sizes.values()),
        float32=sum(size for name, size in sizes.items() if FP32_ISLANDS.search(name)),
        block=sum(parameter.numel() for parameter in in_block),
        matrix_shapes=tuple((len(weight), weight.shape[1]) for weight in in_block if weight.ndim == 2),
    )


def weight_bytes(config: StudentConfig, dtype: str) -> int:
    """Return the bytes of a projected model's weights at a precision of `BYTES`."""
    count = count_parameters(config)
    matrices = config.depth * count.block_matrices if dtype == "fp8" else 0
    size = BYTES["bf16" if dtype == "fp8" else dtype]
    return BYTES["fp32"] * count.float32 + size * (count.total - count.float32 - matrices) + BYTES["fp8"] * matrices


def num_image_tokens(config: StudentConfig, latent_size: int | tuple[int, int] | None = None) -> int:
    """Return the number of tokens of an image.

    Args:
        latent_size: side of a square image's latents, or their height and width; None takes the config's own image_size.
    """
    height, width = sides(latent_size or config.latent_size)
    return (height // config.patch_size) * (width // config.patch_size)


def sides(latent_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of latents, of which a square is known by its side."""
    return (latent_size, latent_size) if isinstance(latent_size, int) else latent_size


@lru_cache(maxsize=64)
def transformer_flops(
    config: StudentConfig, num_image_tokens: int, num_text_tokens: int, num_negative_tokens: int | None = None
) -> int:
    """Return the FLOPs of a forward pass of one sample.

    Args:
        num_text_tokens: tokens that cross-attention sees, with the one pad token that stands for all padding.
        num_negative_tokens: those of the negative prompt, in a guided pass that answers for both prompts at once.
    """
    tokens = num_image_tokens, num_text_tokens, num_negative_tokens
    # All blocks after the first cost the same.
    one, two = (_counted_flops(config.replace(depth=depth), *tokens) for depth in (1, 2))
    return one + (config.depth - 1) * (two - one)


def _counted_flops(config: StudentConfig, image: int, text: int, negative: int | None) -> int:
    text_dim, patch = config.text_encoder_output_dim, config.patch_size
    with torch.no_grad(), torch.device("meta"):
        model = WanLiteStudent(config)
        latents = torch.empty(1, config.num_channels, patch, image * patch)  # all tokens in one row
        negative_embeds = None if negative is None else torch.empty(negative, text_dim)
        with FlopCounterMode(display=False) as counter:
            model(latents, torch.empty(1), torch.empty(1, text, text_dim), negative_prompt_embeds=negative_embeds)
    return counter.get_total_flops()
