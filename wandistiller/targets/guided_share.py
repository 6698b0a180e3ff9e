"""How many of the states that the teacher is asked at lie where it is guided, by the rules that the states are drawn by."""

from itertools import pairwise

import torch
from torch import Tensor

from wandistiller.sampling.flow import shift_sigma, unshift_sigma
from wandistiller.targets.segments import calls_per_answer, segment_sigmas
from wandistiller.targets.state_batch import levels_within
from wandistiller.targets.states import StatesOptions, teacher_levels
from wandistiller.targets.trajectories import steps_of_paths
from wandistiller.wan.settings import TeacherSettings

# Whatever is drawn at random between two noise levels stands at so many places between them.
NUM_PLACES = 256


def guided_share(settings: TeacherSettings, options: StatesOptions, student_steps: int | None = None) -> float:
    """Return the share of the states at which the teacher is guided, on average over a long run.

    Args:
        student_steps: segments of the teacher's paths, for a student of few steps.
    """
    if settings.guidance_range is None:
        return 1.0
    low, high = settings.guidance_range

    def share(sigma: Tensor) -> float:
        return float(((low <= sigma) & (sigma <= high)).double().mean())

    if (levels := teacher_levels(settings)) is not None:  # every path takes each of them once
        return share(levels_within(levels, options.sigma_range))
    if student_steps:
        return share(_sigmas_of_segments(settings, student_steps))
    u_low, u_high = unshift_sigma(torch.tensor(options.sigma_range, dtype=torch.float64), settings.shift).tolist()
    anywhere = shift_sigma(u_low + (u_high - u_low) * _places(), settings.shift)
    if options.kind == "noise":
        return share(anywhere)
    fraction = options.renoise_fraction
    return fraction * share(anywhere) + (1 - fraction) * share(_sigmas_of_paths(settings, u_low))


def _places() -> Tensor:
    return (torch.arange(NUM_PLACES, dtype=torch.float64) + 0.5) / NUM_PLACES


def _moved(levels: Tensor) -> Tensor:
    """Return the levels (N,) but the last, those after the first moved to each of the places within half a step."""
    steps = (levels[1] - levels[0]) * (_places() - 0.5)
    inner = levels[1:-1] + steps[:, None]
    return torch.cat([levels[:1].expand(NUM_PLACES), inner.flatten()])


def _sigmas_of_paths(settings: TeacherSettings, u_low: float) -> Tensor:
    low, high = steps_of_paths(settings.num_inference_steps)
    u = [_moved(torch.linspace(1, u_low, num_steps + 1, dtype=torch.float64)) for num_steps in range(low, high + 1)]
    return shift_sigma(torch.cat(u), settings.shift)


def _sigmas_of_segments(settings: TeacherSettings, student_steps: int) -> Tensor:
    ends = segment_sigmas(settings.shift, student_steps).double().tolist()
    num_steps = calls_per_answer(settings.num_inference_steps, student_steps)
    segments = pairwise(ends)
    return torch.cat([_moved(torch.linspace(*ends, num_steps + 1, dtype=torch.float64)) for ends in segments])
