"""The training states that a run's options ask for."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wandistiller.model.config import StudentConfig
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.noise import NoiseStates
from wandistiller.targets.prompt_order import PromptSwap
from wandistiller.targets.renoise import RenoisedStates
from wandistiller.targets.trajectories import PATHS_PER_LANE, StateBatch, TrajectoryStates
from wandistiller.wan.settings import TeacherSettings


class States(Protocol):
    """What trains: a batch of states, which the answers to it move on; `state_dict` holds all that `draw` depends on."""

    lanes: Lanes

    def draw(self) -> StateBatch: ...

    def advance(
        self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None = None, student_share: float = 0.0
    ) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class StatesOptions:
    """Which states are trained on.

    Attributes:
        kind: "trajectory", "renoise" or "noise".
        renoise_fraction: share of a batch that is noise mixed into finished samples; not with "noise".
        prompt_swap: probability that a state at sigma 1 gets another prompt.
        num_extra_prompts: prompts after the run's own, which come by that swap alone.
        calls_per_expert: batches in a row for one expert of two; 0 mixes both.
    """

    kind: str
    sigma_range: tuple[float, float] = (0.0, 1.0)
    renoise_fraction: float = 0.0
    prompt_swap: float = 0.0
    num_extra_prompts: int = 0
    calls_per_expert: int = 0
    seed: int = 0


def build_states(
    options: StatesOptions,
    config: StudentConfig,
    settings: TeacherSettings,
    num_prompts: int,
    batch_size: int,
    device: str | torch.device = "cpu",
    lanes: Lanes | None = None,
) -> States:
    """States of the student's image size behind the teacher's VAE, at the teacher's shift; `batch_size` of all processes.

    A trajectory begins at sigma 1, so its `sigma_range` must end there.
    """
    shape, shift, sigma_range = settings.latent_shape(config), settings.shift, options.sigma_range
    swap = PromptSwap(options.prompt_swap, num_prompts + options.num_extra_prompts)
    if options.kind == "noise":
        return NoiseStates(
            shape,
            num_prompts,
            batch_size,
            shift=shift,
            sigma_range=sigma_range,
            swap=swap,
            seed=options.seed,
            lanes=lanes,
        )
    paths = TrajectoryStates(
        shape,
        num_prompts,
        batch_size,
        shift=shift,
        num_steps=settings.num_inference_steps,
        pool_size=PATHS_PER_LANE * batch_size,
        sigma_low=sigma_range[0],
        boundary=settings.boundary_ratio,
        calls_per_expert=options.calls_per_expert,
        swap=swap,
        seed=options.seed,
        device=device,
        lanes=lanes,
    )
    if not options.renoise_fraction:
        return paths
    return RenoisedStates(paths, options.renoise_fraction, sigma_range=sigma_range, seed=options.seed)
