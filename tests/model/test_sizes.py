"""Sizes of true models, known without their weights: parameters, bytes and FLOPs, against figures worked out by hand."""

import time

import pytest

from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import count_parameters, num_image_tokens, transformer_flops, weight_bytes

SHAPES = {
    "14B": StudentConfig(
        block="wan", image_size=512, hidden_size=5120, num_heads=40, ffn_dim=13824, depth=40, num_channels=16
    ),
    "5B": StudentConfig(
        block="wan", image_size=512, hidden_size=3072, num_heads=24, ffn_dim=14336, depth=30, num_channels=48
    ),
    "lite": StudentConfig(block="lite", image_size=512, hidden_size=256, num_heads=4, depth=4, num_channels=4),
}
TEXT_TOKENS, NEGATIVE_TOKENS = 65, 31
# FLOPs of a pass and of a guided pass at SHAPES' image sizes, by formulas over every product of the model.
FLOPS = {
    "14B": (25_675_308_728_320, 50_939_017_297_920),
    "5B": (2_330_149_257_216, 4_596_520_452_096),
    "lite": (94_643_421_184, 189_210_296_320),
}
PARAMETERS = {"14B": 14_288_491_584, "5B": 4_999_787_712, "lite": 4_752_132}
FP8_BYTES = {"14B": 14_900_705_408, "5B": 5_228_206_464, "lite": 6_366_728}


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_exactly_those_of_every_product(name):
    config = SHAPES[name]
    image = num_image_tokens(config)
    found = (
        transformer_flops(config, image, TEXT_TOKENS),
        transformer_flops(config, image, TEXT_TOKENS, NEGATIVE_TOKENS),
    )
    assert found == FLOPS[name]


def test_a_second_question_about_flops_costs_nothing():
    config = SHAPES["14B"].replace(distillation={"shift": 5.0})
    transformer_flops(config, 4096, 65)
    start = time.perf_counter()
    transformer_flops(config, 4096, 65)
    assert time.perf_counter() - start < 0.01


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_bytes_are_those_of_the_shape(name):
    assert count_parameters(SHAPES[name]).total == PARAMETERS[name]
    assert weight_bytes(SHAPES[name], "fp8") == FP8_BYTES[name]
    assert weight_bytes(SHAPES[name], "fp32") == 4 * PARAMETERS[name]
