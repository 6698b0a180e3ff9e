"""The teacher of a few-step student: a student that has learnt the velocity, asked for its average velocity over whole segments.

At a noise level that a segment starts at, the few-step student should answer (x_end - x_start) / (sigma_end - sigma_start), so that
one Euler step lands on the end of the segment (progressive distillation, arXiv 2202.00512). The segments are walked by the frozen
student, without guidance, at a small part of the cost of a call of the teacher.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import sigma_to_timestep


class SegmentTeacher:
    """Average velocities of a frozen student, in place of a `Teacher` of few noise levels.

    Args:
        student: the velocity field, which is not changed.
        grids: noise levels (num_segments, steps of a segment + 1) of the steps that the field takes through each segment.
        is_euler: whether all steps are Euler's, as those of a field that knows no noise levels but these; else those after the
            first are Adams and Bashforth's of order two, which cost the same and end nearer to the exact path.
    """

    def __init__(
        self,
        student: WanLiteStudent,
        grids: Tensor,
        is_euler: bool = False,
    ):
        self.student, self.grids, self.is_euler = student, grids, is_euler

    @torch.no_grad()
    def velocity_and_features(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor, layers: Sequence[int] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the average velocity (B, C, H, W) over the segment that begins at each sample's level (B,), and no hidden states."""
        grid = to_device(self.grids[(sigma[:, None] - self.grids[:, 0]).abs().argmin(dim=1)], latents.device)
        steps = grid.diff(dim=1)[..., None, None, None]  # (B, steps of a segment, 1, 1, 1)
        x, before = latents.float(), None
        for number in range(steps.shape[1]):
            velocity = self.student(x, sigma_to_timestep(grid[:, number]), prompt_embeds, prompt_lengths).float()
            slope = torch.zeros_like(velocity)
            if before is not None and not self.is_euler:
                slope = steps[:, number] / (2 * steps[:, number - 1]) * (velocity - before)
            x = x + steps[:, number] * (velocity + slope)
            before = velocity
        return (x - latents) / steps.sum(dim=1), ()
