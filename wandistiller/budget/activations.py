"""Bytes of activations of the 2D transformer, from its shape: what autograd keeps, and what lives inside one block.

The formulas are a reading of `wandistiller/model/layers.py` line by line; tests hold them against the tensors that autograd
really saves, on the CPU. L image tokens, S text tokens, D hidden_size, F ffn_dim; c is the size of the compute dtype (2 for
bf16 under autocast, 4), and the residual stream is float32 whatever c is. A lite student is counted as a wan one of its shape,
which takes a little more.
"""

from wandistiller.budget.workload import FP32
from wandistiller.model.config import StudentConfig

# A backward step has so many float32 copies of the residual stream in hand beside what was saved. This was measured.
WORKING_COPIES = 5


def block_saved_bytes(config: StudentConfig, image: int, text: int, compute_bytes: int, is_gpu: bool = True) -> int:
    """Return the bytes that autograd keeps of one sample in one block, without parameters and their autocast copies.

    A wan block, per image token: the inputs of three LayerNorms, two of them also normed (their scales want a gradient),
    the inputs of three RMSNorms in float32; in the compute dtype the inputs of q, k and v, of the output projections and of
    the FFN, what attention itself keeps (q, k, v, output), and what the gates multiply; twice the FFN's neurons.

    Args:
        is_gpu: RMSNorm is one kernel there; the CPU's keeps a second copy.
    """
    width, c = config.hidden_size, compute_bytes
    rms_copies = 1 if is_gpu else 2
    per_token = (FP32 * (5 + 3 * rms_copies) + 11 * c) * width + 2 * c * config.ffn_dim
    per_text_token = (FP32 * rms_copies + 2 * c) * width
    softmax_sums = 2 * FP32 * config.num_heads
    return image * (per_token + softmax_sums) + text * per_text_token


def block_input_bytes(config: StudentConfig, image: int) -> int:
    """Return the bytes of one sample's residual stream."""
    return image * config.hidden_size * FP32


def training_bytes(
    config: StudentConfig, image: int, text: int, compute_bytes: int, checkpointing: bool = False, is_gpu: bool = True
) -> int:
    """Return the peak of one sample's activations in a training step: what is kept, and what the backward pass has in hand.

    With checkpointing a block keeps its input alone, and one block at a time is computed again.
    """
    width, c = config.hidden_size, compute_bytes
    block = block_saved_bytes(config, image, text, c, is_gpu)
    # The embedder's input, its two hidden layers and the text tokens themselves:
    text_part = text * c * (config.text_encoder_output_dim + 3 * width)
    head = image * (2 * FP32 + c) * width
    in_hand = image * WORKING_COPIES * FP32 * width
    if checkpointing:
        # Of the other blocks; its own is among what a block keeps.
        inputs = (config.depth - 1) * block_input_bytes(config, image)
        return inputs + max(block, head) + in_hand + text_part
    return config.depth * block + head + in_hand + text_part


def inference_bytes(config: StudentConfig, image: int, text: int, compute_bytes: int) -> int:
    """Return the peak of one sample's activations in a forward pass that keeps nothing: inside one block."""
    width, c = config.hidden_size, compute_bytes
    ffn = (2 * FP32 + 2 * c) * width + 2 * c * config.ffn_dim
    attention = (6 * FP32 + 2 * c) * width  # q and k in float32, rotated one after the other
    text_part = text * c * (config.text_encoder_output_dim + 3 * width)
    return image * max(ffn, attention) + text_part
