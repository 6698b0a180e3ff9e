"""Activations and FLOPs by formula agree with what torch keeps and counts, on small students.

The oracles are the tensors that autograd saves, the live memory of a step (fp32 within 2 %, bf16 within 15 %), and
torch's own FLOP counter (1 %).
"""

import pytest
import torch

from support.measures import (
    computing_in,
    count_flops,
    inference_peak,
    inputs_of,
    per_sample,
    saved_bytes,
    training_peak,
    with_checkpointing,
)
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.budget.activations import block_saved_bytes, inference_bytes, training_bytes
from wandistiller.model.sizes import count_parameters, num_image_tokens, transformer_flops

NUM_TOKENS = 9
DTYPES = {2: torch.bfloat16, 4: torch.float32}
SHAPES = {
    "wan": {"block": "wan", "hidden_size": 64, "num_heads": 2, "ffn_dim": 192, "image_size": 256, "freq_dim": 64},
    "wan, wide FFN": {"block": "wan", "hidden_size": 64, "num_heads": 1, "ffn_dim": 384, "image_size": 256, "freq_dim": 64},
}  # fmt: skip


def config_of(shape: str, depth: int, **changes) -> StudentConfig:
    return StudentConfig(num_channels=16, text_encoder_output_dim=32, depth=depth, **SHAPES[shape] | changes)


def tokens_of(config: StudentConfig) -> tuple[int, int]:
    """Image tokens, and text tokens with the one that stands for the padding."""
    return num_image_tokens(config), NUM_TOKENS + 1


@pytest.mark.parametrize("compute_bytes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_autograd_keeps_of_a_block(shape, compute_bytes):
    def saved(depth: int, batch: int) -> int:
        model, inputs = WanLiteStudent(config_of(shape, depth)), inputs_of(config_of(shape, depth), batch, NUM_TOKENS)
        with computing_in(DTYPES[compute_bytes]):
            return saved_bytes(lambda: model(*inputs))

    measured = per_sample(lambda batch: saved(3, batch)) - per_sample(lambda batch: saved(2, batch))
    config = config_of(shape, 3)
    expected = block_saved_bytes(config, *tokens_of(config), compute_bytes, is_gpu=False)
    assert expected == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("compute_bytes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_peak_of_a_training_step(shape, compute_bytes, depth, is_checkpointed):
    config = config_of(shape, depth)
    model = WanLiteStudent(config)
    model = with_checkpointing(model) if is_checkpointed else model
    # With few samples the peak of a checkpointed step lies elsewhere, where weights and their gradients are most.
    batches = (10, 13) if is_checkpointed else (2, 4)
    measured = per_sample(lambda batch: training_peak(model, batch, NUM_TOKENS, DTYPES[compute_bytes]), *batches)
    expected = training_bytes(config, *tokens_of(config), compute_bytes, is_checkpointed, is_gpu=False)
    assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("compute_bytes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_peak_of_a_forward_pass_that_keeps_nothing(shape, compute_bytes):
    config = config_of(shape, 3)
    model = WanLiteStudent(config).requires_grad_(False)
    measured = per_sample(lambda batch: inference_peak(model, batch, NUM_TOKENS, DTYPES[compute_bytes]))
    assert inference_bytes(config, *tokens_of(config), compute_bytes) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("image_size", [128, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_those_that_torch_counts(shape, image_size):
    config = config_of(shape, 3, image_size=image_size)
    model = WanLiteStudent(config).eval()
    measured = count_flops(lambda: model(*inputs_of(config, 2, NUM_TOKENS)))
    assert 2 * transformer_flops(config, *tokens_of(config)) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model(shape):
    config = config_of(shape, 4)
    model, count = WanLiteStudent(config), count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert count.block == sum(parameter.numel() for parameter in model.blocks[2].parameters())
