"""The objective: the squared error of velocities, weighted by noise level, and the feature loss beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wandistiller.device import autocast, to_device
from wandistiller.model.hidden_states import block_outputs
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import sigma_to_timestep, unshift_sigma
from wandistiller.targets.answers import Answer
from wandistiller.training.feature_loss import FeatureLoss

SIGMA_WEIGHTINGS = ("none", "x0", "endpoint")


def sigma_weights(kind: str, sigma: Tensor, shift: float) -> Tensor:
    """Return the weight (B,) of each sample's squared velocity error. It is 1 on average over levels uniform in u.

    Args:
        kind: "none" weighs all levels the same. "x0" is sigma^2 over its mean, which weighs the error of
            x_0 = x_sigma - sigma v. "endpoint" is d sigma / d u, how far a sampling step of uniform u moves at that level, and
            so how much of its error reaches the picture.
    """
    if kind == "x0":
        return sigma.square() / _mean_square_sigma(shift)
    if kind == "endpoint":
        return shift / (1 + (shift - 1) * unshift_sigma(sigma, shift)).square()
    return torch.ones_like(sigma)


def _mean_square_sigma(shift: float) -> float:
    """Return the mean of sigma^2 over u uniform in [0, 1]."""
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    return float((shift * u / (1 + (shift - 1) * u)).square().mean())


@dataclass(frozen=True)
class Loss:
    """What a step minimises and what it reports. All but `total` are detached.

    Attributes:
        total: the sum of `velocity` and `features`.
        velocity: the weighted mean squared velocity error.
        features: what the feature loss adds; 0 for an answer without hidden states.
        by_sample: unweighted mean squared velocity error (B,) of each sample.
        student_velocity: what the student answered (B, C, H, W).
    """

    total: Tensor
    velocity: Tensor
    features: Tensor
    by_sample: Tensor
    student_velocity: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Computes the loss of a student at an answer of the teacher.

    Attributes:
        shift: warp of the noise levels, which the weighting undoes.
        sigma_weighting: a name in `SIGMA_WEIGHTINGS`.
        feature_loss: applied to answers that bring hidden states; None compares velocities only.
        feature_weight: weight of the feature loss at the start. It falls to 0 along a line over the training (TinyFusion's
            schedule). At weight 1 a relative error of hidden states counts as much as the same relative error of the velocity.
        compute_dtype: precision of matrix products.
    """

    shift: float
    sigma_weighting: str = "none"
    feature_loss: FeatureLoss | None = None
    feature_weight: float = 0.0
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __call__(self, student: WanLiteStudent, answer: Answer, progress: float = 0.0) -> Loss:
        """Return the loss at a micro-batch of states; `progress` is how much of the training is done, from 0 to 1."""
        timestep = to_device(sigma_to_timestep(answer.sigma), self.device)
        layers = range(len(answer.features))
        with block_outputs(student, layers) as features:
            velocity = autocast(student, self.device, self.compute_dtype)(
                answer.latents, timestep, answer.prompt_embeds, answer.prompt_lengths
            )
        by_sample = (velocity.float() - answer.velocity.float()).square().flatten(1).mean(dim=1)
        counts = to_device(answer.weights, self.device)
        weights = counts * to_device(sigma_weights(self.sigma_weighting, answer.sigma, self.shift), self.device)
        loss = (weights * by_sample).mean()
        beside = torch.zeros_like(loss)
        if features:
            # In units of the teacher's squared velocity, so that the weight holds for any guidance and any latents.
            units = counts * answer.velocity.float().square().flatten(1).mean(dim=1)
            decay = self.feature_weight * (1 - progress)
            beside = decay * (units * self.feature_loss(features, answer.features)).mean()
        return Loss(loss + beside, loss.detach(), beside.detach(), by_sample.detach(), velocity.detach())


class TrainedStudent(nn.Module):
    """A student with the maps of the feature loss, which are learnt beside it and dropped after training.

    Its forward pass is the loss, so that DistributedDataParallel averages the gradients of both at once.
    """

    def __init__(self, student: WanLiteStudent, objective: Objective):
        super().__init__()
        self.student, self.objective = student, objective
        self.feature_loss = objective.feature_loss

    def forward(self, answer: Answer, progress: float) -> Loss:
        return self.objective(self.student, answer, progress)

    @property
    def has_idle_parts(self) -> bool:
        """Whether some parameters get no gradient from an answer without hidden states."""
        return self.feature_loss is not None and any(True for _ in self.feature_loss.parameters())
