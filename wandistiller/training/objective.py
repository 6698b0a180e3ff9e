"""The objective: the squared error of velocities, and the feature loss beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wandistiller.device import autocast, to_device
from wandistiller.model.transformer import WanLiteStudent, block_outputs
from wandistiller.sampling.flow import sigma_to_timestep
from wandistiller.training.feature_loss import FeatureLoss
from wandistiller.walk.batches import Batch


@dataclass(frozen=True)
class Loss:
    """What a step minimises and what it reports. All but `total` are detached.

    Attributes:
        total: the sum of `velocity` and `features`.
        velocity: the mean of `by_sample`.
        features: what the feature loss adds; 0 for a batch without hidden states.
        by_sample: squared velocity error (B,) of each sample, relative to its target's mean square: 1 for a student that answers 0.
    """

    total: Tensor
    velocity: Tensor
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
        return Loss(loss + beside, loss.detach(), beside.detach(), by_sample.detach())


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

    @property
    def has_idle_parts(self) -> bool:
        """Whether some parameters get no gradient from a batch without hidden states."""
        return self.feature_loss is not None and any(True for _ in self.feature_loss.parameters())
