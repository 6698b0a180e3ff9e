"""`--compile` at the width of a 14B: whole graphs by torch's own compiler, and none compiled again once sizes have settled.

One block, few tokens. What changes from step to step is the shape of the pictures, the length of the prompts and, where a student is
measured or draws, the last batch. torch itself is the oracle: `fail_on_recompile` raises where a graph would be made anew.

pytest tests/model/test_compiled_at_true_width.py
"""

import importlib.util

import pytest
import torch

from benchmarks.random_step import random_model
from wandistiller.model.config import StudentConfig
from wandistiller.run.build import compile_blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("torch._inductor"), reason="torch without its compiler"),
]
WIDTH_OF_14B = {"hidden_size": 5120, "num_heads": 40, "ffn_dim": 13824, "num_channels": 16}
STUDENT = {"hidden_size": 1536, "num_heads": 12, "ffn_dim": 8960, "num_channels": 16}
# (height, width) of latents: a square, the first rectangle makes sizes dynamic, and the others must need nothing new
FIRST, LATER = [(8, 8), (6, 10)], [(10, 6), (4, 12), (12, 4), (8, 8)]


def config_of(shape: dict) -> StudentConfig:
    return StudentConfig(block="wan", depth=1, image_size=64, text_encoder_output_dim=64, **shape)


def inputs(height: int, width: int, count: int, tokens: int) -> tuple[torch.Tensor, ...]:
    lengths = torch.tensor([tokens, 2, 3, 4, 5][:count])
    return torch.randn(count, 16, height, width), torch.full((count,), 500.0), torch.randn(count, tokens, 64), lengths


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_teachers_guided_answers_settle_over_sizes_prompts_and_last_batches():
    teacher = random_model(config_of(WIDTH_OF_14B), "cpu", torch.bfloat16).requires_grad_(False)
    negative = torch.randn(7, 64)

    @torch.no_grad()
    def answer(size: tuple[int, int], count: int, tokens: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return teacher(*inputs(*size, count, tokens), negative)

    torch.manual_seed(0)
    eager = answer((8, 8), 3, 6)
    compile_blocks([teacher])
    torch.manual_seed(0)
    torch.testing.assert_close(answer((8, 8), 3, 6), eager, rtol=0.1, atol=0.05 * float(eager.abs().max()))
    for size, count, tokens in zip(FIRST, (3, 2), (6, 8), strict=True):
        answer(size, count, tokens)
    with torch.compiler.set_stance("fail_on_recompile"):
        for size, count, tokens in zip(LATER, (3, 4, 2, 5), (9, 5, 12, 7), strict=True):
            answer(size, count, tokens)


def test_a_students_steps_settle_over_sizes_and_prompts():
    student = random_model(config_of(STUDENT), "cpu", torch.float32).train()
    compile_blocks([student])

    def step(size: tuple[int, int], tokens: int) -> None:
        student(*inputs(*size, 3, tokens)).square().mean().backward()

    for size, tokens in zip(FIRST, (6, 8), strict=True):
        step(size, tokens)
    with torch.compiler.set_stance("fail_on_recompile"):
        for size, tokens in zip(LATER, (9, 5, 12, 7), strict=True):
            step(size, tokens)
