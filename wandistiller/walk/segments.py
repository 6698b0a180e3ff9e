"""What a few-step student learns from: average velocities over whole segments of sampling paths.

At a noise level that a segment starts at, the few-step student should answer (x_end - x_start) / (sigma_end - sigma_start), so that
one Euler step lands on the end of the segment (progressive distillation, arXiv 2202.00512). The segments are those that the teacher's
own paths have passed while the student learnt the velocity, which are right and cost no calls, but are few; and those that a
frozen copy of the student walks, without guidance, which are without end, but share the student's errors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.sampling.sampler import VelocityField


class PassedSegments:
    """The segments of paths of a walk, each put together from the steps that have passed it.

    A step is a straight line in sigma, so that the latents at an end that lies inside of it are on the line too. A path counts
    from sigma 1 on: one that began with a jump has no segments.

    Args:
        ends: noise levels (num_segments + 1,) from 1 down to 0.
        shape: slots, paths of a slot, and the shape of latents.
    """

    def __init__(self, ends: Sequence[float], shape: Sequence[int], device: str):
        self.ends = torch.tensor(ends)
        self.starts = torch.zeros(*shape, device=device)  # the latents at the last end that each path has passed,
        self.passed = torch.full(tuple(shape[:2]), -1)  # and the number of that end

    def begin(self, row: int, path: int, noise: Tensor | None) -> None:
        """Follow a path from its noise (C, H, W); without it the path is left out."""
        self.passed[row, path] = -1 if noise is None else 0
        if noise is not None:
            self.starts[row, path] = noise

    def step(
        self,
        where: tuple[Tensor, Tensor],
        prompts: Tensor,
        latents: Tensor,
        sigma: Tensor,
        end: Tensor,
        velocity: Tensor,
    ) -> list[dict[str, Tensor]]:
        """Follow a step of a path of some slots, from latents (B, C, H, W) at sigma (B,) to the noise level `end` (B,).

        Args:
            where: slots and paths, (B,) each.

        Returns:
            The segments that were passed, as answers that a `Store` keeps: latents at their start, sigma there, prompts, average
            velocity, and rows. No slot is twice in one of them.
        """
        found = []
        for number in range(1, len(self.ends)):
            level, start = self.ends[number], self.ends[number - 1]
            is_passed = (self.passed[where] == number - 1) & (end <= level)
            if not is_passed.any():
                continue
            rows, paths = (values[is_passed] for values in where)
            there = to_device(is_passed.nonzero()[:, 0], latents.device)
            slots = to_device(rows, latents.device), to_device(paths, latents.device)
            along = to_device(level - sigma[is_passed], latents.device)[:, None, None, None]
            at_end, at_start = latents[there] + along * velocity[there], self.starts[slots]
            found.append(
                {
                    "latents": at_start,
                    "sigma": start.expand(len(rows)),
                    "prompts": prompts[is_passed],
                    "velocity": (at_end - at_start) / float(level - start),
                    "rows": rows,
                }
            )
            self.starts[slots] = at_end
            self.passed[rows, paths] = number
        return found


class SegmentTeacher:
    """Average velocities of a teacher or of a frozen student, in place of a `Teacher` of few noise levels.

    Args:
        grids: noise levels (num_segments, steps of a segment + 1) of the steps that the field takes through each segment.
        is_euler: whether all steps are Euler's, as those of a field that knows no noise levels but these; else those after the
            first are Adams and Bashforth's of order two, which cost the same and end nearer to the exact path.
    """

    def __init__(self, field: VelocityField, grids: Tensor, is_euler: bool = False):
        self.field, self.grids, self.is_euler = field, grids, is_euler

    @torch.no_grad()
    def velocity_and_features(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor, layers: Sequence[int] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the average velocity (B, C, H, W) over the segment that begins at each sample's level (B,), and no hidden states."""
        levels = self.grids[(sigma[:, None] - self.grids[:, 0]).abs().argmin(dim=1)]
        steps = to_device(levels, latents.device).diff(dim=1)[..., None, None, None]  # (B, steps of a segment, 1, 1, 1)
        x, before = latents.float(), None
        for number in range(steps.shape[1]):
            velocity = self.field.velocity(x, levels[:, number], prompt_embeds, prompt_lengths).float()
            slope = torch.zeros_like(velocity)
            if before is not None and not self.is_euler:
                slope = steps[:, number] / (2 * steps[:, number - 1]) * (velocity - before)
            x = x + steps[:, number] * (velocity + slope)
            before = velocity
        return (x - latents) / steps.sum(dim=1), ()
