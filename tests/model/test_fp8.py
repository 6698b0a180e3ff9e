"""Weights kept as fp8 stand for the float32 weights that they were made of.

The oracles are torch's own cast, products in float64, and diffusers' velocities; the memory that the weights take is
counted in bytes.
"""

import copy

import pytest
import torch
from torch import nn

from support.measures import LiveBytes
from support.wan_folders import inputs, oracle_velocity, relative_error, write_pipeline_folder, write_single_file
from wandistiller import WanLiteStudent
from wandistiller.model.fp8 import FP8, Fp8Linear, fp8_linears, quantise, to_fp8
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.wan.layouts import open_wan_files

# Rounding to three bits of mantissa errs by at most 1/16 of a value, evenly spread by about 1/28 (root mean square); a
# velocity is far off that only where something is wrong.
VELOCITY_BOUND = 0.08


def seeded(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(weight: torch.Tensor) -> Fp8Linear:
    out_features, in_features = weight.shape
    layer = Fp8Linear(in_features, out_features, nn.Parameter(seeded(out_features, seed=9)))
    layer.store(weight)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_of_any_size_uses_all_of_the_range(size, dtype):
    weight = (size * seeded(64, 48)).to(dtype)
    rounded, scale = quantise(weight)
    assert rounded.dtype == FP8 and rounded.float().abs().max() == torch.finfo(FP8).max
    assert scale == pytest.approx(float(weight.float().abs().max()) / 448, rel=1e-6)
    held = rounded.float() * scale
    is_normal = weight.float().abs() > scale * 2**-6  # below it e4m3 has fewer bits
    error = (held - weight.float()).abs()
    assert (error[is_normal] <= weight.float().abs()[is_normal] / 16 * 1.001).all()
    assert (error <= weight.float().abs().max() / 16).all()


def test_what_is_fp8_times_a_scale_keeps_its_values():
    for scale in (1.0, 0.00123, 2.0**-9, 37.0):
        stored = (100 * seeded(32, 32)).clamp(-448, 448).to(FP8)
        stored[0, 0] = 448.0  # as a file with one scale per tensor has it
        again, found = quantise(stored.float() * scale)
        assert torch.equal(again.float(), stored.float())
        assert found == pytest.approx(scale, rel=1e-6)


def test_plain_fp8_without_a_scale_keeps_its_values_wherever_its_largest_lies():
    stored = (0.02 * seeded(32, 32)).to(FP8)
    again, scale = quantise(stored.float())
    assert torch.equal(again.float(), stored.float()) and scale == 1.0


def test_a_weight_of_zeros_and_a_broken_one():
    assert quantise(torch.zeros(3, 3))[1] == 1.0
    for broken in (float("nan"), float("inf")):
        weight = torch.ones(3, 3)
        weight[1, 1] = broken
        layer = make_layer(weight)
        assert not layer(torch.ones(1, 3)).isfinite().all(), "a broken weight must not pass as a number"


def test_a_layer_is_the_product_with_the_weight_that_it_holds_on_any_device_and_as_a_copy():
    layer = make_layer(0.02 * seeded(32, 48))
    x = seeded(2, 5, 48, seed=3)
    expected = x.double() @ (layer.weight.double() * layer.scale).t() + layer.bias.double()
    for same in (layer, layer.to("cpu"), copy.deepcopy(layer)):
        torch.testing.assert_close(same(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_under_autocast_the_scale_costs_no_further_rounding():
    layer = make_layer(0.02 * seeded(64, 256))
    linear = nn.Linear(256, 64).requires_grad_(False)
    linear.weight.data, linear.bias.data = layer.weight.float() * layer.scale, layer.bias.data
    x = seeded(4, 7, 256, seed=3)
    expected = linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual, plain = layer(x), linear(x)
    assert actual.dtype == plain.dtype == torch.bfloat16
    assert relative_error(actual, expected) <= 1.1 * relative_error(plain, expected)


def teacher_of(folder, *, fp8: bool, dtype=torch.float32) -> WanLiteStudent:
    return project_teacher(folder, dtype=dtype, fp8=fp8)[0].requires_grad_(False)


def test_the_velocity_of_an_fp8_teacher_is_that_of_diffusers_within_the_rounding(tmp_path):
    (transformer,) = write_pipeline_folder(tmp_path, heads=4, head_dim=16, ffn_dim=160)
    expected = oracle_velocity(transformer, *inputs())
    teacher = teacher_of(tmp_path, fp8=True)
    error = relative_error(teacher(*inputs()), expected)
    assert 1e-3 < error < VELOCITY_BOUND, "neither lossless (nothing was rounded) nor far off"
    assert error == pytest.approx(relative_error(to_fp8(teacher_of(tmp_path, fp8=False))(*inputs()), expected))


def test_block_weights_take_a_byte_each_and_the_rest_keeps_its_precision(tmp_path):
    write_pipeline_folder(tmp_path)
    teacher, report = project_teacher(tmp_path, dtype=torch.bfloat16, fp8=True)
    stored = fp8_linears(teacher)
    assert len(stored) == 3 * 10 and all(name.startswith("blocks.") for name in stored)
    names = {name for name, tensor in teacher.named_parameters() if tensor.ndim == 2 and name.startswith("blocks.")}
    assert names == set(stored)
    for layer in stored.values():
        weight = layer.weight
        assert weight.untyped_storage().nbytes() == weight.numel() and not weight.requires_grad
    plain = project_teacher(tmp_path, dtype=torch.bfloat16)[0].state_dict()
    for name, tensor in teacher.named_parameters():
        assert name in stored or (tensor.dtype == plain[name].dtype and torch.equal(tensor, plain[name])), name
    assert report.student["blocks.0.attn1.to_q.weight"]["detail"] == "24x24, rounded to float8_e4m3fn"
    assert report.num_parameters["exact"] == sum(tensor.numel() for tensor in plain.values())


def test_no_more_than_a_few_weights_are_in_a_larger_precision_while_a_teacher_is_read(tmp_path):
    write_pipeline_folder(tmp_path, heads=4, head_dim=16, ffn_dim=160, layers=12)
    peaks = {}
    for fp8 in (False, True):
        with LiveBytes() as live:
            teacher, _ = project_teacher(tmp_path, fp8=fp8)
        peaks[fp8] = live.peak - sum(weight.nbytes for weight in teacher.parameters())
    largest = 4 * 160 * 64
    in_fp32 = sum(4 * layer.weight.numel() for layer in fp8_linears(teacher).values())
    assert peaks[True] < peaks[False] + 4 * largest < in_fp32 / 4


@pytest.mark.parametrize("fp8", ["plain", "scaled", "comfy_quant"])
def test_a_checkpoint_that_is_fp8_on_disk_is_kept_as_it_is(tmp_path, fp8):
    path = tmp_path / "wan.safetensors"
    model = write_single_file(path, fp8=fp8, heads=1, ffn_dim=48)
    held = model.state_dict()
    teacher = project_experts(open_wan_files(path), 512, fp8=True)["high"]
    for name, layer in fp8_linears(teacher).items():
        torch.testing.assert_close(layer.weight.float() * layer.scale, held[name], rtol=1e-6, atol=0)
    velocity = teacher.requires_grad_(False)(*inputs())
    assert relative_error(velocity, oracle_velocity(model, *inputs())) <= 1e-5
