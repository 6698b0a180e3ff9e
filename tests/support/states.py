"""What the tests of training states share: small pools, a log of which velocity a path followed, and a check of saved states."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from safetensors.torch import load, save

from wandistiller.targets.lanes import Lanes
from wandistiller.targets.noise import NoiseStates
from wandistiller.targets.renoise import RenoisedStates
from wandistiller.targets.state_batch import DrawOptions, StateBatch
from wandistiller.targets.trajectories import PathOptions, TrajectoryStates

SHIFT = 3.0


BOUNDARY = 0.875  # u = 0.7 at this shift: three tenths of the levels lie above


TEACHERS, STUDENTS = 1.0, -2.0  # constant velocities, by which a path shows whom it followed


def unshift(sigma):
    return sigma / (SHIFT - (SHIFT - 1) * sigma)


def make_noise(num_prompts: int = 20, batch_size: int = 4, **changes) -> NoiseStates:
    values = {"latent_shape": (16, 8, 8), "num_prompts": num_prompts, "lanes": Lanes(batch_size), "shift": SHIFT}
    return NoiseStates(DrawOptions(**values | changes))


def pool_options(**changes) -> tuple[DrawOptions, PathOptions]:
    """The options of 64 paths in 8 lanes, each with some of its fields changed."""
    draw = {"latent_shape": (2, 1, 1), "num_prompts": 10, "lanes": Lanes(8), "shift": SHIFT, "seed": 3}
    paths = {"num_steps": 20, "per_lane": 8}
    for name, value in changes.items():
        (paths if name in PathOptions.__dataclass_fields__ else draw)[name] = value
    return DrawOptions(**draw), PathOptions(**paths)


def make_pool(on_finish: Callable | None = None, **changes) -> TrajectoryStates:
    return TrajectoryStates(*pool_options(**changes), on_finish)


def make_renoised(fraction: float, **changes) -> RenoisedStates:
    return RenoisedStates(*pool_options(**changes), fraction)


@dataclass
class WalkedPath:
    """A path as the batches show it: where it started, and the rates dx/dsigma at which it moved."""

    start: torch.Tensor
    is_of_first_round: bool
    born: int
    ended: int | None = None
    rates: list[float] = field(default_factory=list)


class PathLog:
    """Follows the paths of a pool through its batches."""

    def __init__(self):
        self.open: dict[int, WalkedPath] = {}
        self.finished: list[WalkedPath] = []
        self.num_seen = 0
        self._last: dict[int, tuple[torch.Tensor, float]] = {}

    def see(self, batch: StateBatch) -> None:
        for row, slot in ((row, slot) for row, slot in enumerate(batch.slots) if slot >= 0):
            latents, sigma = batch.latents[row].clone(), float(batch.sigma[row])
            if sigma == 1:
                if slot in self.open:
                    self.open[slot].ended = self.num_seen
                    self.finished.append(self.open[slot])
                self.open[slot] = WalkedPath(latents, slot not in self.open, self.num_seen)
            else:
                before, sigma_before = self._last[slot]
                rate = float((latents - before).mean()) / (sigma - sigma_before)
                self.open[slot].rates.append(round(rate, 1))
            self._last[slot] = latents, sigma
        self.num_seen += 1


def walk(states, share: float, num_batches: int, log: PathLog) -> None:
    """Let the teacher answer TEACHERS and the student STUDENTS at every state."""
    for _ in range(num_batches):
        batch = states.draw()
        log.see(batch)
        velocity = torch.full_like(batch.latents, TEACHERS)
        states.advance(batch, velocity, torch.full_like(velocity, STUDENTS), share)


def check_goes_on_from_a_saved_state(make: Callable, step: Callable[[object], tuple], num_before: int) -> None:
    """Fifty steps after `num_before` are the same, bit for bit, in whatever has loaded the state; `make` takes a seed."""
    original = make(1)
    for _ in range(num_before):
        step(original)
    state = original.state_dict()
    expected = [step(original) for _ in range(50)]
    # Written down only now, and loaded twice: neither a saved nor a loaded state may be shared with what goes on.
    loaded = load(save(state))
    for fresh in (make(2), make(3)):
        fresh.load_state_dict(loaded)
        for ours, theirs in zip(expected, [step(fresh) for _ in range(50)], strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def step_of_states(states) -> tuple:
    batch = states.draw()
    seen = batch.latents.clone(), batch.sigma.clone(), list(batch.prompts), list(batch.slots)
    states.advance(batch, batch.latents, -batch.latents, 0.5)
    return seen
