"""What saves memory or time changes no result: checkpointing, compiled blocks.

Recomputed blocks are compared bit for bit, and compiled blocks (slow, 3 minutes) as whole graphs that are not compiled again.
"""

import importlib.util
import json

import pytest
import torch

from support.runs import IDENTITY_CONFIG, PRUNED_CONFIG, read_metrics, same_weights, weights_of
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.run.build import compile_blocks

FLAGS = ["--max_steps", 6, "--lr", 1e-3, "--batch_size", 4]


def test_blocks_that_are_computed_again_train_the_same_student_bit_for_bit(train, teachers, tmp_path):
    for name, flags in (("kept", []), ("again", ["--gradient_checkpointing"])):
        train(teachers.one, PRUNED_CONFIG, *FLAGS, *flags, output_dir=tmp_path / name).ok()
    assert same_weights(tmp_path / "kept", tmp_path / "again")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torch._inductor"), reason="torch without its compiler")
def test_compiled_blocks_train_the_same_student(train, teachers, tmp_path):
    train(teachers.one, PRUNED_CONFIG, *FLAGS, output_dir=tmp_path / "eager").ok()
    train(teachers.one, PRUNED_CONFIG, *FLAGS, "--compile", output_dir=tmp_path / "compiled").ok()
    eager, compiled = (read_metrics(tmp_path / name) for name in ("eager", "compiled"))
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in eager], rel=1e-4)
    assert weights_of(tmp_path / "compiled").keys() == weights_of(tmp_path / "eager").keys()


def test_compiled_blocks_are_one_graph_each_and_settle():
    """Guided teacher and student, other sizes and prompts in every batch: no graph breaks, and nothing new after a while."""
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()  # a backend that runs each graph as it is
    teacher, student = (
        WanLiteStudent(StudentConfig.from_json(json.dumps(config), "")) for config in (IDENTITY_CONFIG, PRUNED_CONFIG)
    )
    compile_blocks([teacher, student], backend=counter, fullgraph=True)

    def step(tokens: int, *size: int) -> None:
        latents, timestep = torch.randn(3, 16, *size), torch.tensor([900.0, 500.0, 100.0])
        embeds, lengths = torch.randn(3, tokens, 20), torch.tensor([tokens, 1, 2])
        with torch.no_grad():
            teacher(latents, timestep, embeds, lengths, torch.randn(5, 20))
        student(latents, timestep, embeds, lengths).square().mean().backward()

    for given in ((4, 8, 8), (7, 6, 10), (9, 6, 10)):
        step(*given)
    settled = counter.frame_count
    for given in ((5, 10, 6), (8, 4, 12), (6, 12, 4), (12, 8, 8)):
        step(*given)
    assert 0 < settled == counter.frame_count
    assert not counters["graph_break"]
    torch._dynamo.reset()
