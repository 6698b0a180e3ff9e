"""What saves memory or time changes no result: accumulation, checkpointing, compiled blocks, 8-bit AdamW.

Recomputed blocks are compared bit for bit, accumulation to 1e-5, and compiled blocks (slow, 3 minutes) as whole graphs
that are not compiled again. The suite has a stand-in for bitsandbytes.

pytest tests/model/test_numerics.py
"""

import importlib.util
import json
import shutil
import sys
import types

import pytest
import torch

from support.runs import (
    IDENTITY_CONFIG,
    PRUNED_CONFIG,
    as_if_stopped_after,
    read_metrics,
    same_weights,
    weights_of,
)
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.run.build import compile_blocks

FLAGS = ["--max_steps", 6, "--lr", 1e-3, "--batch_size", 4]


# ---- gradient checkpointing ----


def test_blocks_that_are_computed_again_train_the_same_student_bit_for_bit(train, teachers, tmp_path):
    for name, flags in (("kept", []), ("again", ["--gradient_checkpointing"])):
        assert train(teachers.one, PRUNED_CONFIG, *FLAGS, *flags, output_dir=tmp_path / name).code == 0
    assert same_weights(tmp_path / "kept", tmp_path / "again")


# ---- compiled ----


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("torch._inductor"), reason="torch without its compiler")
def test_compiled_blocks_train_the_same_student(train, teachers, tmp_path):
    assert train(teachers.one, PRUNED_CONFIG, *FLAGS, output_dir=tmp_path / "eager").code == 0
    assert train(teachers.one, PRUNED_CONFIG, *FLAGS, "--compile", output_dir=tmp_path / "compiled").code == 0
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


# ---- the optimiser of another library ----


def test_adamw8bit_without_its_library_says_what_to_install(train, teachers, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    outcome = train(teachers.one, PRUNED_CONFIG, *FLAGS, "--optimizer", "adamw8bit")
    assert outcome.code == 2 and "pip install bitsandbytes" in outcome.err and len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


class StandIn(torch.optim.Optimizer):
    """What AdamW8bit is to the trainer: its name and arguments, and a state like its own, with a step that is a plain number
    and moments of bytes, which `state_dict` wraps once more. It moves weights by the sign of the gradient."""

    made_with: dict = {}
    table = torch.linspace(-1, 1, 256)  # one for all, as the library has it

    def __init__(self, parameters, lr: float, betas: tuple[float, float], weight_decay: float):
        StandIn.made_with = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {
                        "step": 0,
                        "state1": torch.zeros(parameter.shape, dtype=torch.uint8),
                    }
                    if parameter.ndim > 1:  # small parameters keep their moments as they are
                        state |= {"absmax1": torch.ones(1), "qmap1": self.table}
                state["step"] += 1
                state["state1"] += (parameter.grad > 0).to(torch.uint8)
                assert isinstance(state["step"], int) and state["state1"].dtype == torch.uint8
                parameter -= group["lr"] * parameter.grad.sign() / (1 + state["state1"] / state["step"])

    def state_dict(self) -> dict:
        inner = super().state_dict()
        return inner | {"state": {key: {"__quantised__": value} for key, value in inner["state"].items()}}


@pytest.fixture
def bitsandbytes(monkeypatch):
    library = types.ModuleType("bitsandbytes.optim")
    library.AdamW8bit = StandIn
    package = types.ModuleType("bitsandbytes")
    package.__spec__ = importlib.util.spec_from_loader("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", library)


def test_adamw8bit_is_made_with_the_runs_settings_and_goes_on_bit_for_bit(train, teachers, bitsandbytes, tmp_path):
    flags = [*FLAGS, "--optimizer", "adamw8bit", "--weight_decay", 0.1, "--save_every", 3]
    assert train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "whole").code == 0
    assert StandIn.made_with == {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    as_if_stopped_after(tmp_path / "stopped", 3)
    outcome = train(teachers.one, PRUNED_CONFIG, *flags, output_dir=tmp_path / "stopped")
    assert outcome.code == 0 and "Resuming from step 3" in outcome.out, outcome.err
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("whole", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
