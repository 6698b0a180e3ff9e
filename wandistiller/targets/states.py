"""Training states x_sigma: what a source of them must provide, and which source each `--states` stands for.

The sources lie beside this module: noise.py is the simplest, trajectories.py walks the teacher's sampling paths, renoise.py
adds fresh noise to what such paths have drawn. To add a source:

1. Write a class that provides what `States` asks for. It gets `DrawOptions`, draws a `StateBatch` with a row for each lane of
   this process, and draws everything but latents for all lanes (see lanes.py). It draws from generators of its own only, which
   `state_dict` saves: a run that resumes must draw what it would have drawn.
2. Enter its name and a function that builds it in `BUILDERS`.
3. Enter the name in `STATES` of run/states_kinds.py, with what the flags must know of it, and what the source keeps on the device in
   `stored_latents` of budget/workload.py. A test holds the two tables to the same names.
4. A value of its own goes through `StatesOptions` and run/plan.py; where it decides what a student becomes, run/recipe.py too.
   Teacher caches and checkpoints that were written before are then refused, since they lack it.
5. Write its tests beside those of the other sources in tests/targets, and its line in docs/training.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wandistiller.model.config import StudentConfig
from wandistiller.sampling.sampler import flow_euler_scheduler
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.noise import NoiseStates
from wandistiller.targets.prompt_order import PromptSwap
from wandistiller.targets.renoise import RenoisedStates
from wandistiller.targets.shares import ExpertTurn, Share
from wandistiller.targets.state_batch import DrawOptions, StateBatch
from wandistiller.targets.trajectories import PathOptions, TrajectoryStates, paths_per_lane
from wandistiller.wan.settings import TeacherSettings


class States(Protocol):
    """A source of training states."""

    lanes: Lanes

    def draw(self) -> StateBatch:
        """Return the next batch."""
        ...

    def advance(
        self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None = None, student_share: float = 0.0
    ) -> None:
        """Take the answers (B, C, H, W) to the batch that was drawn last.

        Args:
            velocity: the teacher's.
            student_velocity: the student's.
            student_share: share of the sampling paths that follow the student, in a source that has paths.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that the next `draw` depends on.

        A tensor with a row for each lane of this process has a name that begins with LANE_PREFIX (lanes.py), so that a run is
        resumed by another number of processes.
        """
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StatesOptions:
    """Which states a run trains on.

    Attributes:
        kind: a name in `BUILDERS`.
        renoise_fraction: share of a batch that is noise mixed into finished samples. Noise states have no such share.
        prompt_swap: probability that a state at sigma 1 gets another prompt.
        num_extra_prompts: prompts after the run's own, which only come by that swap.
        calls_per_expert: batches in a row for one expert of two; 0 mixes both experts in every batch.
    """

    kind: str
    sigma_range: tuple[float, float] = (0.0, 1.0)
    renoise_fraction: float = 0.0
    prompt_swap: float = 0.0
    num_extra_prompts: int = 0
    calls_per_expert: int = 0
    seed: int = 0


def _noise_states(options: StatesOptions, draw: DrawOptions, settings: TeacherSettings) -> States:
    return NoiseStates(draw)


def _path_states(options: StatesOptions, draw: DrawOptions, settings: TeacherSettings) -> States:
    """Build a pool of sampling paths. A path begins at sigma 1, so the range of noise levels must end there."""
    paths = PathOptions(
        num_steps=settings.num_inference_steps,
        per_lane=pool_per_lane(options, settings, draw.lanes.total),
        boundary=settings.boundary_ratio,
        calls_per_expert=options.calls_per_expert,
    )
    if options.renoise_fraction:
        return RenoisedStates(draw, paths, options.renoise_fraction)
    return TrajectoryStates(draw, paths)


def pool_per_lane(options: StatesOptions, settings: TeacherSettings, num_lanes: int) -> int:
    """Return how many sampling paths each of so many lanes has, where the states lie on such paths."""
    in_turns = settings.boundary_ratio is not None and options.calls_per_expert > 0
    return paths_per_lane(num_lanes, in_turns=in_turns)


# A kind fills whole batches. What only takes a share of a batch of paths is a fraction, as `renoise_fraction` is; "trajectory" and
# "renoise" differ in the share of renoised states that the flags give by default.
BUILDERS: dict[str, Callable[[StatesOptions, DrawOptions, TeacherSettings], States]] = {
    "trajectory": _path_states,
    "renoise": _path_states,
    "noise": _noise_states,
}


def teacher_levels(settings: TeacherSettings) -> tuple[float, ...] | None:
    """Return the only noise levels that the teacher answers rightly at, and the 0 that they end in; None where all will do."""
    if not settings.has_few_levels:
        return None
    return tuple(flow_euler_scheduler(settings.shift, settings.num_inference_steps).sigmas.tolist())


def build_states(
    options: StatesOptions,
    config: StudentConfig,
    settings: TeacherSettings,
    num_prompts: int,
    lanes: Lanes,
    device: str | torch.device = "cpu",
    num_used: int | None = None,
) -> States:
    """Build the states that a run asks for, of the student's image size behind the teacher's VAE, at the teacher's shift.

    Args:
        num_used: how many of the prompts come at all; None for all of them.
    """
    shapes = [settings.latent_shape(config)]
    (draw,) = draws_by_size(options, shapes, settings, num_prompts, lanes, device, num_used)
    return states_of(options, draw, settings)


def states_of(options: StatesOptions, draw: DrawOptions, settings: TeacherSettings) -> States:
    """Build the states that are drawn of these, such as those of one image size, or of a part of its teacher cache."""
    return BUILDERS[options.kind](options, draw, settings)


def draws_by_size(
    options: StatesOptions,
    latent_shapes: Sequence[tuple[int, int, int]],
    settings: TeacherSettings,
    num_prompts: int,
    lanes: Lanes,
    device: str | torch.device = "cpu",
    num_used: int | None = None,
) -> list[DrawOptions]:
    """Return what the states of each image size are drawn of; all have the same expert of two in use, and share out what one size
    would keep."""
    turn = ExpertTurn()
    return [
        DrawOptions(
            latent_shape=shape,
            num_prompts=num_prompts,
            lanes=lanes,
            shift=settings.shift,
            sigma_range=options.sigma_range,
            levels=teacher_levels(settings),
            swap=PromptSwap(options.prompt_swap, num_prompts + options.num_extra_prompts),
            seed=options.seed,
            device=device,
            num_used=num_used,
            share=Share(index, len(latent_shapes)),
            expert_turn=turn,
        )
        for index, shape in enumerate(latent_shapes)
    ]
