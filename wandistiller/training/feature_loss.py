"""Hidden states of the student's blocks held against those of the teacher's, beside the velocities."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MASK_STDS = 2.0  # hidden states further than this from their mean are left out


def span_ends(layers: Sequence[int], teacher_depth: int) -> list[int]:
    """The teacher layer after which each student block's output should look the same: the last of the span it replaces.

    Block i starts from layer layers[i] and stands for all up to the next kept one (VainF/TinyFusion:train_masked_kd.py
    supervises block i of every second kept by layer 2 i + 1).
    """
    return [following - 1 for following in [*layers[1:], teacher_depth]]


class FeatureLoss(nn.Module):
    """Relative squared error of each sample's hidden states: 1 is as far off as answering zero, averaged over the layers.

    Entries of the teacher that lie beyond MASK_STDS standard deviations of their sample are masked: a plain error of a
    diffusion transformer's hidden states follows a few massive activations and diverges (TinyFusion, arXiv 2412.01199,
    table 5). Each layer is divided by the teacher's second moment, so that all weigh alike; sample by sample, so
    that a batch may be shared out over processes and passes.

    Args:
        channels: the teacher's residual channels that the student's are, (student width,); None where they are not a part
            of them: then a linear map is learnt with the student, and thrown away after training.
    """

    def __init__(self, student_width: int, teacher_width: int, num_layers: int, channels: Sequence[int] | None):
        super().__init__()
        self.register_buffer("channels", None if channels is None else torch.tensor(channels), persistent=False)
        self.maps = nn.ModuleList()
        if channels is None:
            self.maps.extend(nn.Linear(student_width, teacher_width) for _ in range(num_layers))

    def forward(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
        """The mean over layers (B,), of features (B, L, D) in the order of the student's blocks."""
        losses = []
        for index, (ours, theirs) in enumerate(zip(student_features, teacher_features, strict=True)):
            ours = self.maps[index](ours) if self.maps else ours
            theirs = theirs if self.channels is None else theirs[..., self.channels]
            losses.append(masked_relative_error(ours.float(), theirs.float()))
        return torch.stack(losses).mean(dim=0)


def masked_relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """mean(m (a - e)^2) / mean(m e^2) of every sample (B,), with m = |e - mean| < MASK_STDS std over all else."""
    flat = expected.flatten(1)
    mean, std = flat.mean(dim=1), flat.std(dim=1)
    view = (-1,) + (1,) * (expected.ndim - 1)
    mask = (expected - mean.view(view)).abs() < MASK_STDS * std.view(view)
    scale = (expected.square() * mask).flatten(1).sum(dim=1)
    error = ((actual - expected).square() * mask).flatten(1).sum(dim=1)
    return error / scale.clamp(min=torch.finfo(scale.dtype).tiny)
