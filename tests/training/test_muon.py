"""Muon moves the matrices of the student's blocks as torch's own does, and AdamW the rest, under one learning rate.

In bfloat16 the updates are torch.optim.Muon's bit for bit; in float32 they are those of singular values worked out by an SVD.
Processes share its work out. That a run with it resumes bit for bit is in test_checkpoints.py, and that processes take the steps of
one in test_distributed.py.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from support.processes import fork
from support.runs import PRUNED_CONFIG
from support.torchrun import free_port
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.budget.workload import Workload, step_flops
from wandistiller.processes import Processes, fill, full_tensor, leave
from wandistiller.training.objective import FeatureLoss, Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions, make_optimizers

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
    optimizers = make_optimizers(ours, OPTIONS, "cpu", torch.bfloat16)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for each in (*optimizers, *both):
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
    make_optimizers(model, OPTIONS, "cpu")[0].step()
    size = 0.2 * math.sqrt(max(shape))  # that of AdamW's updates, by arXiv 2502.16982
    expected = (1 - 0.02 * 0.1) * start - 0.02 * size * u @ torch.diag(values) @ v
    torch.testing.assert_close(model.blocks[0].weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_matrix_without_a_gradient_stays_and_one_of_zeros_breaks_nothing():
    trained = make_trained(PRUNED_CONFIG)
    (optimizer, _), before = make_optimizers(trained, OPTIONS, "cpu"), copy_of(trained)
    first, second = (block.attn1.to_q.weight for block in trained.student.blocks)
    first.grad = torch.zeros_like(first)
    optimizer.step()
    assert torch.equal(second, before["student.blocks.1.attn1.to_q.weight"])
    torch.testing.assert_close(first, (1 - 0.02 * 0.1) * before["student.blocks.0.attn1.to_q.weight"])


def test_every_weight_is_in_one_group():
    trained = make_trained(PRUNED_CONFIG)
    groups = [group for optimizer in make_optimizers(trained, OPTIONS, "cpu") for group in optimizer.param_groups]
    in_groups = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(in_groups) == sorted(map(id, trained.parameters()))


def move_shared_out(rank: int, count: int, port: int, is_sharded: bool, out: Path) -> None:
    """Take three steps as one of some processes; the first one keeps the weights and the FLOPs of its last step."""
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    trained = make_trained(PRUNED_CONFIG)
    if is_sharded:
        for model in (trained.student, trained.objective.feature_loss):
            Processes("cpu", rank, count).shard(model)
    optimizers = make_optimizers(trained, OPTIONS, "cpu")
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for weight in trained.parameters():
            weight.grad = torch.empty_like(weight)
            fill(weight.grad, torch.randn(weight.shape, generator=generator))
        with FlopCounterMode(display=False) as flops:
            for optimizer in optimizers:
                optimizer.step()
    weights = {name: full_tensor(weight.detach()) for name, weight in trained.named_parameters()}
    if rank == 0:
        torch.save({"weights": weights, "flops": flops.get_total_flops()}, out)
    leave()


@pytest.mark.parametrize(("count", "is_sharded"), [(2, False), (2, True), (4, False), (4, True)])
def test_processes_share_out_the_matrices_and_move_all_weights_as_one_does(tmp_path, count, is_sharded):
    move_shared_out(0, 1, 0, False, tmp_path / "one")
    port = free_port()
    processes = [fork(move_shared_out, rank, count, port, is_sharded, tmp_path / "many") for rank in range(count)]
    for process in processes:
        process.join()
    one, many = (torch.load(tmp_path / name) for name in ("one", "many"))
    for name, weight in one["weights"].items():  # a shard ends elsewhere, where the CPU rounds otherwise
        torch.testing.assert_close(many["weights"][name], weight, rtol=0, atol=1e-6 if is_sharded else 0)
    # Both blocks have eight matrices of one shape, and two of another, wide and tall.
    assert many["flops"] * count == one["flops"]
    config = StudentConfig(**PRUNED_CONFIG)
    work = Workload(teacher=config, student=config, latent_size=8, optimizer="muon", num_processes=count)
    assert many["flops"] == step_flops(work).orthogonalization
