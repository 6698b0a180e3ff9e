"""Linear layers whose large products are oneDNN's give the answers and gradients of torch's own.

All other products, and everything that saves or copies such a layer, must not notice the difference.

pytest tests/model/test_layers.py
"""

import copy

import pytest
import torch
from torch import nn

from wandistiller.model import layers
from wandistiller.model.layers import MIN_WEIGHTS_FOR_ONEDNN, Linear

SHAPES = [(1024, 1024), (1536, 700), (700, 1536)]  # in, out; more than MIN_WEIGHTS_FOR_ONEDNN each
INPUTS = [(5,), (2, 7), (3, 4, 5)]  # rows


def pair(in_features: int, out_features: int) -> tuple[Linear, nn.Linear]:
    """Ours, and torch's in double precision with the same weights."""
    torch.manual_seed(0)
    ours = Linear(in_features, out_features)
    theirs = nn.Linear(in_features, out_features, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture
def products(monkeypatch) -> list[tuple]:
    """Shapes of the products that oneDNN was given."""
    seen, product = [], layers.onednn_product

    def watched(x, weight, bias=None):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return product(x, weight, bias)

    monkeypatch.setattr(layers, "onednn_product", watched)
    return seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", INPUTS)
def test_answers_and_gradients_are_those_of_torch(shape, rows, products):
    ours, theirs = pair(*shape)
    x = torch.randn(*rows, shape[0], requires_grad=True)
    x_double = x.detach().double().requires_grad_()
    weights = torch.randn(*rows, shape[1])
    (ours(x) * weights).sum().backward()
    (theirs(x_double) * weights).sum().backward()
    torch.testing.assert_close(ours(x).double(), theirs(x_double), rtol=1e-5, atol=1e-5)
    for mine, right in ((x, x_double), (ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        torch.testing.assert_close(mine.grad.double(), right.grad, rtol=1e-4, atol=1e-4)
    assert bool(products) == layers.HAS_MKL_AND_ONEDNN


def test_only_what_asks_for_a_gradient_gets_one(products):
    ours, _ = pair(1024, 1024)
    ours.weight.requires_grad_(False)
    x = torch.randn(4, 1024, requires_grad=True)
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is not None and x.grad is not None
    assert len(products) in (0, 2)  # forward, and the gradient of x
    with torch.no_grad():
        assert not ours(x).requires_grad


@pytest.mark.parametrize("case", ["small", "bf16", "autocast", "meta"])
def test_all_other_products_are_left_to_torch(case, products):
    size = 64 if case == "small" else 1024
    assert (size * size < MIN_WEIGHTS_FOR_ONEDNN) == (case == "small")
    layer, x = Linear(size, size), torch.randn(3, size)
    if case == "bf16":
        layer, x = layer.bfloat16(), x.bfloat16()
    if case == "meta":
        layer, x = layer.to("meta"), x.to("meta")
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        layer(x)
    assert not products


def test_a_layer_is_a_plain_one_to_whoever_saves_or_copies_it():
    ours, _ = pair(1024, 1024)
    assert isinstance(ours, nn.Linear) and list(ours.state_dict()) == ["weight", "bias"]
    x = torch.randn(3, 1024)
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))
