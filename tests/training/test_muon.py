"""Muon moves the matrices of the student's blocks as torch's own does, and AdamW the rest, under one learning rate.

In bfloat16 the updates are torch.optim.Muon's bit for bit; in float32 they are those of singular values worked out by an SVD.
That a run with it resumes bit for bit is in test_checkpoints.py, and that processes take the steps of one in test_distributed.py.

pytest tests/training/test_muon.py
"""

import math

import pytest
import torch
from torch import nn

from support.runs import PRUNED_CONFIG
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.training.feature_loss import FeatureLoss
from wandistiller.training.objective import Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions, make_optimizer

LITE_CONFIG = PRUNED_CONFIG | {"block": "lite", "hidden_size": 16, "ffn_dim": 64, "freq_dim": 16, "patch_size": 1}
OPTIONS = OptimizationOptions(lr=0.02, optimizer="muon", weight_decay=0.1)
ATTENTION = [f"{name}.{part}.weight" for name in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")]
MATRICES = {
    "wan": [*ATTENTION, "ffn.net.0.proj.weight", "ffn.net.2.weight"],
    "lite": ["attn.in_proj_weight", "attn.out_proj.weight", "mlp.0.weight", "mlp.2.weight"],
}


def make_trained(config: dict) -> TrainedStudent:
    """A student with the maps of its feature loss, which are matrices too."""
    torch.manual_seed(0)
    student = WanLiteStudent(StudentConfig.from_dict(config))
    feature_loss = FeatureLoss(config["hidden_size"], config["depth"])
    return TrainedStudent(student, Objective(feature_loss=feature_loss))


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def set_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize("config", [PRUNED_CONFIG, LITE_CONFIG], ids=["wan", "lite"])
def test_matrices_of_blocks_move_as_torchs_muon_moves_them_and_all_else_as_adamw_does(config):
    ours, theirs = make_trained(config), make_trained(config)
    matrices = [f"student.blocks.{block}.{name}" for block in range(2) for name in MATRICES[config["block"]]]
    named = dict(theirs.named_parameters())
    others = [weight for name, weight in named.items() if name not in matrices]
    assert len(others) + len(matrices) == len(named) and any(weight.ndim == 2 for weight in others)
    both = [
        torch.optim.Muon([named[name] for name in matrices], 0.02, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, 0.02, betas=OPTIONS.betas, weight_decay=0.1, fused=True),
    ]
    optimizer = make_optimizer(ours, OPTIONS, "cpu", torch.bfloat16)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for each in (optimizer, *both):
            each.step()
    start, moved = copy_of(make_trained(config)), copy_of(theirs)
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, moved[name]) and not torch.equal(weight, start[name]), name


@pytest.mark.parametrize("shape", [(8, 8), (6, 15), (15, 6)], ids=["square", "wide", "tall"])
def test_an_update_in_float32_is_the_gradient_with_its_singular_values_brought_near_1(shape):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(shape[1], shape[0])])
    start = copy_of(model)["blocks.0.weight"].double()
    set_gradients(model, 1)
    u, values, v = torch.linalg.svd(model.blocks[0].weight.grad.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    make_optimizer(model, OPTIONS, "cpu").step()
    size = 0.2 * math.sqrt(max(shape))  # that of AdamW's updates, by arXiv 2502.16982
    expected = (1 - 0.02 * 0.1) * start - 0.02 * size * u @ torch.diag(values) @ v
    torch.testing.assert_close(model.blocks[0].weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_matrix_without_a_gradient_stays_and_one_of_zeros_breaks_nothing():
    trained = make_trained(PRUNED_CONFIG)
    optimizer, before = make_optimizer(trained, OPTIONS, "cpu"), copy_of(trained)
    first, second = (block.attn1.to_q.weight for block in trained.student.blocks)
    first.grad = torch.zeros_like(first)
    optimizer.step()
    assert torch.equal(second, before["student.blocks.1.attn1.to_q.weight"])
    torch.testing.assert_close(first, (1 - 0.02 * 0.1) * before["student.blocks.0.attn1.to_q.weight"])


def test_every_weight_is_in_one_group():
    trained = make_trained(PRUNED_CONFIG)
    optimizer = make_optimizer(trained, OPTIONS, "cpu")
    in_groups = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(in_groups) == sorted(map(id, trained.parameters()))
    set_gradients(trained, 0)
    optimizer.zero_grad(set_to_none=True)
    assert all(weight.grad is None for weight in trained.parameters())
