"""The feature loss: how far the hidden states of the student's blocks are from those of the teacher's."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MASK_STDS = 2.0  # hidden states that lie more standard deviations than this from their mean are left out


def span_ends(layers: Sequence[int], teacher_depth: int) -> list[int]:
    """Return the teacher layer whose output each student block should reproduce: the last layer of the span it replaces.

    Block i starts from layer layers[i] and stands for all layers up to the next kept one. (VainF/TinyFusion:train_masked_kd.py
    keeps every second layer, and supervises block i by layer 2 i + 1.)
    """
    return [following - 1 for following in [*layers[1:], teacher_depth]]


class FeatureLoss(nn.Module):
    """Relative squared error of each sample's hidden states, averaged over the layers. It is 1 for a student that answers zero.

    Entries of the teacher that lie beyond MASK_STDS standard deviations of their sample are masked. Without the mask the error
    of a diffusion transformer's hidden states follows a few massive activations and diverges (TinyFusion, arXiv 2412.01199,
    table 5). The error of each layer is divided by the teacher's second moment, so that all layers weigh the same. Both are
    taken sample by sample, so that the loss does not depend on how a batch is shared out over processes and micro-batches.

    The teacher's hidden states come with the channels that the student was cut from. A linear map between the two, which starts as
    the identity, is learnt beside the student for each layer, and dropped after training.
    """

    def __init__(self, width: int, num_layers: int):
        super().__init__()
        maps = [nn.Linear(width, width) for _ in range(num_layers)]
        for linear in maps:
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.maps = nn.ModuleList(maps)

    def forward(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
        """Return the mean error over layers (B,) of features (B, L, D), which are in the order of the student's blocks."""
        losses = []
        for index, (ours, theirs) in enumerate(zip(student_features, teacher_features, strict=True)):
            losses.append(masked_relative_error(self.maps[index](ours).float(), theirs.float()))
        return torch.stack(losses).mean(dim=0)


def masked_relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Return mean(m (a - e)^2) / mean(m e^2) of every sample (B,), where m = |e - mean| < MASK_STDS std.

    Mean and standard deviation are those of the sample's expected values.
    """
    flat = expected.flatten(1)
    mean, std = flat.mean(dim=1), flat.std(dim=1)
    view = (-1,) + (1,) * (expected.ndim - 1)
    mask = (expected - mean.view(view)).abs() < MASK_STDS * std.view(view)
    scale = (expected.square() * mask).flatten(1).sum(dim=1)
    error = ((actual - expected).square() * mask).flatten(1).sum(dim=1)
    return error / scale.clamp(min=torch.finfo(scale.dtype).tiny)
