"""Parameters of a model by its shape, and the bytes they take at each precision; nothing is allocated."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import FP32_ISLANDS, WanLiteStudent

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


BACKWARD_PASSES = 2  # of a forward's FLOPs: the gradient of every product's input and of its weight


def num_image_tokens(config: StudentConfig, latent_size: int | None = None) -> int:
    """Tokens of a square image; `latent_size` is the side of its latents where the config's own is not meant."""
    return ((latent_size or config.latent_size) // config.patch_size) ** 2


def transformer_flops(config: StudentConfig, num_image_tokens: int, num_text_tokens: int) -> int:
    """FLOPs of one sample's forward pass.

    Args:
        num_text_tokens: that cross-attention sees, with the one pad token that stands for all padding.
    """
    count = _wan_flops if config.block == "wan" else _lite_flops
    return count(config, num_image_tokens, num_text_tokens)


def guided_flops(config: StudentConfig, num_image_tokens: int, num_text_tokens: int, num_negative_tokens: int) -> int:
    """FLOPs of one sample with guidance: a pass for the prompt and one for the negative prompt, which share their start."""
    halves = (transformer_flops(config, num_image_tokens, tokens) for tokens in (num_text_tokens, num_negative_tokens))
    shared = _ends_flops(config, num_image_tokens) // 2 + _time_flops(config)
    if config.block == "wan":
        shared += _self_attention_flops(config, num_image_tokens)  # the first block's
    return sum(halves) - shared


def _wan_flops(config: StudentConfig, image: int, text: int) -> int:
    width = config.hidden_size
    text_embedder = 2 * text * (config.text_encoder_output_dim * width + width**2)
    cross_attention = 2 * (2 * image + 2 * text) * width**2 + _attention_flops(image, text, width)
    ffn = 2 * image * 2 * width * config.ffn_dim
    blocks = config.depth * (_self_attention_flops(config, image) + cross_attention + ffn)
    return _ends_flops(config, image) + _time_flops(config) + text_embedder + blocks


def _lite_flops(config: StudentConfig, image: int, text: int) -> int:
    """The text is a mean over its tokens here, so that their number costs nothing."""
    width = config.hidden_size
    text_projection = 2 * config.text_encoder_output_dim * width
    block = _self_attention_flops(config, image) + 2 * image * 2 * width * config.ffn_dim
    return _ends_flops(config, image) + _time_flops(config) + text_projection + config.depth * block


def _ends_flops(config: StudentConfig, image: int) -> int:
    """The first layer and the last: patches and head, or two convolutions 3x3."""
    values = config.patch_size**2 if config.block == "wan" else 9
    return 2 * (2 * image * values * config.num_channels * config.hidden_size)


def _time_flops(config: StudentConfig) -> int:
    width = config.hidden_size
    return 2 * (config.freq_dim * width + 7 * width**2 if config.block == "wan" else 8 * width**2)


def _self_attention_flops(config: StudentConfig, image: int) -> int:
    return 2 * image * 4 * config.hidden_size**2 + _attention_flops(image, image, config.hidden_size)


def _attention_flops(queries: int, keys: int, width: int) -> int:
    """Q K^T and the weighted sum of V, over all heads."""
    return 2 * (2 * queries * keys * width)
