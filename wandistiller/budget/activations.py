"""Bytes of activations of the 2D transformer, from its shape: what autograd keeps, and what lives inside one block.

The formulas are a reading of `wandistiller/model/layers.py` line by line; tests hold them against the tensors that autograd
really saves, on the CPU. L image tokens, S text tokens, D hidden_size, F ffn_dim; c is the size of the compute dtype (2 for
bf16 under autocast, 4), and the residual stream of a wan block is float32 whatever c is.
"""

from wandistiller.model.config import StudentConfig

FP32 = 4
# A backward step has so many float32 copies of the residual stream in hand beside what was saved. This was measured.
WORKING_COPIES = 5


def block_saved_bytes(config: StudentConfig, image: int, text: int, compute_bytes: int, is_gpu: bool = True) -> int:
    """Return the bytes that autograd keeps of one sample in one block, without parameters and their autocast copies.

    A wan block, per image token: the inputs of three LayerNorms, two of them also normed (their scales want a gradient),
    the inputs of three RMSNorms in float32; in the compute dtype the inputs of q, k and v, of the output projections and of
    the FFN, what attention itself keeps (q, k, v, output), and what the gates multiply; twice the FFN's neurons.

    Args:
        is_gpu: RMSNorm and LayerNorm are one kernel each there; the CPU's RMSNorm keeps a second copy, and a GPU's autocast
            runs a lite block's LayerNorms in float32.
    """
    width, c = config.hidden_size, compute_bytes
    if not config.is_wan:
        norm_inputs = 2 * (FP32 if is_gpu else c)
        return image * ((norm_inputs + 6 * c) * width + 2 * c * config.ffn_dim)
    rms_copies = 1 if is_gpu else 2
    per_token = (FP32 * (5 + 3 * rms_copies) + 11 * c) * width + 2 * c * config.ffn_dim
    per_text_token = (FP32 * rms_copies + 2 * c) * width
    softmax_sums = 2 * FP32 * config.num_heads
    return image * (per_token + softmax_sums) + text * per_text_token


def block_input_bytes(config: StudentConfig, image: int, compute_bytes: int) -> int:
    """Return the bytes of one sample's residual stream, float32 in a wan block and of the compute dtype in a lite one."""
    return image * config.hidden_size * (FP32 if config.is_wan else compute_bytes)


def training_bytes(
    config: StudentConfig, image: int, text: int, compute_bytes: int, checkpointing: bool = False, is_gpu: bool = True
) -> int:
    """Return the peak of one sample's activations in a training step: what is kept, and what the backward pass has in hand.

    With checkpointing a block keeps its input alone, and one block at a time is computed again.
    """
    width, c = config.hidden_size, compute_bytes
    block = block_saved_bytes(config, image, text, c, is_gpu)
    if not config.is_wan:
        working = (WORKING_COPIES + 2) * c
        text_part = text * config.text_encoder_output_dim * FP32
    else:
        working = WORKING_COPIES * FP32
        # The embedder's input, its two hidden layers and the text tokens themselves:
        text_part = text * c * (config.text_encoder_output_dim + 3 * width)
    head = image * (2 * FP32 + c) * width if config.is_wan else 0
    in_hand = image * working * width
    if checkpointing:
        # Of the other blocks; its own is among what a block keeps.
        inputs = (config.depth - 1) * block_input_bytes(config, image, c)
        return inputs + max(block, head) + in_hand + text_part
    return config.depth * block + head + in_hand + text_part


def inference_bytes(config: StudentConfig, image: int, text: int, compute_bytes: int) -> int:
    """Return the peak of one sample's activations in a forward pass that keeps nothing: inside one block."""
    width, c = config.hidden_size, compute_bytes
    if not config.is_wan:
        return image * 12 * c * width
    ffn = (2 * FP32 + 2 * c) * width + 2 * c * config.ffn_dim
    attention = (6 * FP32 + 2 * c) * width  # q and k in float32, rotated one after the other
    text_part = text * c * (config.text_encoder_output_dim + 3 * width)
    return image * max(ffn, attention) + text_part
