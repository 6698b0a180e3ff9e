"""Ridge regression of linear layers from sums over batches, in float64, towards the weights that the layers have.

A layer y = W x + b is fitted to targets t by min |t - W x - b|^2 + penalty |W - W_0|^2. The sums X X' and X T' are all that
is kept of the data, so their size does not depend on how many batches were seen.
"""

import torch
from torch import Tensor

LEAST_PENALTY = 1e-30  # it keeps W_0 if every input was zero
BIAS_PENALTY = 1e-9  # relative to the number of rows: a bias is free, unless nothing says what it should be
CHUNK_BYTES = 2**28  # normal equations of this size are solved at once


class LinearFit:
    """The sums that fit one linear layer.

    The last row and column of `inputs` belong to a constant 1 behind the layer's inputs, whose weight is the bias.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: str | torch.device = "cpu"):
        size = num_inputs + 1
        self.inputs = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.targets = torch.zeros(size, num_outputs, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add rows: inputs (..., K) and what the layer should answer there (..., M)."""
        rows = with_one(inputs)
        self.inputs += rows.T @ rows
        self.targets += rows.T @ targets.flatten(0, -2).double()

    def solve(self, weight: Tensor, bias: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Return the fitted weight (M, K) and bias (M,).

        Args:
            weight, bias: what the penalty pulls towards.
            ridge: the penalty, relative to the mean square of an input summed over the rows.
        """
        penalty = _penalty(self.inputs.diagonal(), ridge)
        prior = torch.cat([weight, bias[:, None]], dim=1).double()
        right = self.targets + penalty[:, None] * prior.T
        solution = torch.cholesky_solve(right, torch.linalg.cholesky(self.inputs + penalty.diag())).T
        return _split(solution, weight, bias)


class GatedFit:
    """The sums that fit a linear layer whose outputs are gated: t = g(sigma) * (W x + b), with a gate for each output.

    A gate depends on the noise level alone, so one pair of sums for each level is enough for every output: row i of the
    layer solves (sum_s g_i(s)^2 H_s + penalty) w_i = sum_s g_i(s) B_si + penalty w_0i.
    """

    def __init__(self, num_levels: int, num_inputs: int, num_outputs: int, device: str | torch.device = "cpu"):
        size = num_inputs + 1
        self.inputs = torch.zeros(num_levels, size, size, dtype=torch.float64, device=device)
        self.targets = torch.zeros(num_levels, size, num_outputs, dtype=torch.float64, device=device)

    def add(self, level: int, inputs: Tensor, targets: Tensor) -> None:
        """Add rows of one noise level: inputs (..., K) and what the gated layer should answer there (..., M)."""
        rows = with_one(inputs)
        self.inputs[level] += rows.T @ rows
        self.targets[level] += rows.T @ targets.flatten(0, -2).double()

    def solve(self, gates: Tensor, weight: Tensor, bias: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Return the fitted weight (M, K) and bias (M,), as `LinearFit.solve` does; gates (levels, M)."""
        gates = gates.double()
        prior = torch.cat([weight, bias[:, None]], dim=1).double()
        size = self.inputs.shape[-1]
        solutions = []
        for outputs in torch.arange(len(weight), device=gates.device).split(max(1, CHUNK_BYTES // (8 * size**2))):
            part = gates[:, outputs]
            left = (part.square().T @ self.inputs.flatten(1)).unflatten(1, (size, size))  # (outputs, K + 1, K + 1)
            penalty = _penalty(left.diagonal(dim1=1, dim2=2), ridge)
            right = torch.einsum("sm,skm->mk", part, self.targets[:, :, outputs]) + penalty * prior[outputs]
            left.diagonal(dim1=1, dim2=2).add_(penalty)
            solutions.append(torch.cholesky_solve(right[..., None], torch.linalg.cholesky(left))[..., 0])
        return _split(torch.cat(solutions), weight, bias)


def with_one(inputs: Tensor) -> Tensor:
    """Return rows (N, K + 1) in float64 of inputs (..., K), with a constant 1 behind them."""
    rows = inputs.flatten(0, -2).double()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _penalty(diagonal: Tensor, ridge: float) -> Tensor:
    """Return the penalty of each input (..., K) and of the bias, from the diagonal of their sums (..., K + 1)."""
    weights, bias = diagonal[..., :-1], diagonal[..., -1:]
    mean = weights.mean(dim=-1, keepdim=True)
    return torch.cat([(ridge * mean).expand_as(weights), BIAS_PENALTY * bias], dim=-1).clamp(min=LEAST_PENALTY)


def _split(solution: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return solution[:, :-1].to(weight), solution[:, -1].to(bias)
