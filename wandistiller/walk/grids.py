"""The noise levels that sampling paths take: pure functions of the teacher's sampler and of random numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wandistiller.sampling.flow import shift_sigma, unshift_sigma
from wandistiller.sampling.sampler import wan_scheduler
from wandistiller.wan.settings import TeacherSettings

# A path of a teacher that can be asked at all noise levels takes from a quarter to a half of the teacher's steps. The states of one
# path are alike, so that at equal calls short paths teach more, until the error of their steps outweighs that (docs/measurements.md).
STEPS_SHARE = (0.25, 0.5)


def steps_of_paths(num_steps: int) -> tuple[int, int]:
    """Return the fewest and the most steps of a path of a teacher that draws in `num_steps`."""
    low, high = (max(1, round(share * num_steps)) for share in STEPS_SHARE)
    return low, high


def lowest_u(lowest_sigma: float, shift: float) -> float:
    """Return the u that `shift_sigma` maps to the noise level."""
    return float(unshift_sigma(torch.tensor(lowest_sigma, dtype=torch.float64), shift))


def path_grid(num_steps: int, jitter: float, shift: float, u_low: float = 0.0) -> Tensor:
    """Return the noise levels (num_steps + 1,) of a path, from 1 down.

    Args:
        jitter: in [0, 1); moves all levels between the ends by up to half a step, the same for all.
    """
    u = torch.linspace(1, u_low, num_steps + 1)
    u[1:-1] += (jitter - 0.5) * (1 - u_low) / num_steps
    return shift_sigma(u, shift)


def first_grid(level: float, num_steps: int, shift: float, u_low: float = 0.0) -> Tensor:
    """Return the noise levels of a first path: from 1 straight to a level of its own, then on in the steps of later paths.

    Args:
        level: in [0, 1], the share of the noise levels that the path still has before it after the jump.
        num_steps: of a whole path.
    """
    u = torch.linspace(u_low + (1 - u_low) * level, u_low, max(1, round(level * num_steps)) + 1)
    return shift_sigma(torch.cat([torch.ones(1), u]), shift)


def teacher_levels(settings: TeacherSettings) -> tuple[float, ...]:
    """Return the only noise levels that a few-step teacher was made for, and the 0 that they end in; () where all will do."""
    if not settings.has_few_levels:
        return ()
    own = settings.shift, settings.num_inference_steps, settings.teacher_sampler, settings.teacher_levels
    return tuple(wan_scheduler(*own).sigmas.tolist())


def segment_sigmas(shift: float, num_segments: int) -> Tensor:
    """Return the ends of the segments (num_segments + 1,), from 1 down to 0: the noise levels of a few-step student's sampler."""
    return wan_scheduler(shift, num_segments, "euler").sigmas


def steps_of_segments(num_steps: int, num_segments: int) -> int:
    """Return the steps through each segment of a path of `num_steps`."""
    return max(1, round(num_steps / num_segments))


def segment_grids(num_steps: int, num_segments: int, shift: float, levels: Sequence[float] = ()) -> Tensor:
    """Return the noise levels (num_segments, N + 1) of the N steps through each segment of a path of `num_steps`.

    Args:
        levels: a few-step teacher's own, from 1 down to 0; without, levels are evenly spread before the shift.
    """
    steps_per_segment = steps_of_segments(num_steps, num_segments)
    if levels:
        return torch.tensor(levels).unfold(0, steps_per_segment + 1, steps_per_segment)
    ends = unshift_sigma(segment_sigmas(shift, num_segments).double(), shift)
    along = torch.linspace(0, 1, steps_per_segment + 1, dtype=torch.float64)
    return shift_sigma(ends[:-1, None] + along * ends.diff()[:, None], shift).float()
