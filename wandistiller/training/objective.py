"""The objective: the squared error of velocities, and beside it how far the hidden states of the student's blocks are from the teacher's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wandistiller.device import autocast, to_device
from wandistiller.model.transformer import WanLiteStudent, block_outputs
from wandistiller.sampling.flow import sigma_to_timestep
from wandistiller.walk.batches import Batch

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


@dataclass(frozen=True)
class Loss:
    """What a step minimises and what it reports. All but `total` are detached.

    Attributes:
        total: the mean of `by_sample`, and `features`.
        features: what the feature loss adds; 0 for a batch without hidden states.
        by_sample: squared velocity error (B,) of each sample, relative to its target's mean square: 1 for a student that answers 0.
    """

    total: Tensor
    features: Tensor
    by_sample: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Computes the loss of a student at a batch of the teacher's answers.

    Attributes:
        feature_loss: applied to batches that bring hidden states; None compares velocities only.
        feature_weight: weight of the feature loss at the start. It falls to 0 along a line over the training (TinyFusion's
            schedule). Both losses are relative, so that the weight holds for any guidance and any latents.
        compute_dtype: precision of matrix products.
    """

    feature_loss: FeatureLoss | None = None
    feature_weight: float = 0.0
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __call__(self, student: WanLiteStudent, batch: Batch, progress: float = 0.0) -> Loss:
        """Return the loss at a micro-batch; `progress` is how much of the training is done, from 0 to 1."""
        timestep = to_device(sigma_to_timestep(batch.sigma), self.device)
        with block_outputs(student, range(len(batch.features))) as features:
            velocity = autocast(student, self.device, self.compute_dtype)(
                batch.latents, timestep, batch.prompt_embeds, batch.prompt_lengths
            )
        target = batch.velocity.float()
        squares = (velocity.float() - target).square(), target.square()
        error, scale = (square.flatten(1).mean(dim=1) for square in squares)
        by_sample = error / scale.clamp(min=torch.finfo(scale.dtype).tiny)
        loss = by_sample.mean()
        beside = torch.zeros_like(loss)
        if features:
            beside = self.feature_weight * (1 - progress) * self.feature_loss(features, batch.features).mean()
        return Loss(loss + beside, beside.detach(), by_sample.detach())


class TrainedStudent(nn.Module):
    """A student with the maps of the feature loss, which are learnt beside it and dropped after training.

    Its forward pass is the loss, so that DistributedDataParallel averages the gradients of both at once.
    """

    def __init__(self, student: WanLiteStudent, objective: Objective):
        super().__init__()
        self.student, self.objective = student, objective
        self.feature_loss = objective.feature_loss

    def forward(self, batch: Batch, progress: float) -> Loss:
        return self.objective(self.student, batch, progress)
