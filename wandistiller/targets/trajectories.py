"""Training states on the teacher's own sampling paths, which its answers move on."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.sampling.flow import seeded_noise, shift_sigma, unshift_sigma
from wandistiller.targets.state_batch import DrawOptions, StateBatch, draw_seeds, levels_within, loss_weights
from wandistiller.targets.state_dicts import LANE_PREFIX

# A path of a teacher that answers at all noise levels takes from a quarter of the teacher's steps to half of them. The states of one
# path are alike, so that at equal calls short paths teach more, until the error of their steps outweighs that (docs/experiments.md).
STEPS_SHARE = (0.25, 0.5)
# Where experts take turns, or paths are cut into segments, every lane needs paths at all noise levels at once.
PATHS_PER_LANE = 8
# Elsewhere a lane has these, or as many more as a pool of MIN_POOL takes, which mixes the prompts of small batches. The first path of
# every slot begins with one long step that no sampler takes, and a wide pool spends much of a short run on those.
FEW_PATHS_PER_LANE, MIN_POOL = 2, 8
# The turn of the expert in use ends when a smaller share of the lanes has a path left on its side of the boundary.
ENOUGH_LANES = 0.75


def steps_of_paths(num_steps: int) -> tuple[int, int]:
    """Return how few and how many steps a path takes of a teacher that answers at all noise levels and draws in `num_steps`."""
    low, high = (max(1, round(share * num_steps)) for share in STEPS_SHARE)
    return low, high


def paths_per_lane(num_lanes: int, *, in_turns: bool = False) -> int:
    """Return how many paths a lane has; `in_turns` says that a teacher's two experts answer in turns."""
    return PATHS_PER_LANE if in_turns else min(max(FEW_PATHS_PER_LANE, math.ceil(MIN_POOL / num_lanes)), PATHS_PER_LANE)


def most_path_prompts(num_batches: int, num_lanes: int, num_steps: int, per_lane: int) -> int:
    """Return how many prompts a pool of paths takes at most while so many batches are answered.

    A lane takes a prompt for each path that it begins with, for each that comes after one of those, which may be short, and for
    each that comes after a path of the usual length.
    """
    shortest = steps_of_paths(num_steps)[0]
    return num_lanes * (per_lane + min(num_batches, per_lane + num_batches // shortest))


@dataclass(frozen=True, kw_only=True)
class PathOptions:
    """How sampling paths run.

    Attributes:
        num_steps: steps of the teacher's sampler from sigma 1 to 0.
        per_lane: paths of every lane.
        boundary: noise level between two experts; None if one expert answers everything.
        calls_per_expert: batches in a row for one expert of two; 0 mixes both experts in every batch.
    """

    num_steps: int
    per_lane: int
    boundary: float | None = None
    calls_per_expert: int = 0


class TrajectoryStates:
    """A pool of sampling paths. The answer at a state also moves its path one Euler step on.

    These are the states that the teacher meets when it samples, and they cost no calls of their own (the pool of DKDM,
    arXiv 2409.03550, on the guided flow ODE). Every path has its own prompt, noise and sigma grid, and every lane has its own
    paths. In the first round every slot of the pool is drawn once, at sigma 1, and jumps to a level of its own, so that from
    then on the pool covers all noise levels.

    A teacher that answers rightly at a few levels alone (`DrawOptions.levels`) takes all of its steps on every path, at exactly
    these levels, and its paths neither vary nor jump: its sampler knows no other states.

    A share of the paths may follow the student's velocity instead, so that the student is corrected where its own mistakes
    lead (DAgger, arXiv 1011.0686; pi-Flow, arXiv 2510.14974). Every path draws a lot when it starts, and follows the student
    while the share exceeds that lot.

    Args:
        on_finish: called with x_0 (C, H, W), prompt and lane of every path that the teacher alone has walked to sigma 0. If
            another process holds the lane, x_0 is None.
    """

    # These hold all lanes; slot k * lanes.total + lane is path k of a lane.
    _TENSORS = ("prompts", "grids", "last", "positions", "lots", "is_teachers")

    def __init__(
        self,
        options: DrawOptions,
        paths: PathOptions,
        on_finish: Callable[[Tensor | None, int, int], None] | None = None,
    ):
        self.latent_shape = options.latent_shape
        self.lanes = options.lanes
        self.shift = options.shift
        self.swap = options.swap
        self.num_steps = paths.num_steps
        self.boundary = paths.boundary
        self.calls_per_expert = paths.calls_per_expert if paths.boundary is not None else 0
        self.on_finish = on_finish
        self.u_low = float(unshift_sigma(torch.tensor(options.sigma_range[0], dtype=torch.float64), options.shift))
        self.generator = torch.Generator().manual_seed(options.own_seed)
        self.order = options.prompt_order()
        self.levels = self._levels_of_paths(options)
        # Batches of the first round that were drawn; without a jump there is none.
        self.num_rounds = 0 if self.levels is None else paths.per_lane
        self.turn = options.expert_turn

        total = self.lanes.total
        self._make_pool(options.share.of(paths.per_lane), options.device)
        within = [torch.randperm(total, generator=self.generator) for _ in range(self.num_paths)]
        levels = (torch.arange(self.num_paths)[:, None] + (torch.stack(within) + 0.5) / total) / self.num_paths
        for slot, level in enumerate(levels.flatten().tolist()):
            self._start(slot, self._first_grid(self.u_low + (1 - self.u_low) * level))
        if self.levels is None:
            self.is_teachers.fill_(False)  # the jump of the first round is too long a step for a true sample

    def _make_pool(self, num_paths: int, device: str | torch.device) -> None:
        """Allocate so many paths of every lane."""
        self.num_paths = num_paths
        pool_size = num_paths * self.lanes.total
        self.latents = torch.empty(self.lanes.count, num_paths, *self.latent_shape, device=device)
        self.prompts = torch.zeros(pool_size, dtype=torch.long)
        self.grids = torch.zeros(pool_size, self.num_steps + 2)  # each path's noise levels, the last of them at `last`
        self.last = torch.zeros(pool_size, dtype=torch.long)
        self.positions = torch.zeros(pool_size, dtype=torch.long)
        self.lots = torch.zeros(pool_size)
        self.is_teachers = torch.zeros(pool_size, dtype=torch.bool)  # paths that followed the teacher alone so far

    @staticmethod
    def _levels_of_paths(options: DrawOptions) -> Tensor | None:
        """Return the noise levels of every path: those of the sampler in the range, and the next one, where a path ends."""
        if options.levels is None:
            return None
        return torch.tensor(options.levels[: len(levels_within(options.levels, options.sigma_range)) + 1])

    @property
    def pool_size(self) -> int:
        return len(self.last)

    @property
    def sigma(self) -> Tensor:
        """Noise level (pool_size,) of every slot."""
        return self.grids.gather(1, self.positions[:, None])[:, 0]

    def draw(self, among: Tensor | None = None) -> StateBatch:
        """Return a state of a path for every lane, spread over the pool's noise levels once the first round is over.

        Args:
            among: (total,) bool, the lanes that give a state; all by default, and always all while the pool fills. The rows of the
            others hold nothing of use.
        """
        slots = self._next_slots(among)
        is_drawn = slots >= 0
        slots_or_any = torch.where(is_drawn, slots, slots[is_drawn][0])
        sigma = self.sigma[slots_or_any]
        swapped = self.swap(self.prompts[slots[is_drawn]].tolist(), sigma[is_drawn], self.generator)
        self.prompts[slots[is_drawn]] = torch.tensor(swapped)
        paths = self.lanes.local(slots_or_any) // self.lanes.total
        rows = torch.arange(self.lanes.count, device=self.latents.device)
        return StateBatch(
            self.latents[rows, to_device(paths, self.latents.device)],
            self.lanes.local(sigma),
            self.lanes.local(self.prompts[slots_or_any]).tolist(),
            self.lanes.local(slots).tolist(),
            self.lanes.local(loss_weights(is_drawn)),
            slots,
        )

    def _next_slots(self, among: Tensor | None) -> Tensor:
        """Return a slot for every lane, -1 for a lane that gives none."""
        total, paths = self.lanes.total, self.num_paths
        if self.num_rounds < paths:
            self.num_rounds += 1
            return torch.arange(total) + (self.num_rounds - 1) * total
        usable = self._usable()
        has_one = usable.any(dim=1) if among is None else usable.any(dim=1) & among
        chosen = has_one.nonzero().flatten()
        # Every lane takes from another part of its own paths in order of noise, and all parts get the same number of lanes:
        places = torch.randperm(len(chosen), generator=self.generator)
        spread = (places + torch.rand(len(chosen), generator=self.generator)) / len(chosen)
        counts = usable[chosen].sum(dim=1)
        positions = (spread * counts).long().minimum(counts - 1)
        by_noise = self._by_lane(self.sigma)[chosen].masked_fill(~usable[chosen], torch.inf).argsort(dim=1)
        slots = torch.full((total,), -1)
        slots[chosen] = by_noise.gather(1, positions[:, None])[:, 0] * total + chosen
        return slots

    def _by_lane(self, values: Tensor) -> Tensor:
        """Reshape (pool_size,) to (total, paths of a lane)."""
        return values.unflatten(0, (self.num_paths, -1)).T

    def _usable(self) -> Tensor:
        """Return which paths (total, paths of a lane) may be drawn: all of them, or only those of the expert in use.

        The other expert comes into use when the turn is over, or when too few lanes have a path left for this one.
        """
        is_high = self._by_lane(self.sigma) >= (self.boundary or 0.0)
        if not self.calls_per_expert:
            return torch.ones_like(is_high)
        sides = {True: is_high, False: ~is_high}
        serving = {side: float(mask.any(dim=1).float().mean()) for side, mask in sides.items()}
        turn = self.turn
        if turn.calls_left == 0 or serving[turn.is_high] < ENOUGH_LANES:
            other = not turn.is_high
            turn.is_high = other if serving[other] >= ENOUGH_LANES else serving[True] >= serving[False]
            # A turn is as long as the expert has slots, so that neither side of the boundary runs dry.
            share = float(sides[turn.is_high].float().mean())
            turn.calls_left = max(1, round(2 * self.calls_per_expert * share))
        turn.calls_left -= 1
        return sides[turn.is_high]

    def advance(
        self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None = None, student_share: float = 0.0
    ) -> None:
        """Move the batch's slots to their next sigma. A finished path starts anew with the next prompt.

        Args:
            velocity: the teacher's (B, C, H, W).
            student_velocity: the student's (B, C, H, W), which the paths follow whose lot is below `student_share`.
        """
        is_rolled_out = student_velocity is not None and student_share > 0
        self._move(batch, velocity, student_velocity if is_rolled_out else None, student_share)
        drawn = batch.drawn[batch.drawn >= 0]
        if is_rolled_out:
            self.is_teachers[drawn] &= self.lots[drawn] >= student_share
        self.positions[drawn] += 1
        for slot in drawn[self.positions[drawn] == self.last[drawn]].tolist():
            if self.on_finish is not None and self.is_teachers[slot]:
                self.on_finish(self._latents_of(slot), int(self.prompts[slot]), slot % self.lanes.total)
            self._start(slot, self._next_grid())

    def _move(self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None, student_share: float) -> None:
        """Take one Euler step on this process's paths."""
        slots = torch.tensor(batch.slots, dtype=torch.long)
        rows = (slots >= 0).nonzero().flatten()
        slots = slots[rows]
        places, paths = slots % self.lanes.total - self.lanes.first, slots // self.lanes.total
        on_device, places, paths, step = (
            to_device(values, velocity.device)
            for values in (rows, places, paths, self.grids[slots, self.positions[slots] + 1] - batch.sigma[rows])
        )
        velocity = velocity[on_device]
        if student_velocity is not None:
            is_students = self.lots[slots] < student_share
            chosen = to_device(is_students, velocity.device)[:, None, None, None]
            velocity = torch.where(chosen, student_velocity[on_device].to(velocity), velocity)
        self.latents[places, paths] = batch.latents[on_device] + step[:, None, None, None] * velocity

    def _latents_of(self, slot: int) -> Tensor | None:
        """Return the latents (C, H, W) of a slot, or None if another process holds it."""
        place = self.lanes.place_of(slot % self.lanes.total)
        return None if place is None else self.latents[place, slot // self.lanes.total]

    def _next_grid(self) -> Tensor:
        """Return the noise levels of a path."""
        return self.levels if self.levels is not None else self._grid(self._random_steps())

    def _random_steps(self) -> int:
        """Draw the number of steps of a path."""
        low, high = steps_of_paths(self.num_steps)
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def _start(self, slot: int, grid: Tensor) -> None:
        seeds = draw_seeds(1, self.generator)
        if (latents := self._latents_of(slot)) is not None:
            latents.copy_(to_device(seeded_noise(seeds, self.latent_shape)[0], latents.device))
        self.prompts[slot] = self.order.take(1)[0]
        self.grids[slot, : len(grid)] = grid
        self.last[slot] = len(grid) - 1
        self.positions[slot] = 0
        self.lots[slot] = torch.rand((), generator=self.generator)
        self.is_teachers[slot] = True

    def _first_grid(self, level: float) -> Tensor:
        """Return the noise levels of a first path: from 1 straight to u = `level`, and on in the steps of a later path."""
        if self.levels is not None:
            return self.levels
        num_steps = round((level - self.u_low) / (1 - self.u_low) * self._random_steps())
        u = torch.linspace(level, self.u_low, max(1, num_steps) + 1)
        return shift_sigma(torch.cat([torch.ones(1), u]), self.shift)

    def _grid(self, num_steps: int) -> Tensor:
        """Return shifted noise levels from 1 down in `num_steps` steps; all between the ends are moved by the same random part
        of a step."""
        u = torch.linspace(1, self.u_low, num_steps + 1)
        u[1:-1] += (torch.rand((), generator=self.generator) - 0.5) * (1 - self.u_low) / num_steps
        return shift_sigma(u, self.shift)

    def state_dict(self) -> dict[str, Tensor]:
        counters = torch.tensor([self.num_rounds, self.turn.is_high, self.turn.calls_left])
        own = {name: getattr(self, name).clone() for name in self._TENSORS}
        own[f"{LANE_PREFIX}latents"] = self.latents.clone()
        return self.order.state_dict() | own | {"counters": counters, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        num_paths = len(state["last"]) // self.lanes.total
        if num_paths != self.num_paths:  # of an earlier version, whose pools were wider
            self._make_pool(num_paths, self.latents.device)
        for name in self._TENSORS:
            getattr(self, name).copy_(state[name])
        self.latents.copy_(state[f"{LANE_PREFIX}latents"])
        self.num_rounds, is_high, self.turn.calls_left = state["counters"].tolist()
        self.turn.is_high = bool(is_high)
        self.order.load_state_dict(state)
        self.generator.set_state(state["generator"])
