"""Floating-point operations of the 2D transformer from its shape alone; a multiply-add counts 2.

Matrix products, attention and convolutions are counted; norms, activations and additions are below a hundredth of them.
L image tokens, S text tokens, D hidden_size as in `wandistiller/student.py`.
"""

from wandistiller.student_config import StudentConfig

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


def _wan_flops(config: StudentConfig, image: int, text: int) -> int:
    width = config.hidden_size
    patch_values = config.patch_size**2 * config.num_channels
    ends = 2 * (2 * image * patch_values * width)  # patch embedding and head
    time = 2 * (config.freq_dim * width + width**2 + 6 * width**2)
    text_embedder = 2 * text * (config.text_encoder_output_dim * width + width**2)
    self_attention = 2 * image * 4 * width**2 + _attention_flops(image, image, width)
    cross_attention = 2 * (2 * image + 2 * text) * width**2 + _attention_flops(image, text, width)
    ffn = 2 * image * 2 * width * config.ffn_dim
    return ends + time + text_embedder + config.depth * (self_attention + cross_attention + ffn)


def _lite_flops(config: StudentConfig, image: int, text: int) -> int:
    """The text is a mean over its tokens here, so that their number costs nothing."""
    width = config.hidden_size
    ends = 2 * (2 * image * 9 * config.num_channels * width)  # two convolutions 3x3
    time = 2 * (4 * width**2 + 4 * width**2)
    text_projection = 2 * config.text_encoder_output_dim * width
    block = 2 * image * (4 * width**2 + 2 * width * config.ffn_dim) + _attention_flops(image, image, width)
    return ends + time + text_projection + config.depth * block


def _attention_flops(queries: int, keys: int, width: int) -> int:
    """Q K^T and the weighted sum of V, over all heads."""
    return 2 * (2 * queries * keys * width)
