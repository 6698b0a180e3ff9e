"""Training states on the teacher's sampling paths: the teacher answers one state of each slot, and the answer walks that state on.

These are the states that the teacher meets when it samples, and they cost no calls of their own: the velocity that moves a path is
the target at its state (the pool of DKDM, arXiv 2409.03550, on the guided flow ODE).

A slot is one place of the global batch. What a slot draws depends on (seed, slot, how often it has drawn) and on nothing else. So
processes, builders of a cache and image sizes are ranges of slots, and no generator's state is ever saved.

    B slots that are asked   P paths of a slot   C H W latents   L D hidden states
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wandistiller.device import autocast, to_device
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.teacher import Teacher
from wandistiller.walk.draws import CALL, FIRST_LEVELS, FRESH_NOISE, PATH, dealt_prompt, permutation, rng
from wandistiller.walk.grids import first_grid, lowest_u, path_grid, steps_of_paths
from wandistiller.walk.segments import PassedSegments, SegmentTeacher
from wandistiller.wan.prompt_embeds import PromptEmbeds

# Paths of a slot. A small batch has more, so that its slots together mix MIN_POOL prompts; but the first path of every place begins with
# one long step that no sampler takes, and a wide pool spends much of a short run on those (docs/measurements.md).
FEW_PATHS, MIN_POOL = 2, 8
# Where two experts take turns, every slot needs paths on both sides of the boundary.
PATHS_IN_TURNS = 8
MAX_SEED = 2**62


@dataclass(frozen=True, kw_only=True)
class WalkOptions:
    """Which states a run learns from.

    Attributes:
        key: (seed, number of the image size); all random numbers follow from it.
        latent_shape: (C, H, W).
        num_prompts: prompts that paths take in turn.
        num_slots: slots of the whole walk, over all processes.
        batch_size: slots of a global batch. A walk for a cache has several groups of so many.
        shift: warp of the noise levels.
        num_steps: steps of the teacher's sampler from sigma 1 to 0.
        lowest_sigma: noise level that paths end at.
        levels: a few-step teacher's only noise levels, from 1 down to 0; none for any.
        renoises: whether a path goes on from x_0 with fresh noise, as those of a teacher made for it, in place of Euler's steps.
        boundary: noise level between two experts that take turns; None where one expert answers, or both in every batch.
        calls_per_expert: calls in a row for one of two experts, on average over both.
        layers: teacher layers whose hidden states are compared.
        channels: which of their channels.
        segment_ends: noise levels from 1 down to 0 between which the segments of paths are gathered; none without.
    """

    key: tuple[int, int]
    latent_shape: tuple[int, int, int]
    num_prompts: int
    num_slots: int
    batch_size: int
    shift: float
    num_steps: int
    lowest_sigma: float = 0.0
    levels: tuple[float, ...] = ()
    renoises: bool = False
    boundary: float | None = None
    calls_per_expert: int = 0
    layers: Sequence[int] = ()
    channels: Sequence[int] = ()
    segment_ends: tuple[float, ...] = ()
    device: str = "cpu"
    compute_dtype: torch.dtype = torch.float32

    @property
    def in_turns(self) -> bool:
        return self.boundary is not None and self.calls_per_expert > 0

    @property
    def paths_per_slot(self) -> int:
        """Paths of a slot; where experts take no turns every batch may hold states of all noise levels."""
        return PATHS_IN_TURNS if self.in_turns else max(FEW_PATHS, math.ceil(MIN_POOL / self.batch_size))

    @property
    def latents_per_slot(self) -> int:
        """Latents that a walk keeps on the device for each slot."""
        per_path = 2 if self.segment_ends else 1
        return per_path * self.paths_per_slot


class States(NamedTuple):
    """States that the teacher is asked at; all but the latents are on the CPU."""

    rows: Tensor  # (B,) which of the walk's slots they belong to
    paths: Tensor  # (B,)
    latents: Tensor  # (B, C, H, W)
    sigma: Tensor  # (B,)
    prompts: Tensor  # (B,)


class Walk:
    """Sampling paths of a range of slots.

    Every path has its own prompt, noise and sigma grid. The first path of every place jumps from sigma 1 to a level of its own, so
    that from then on the pool covers all noise levels. Paths of a few-step teacher neither vary nor jump: its sampler knows no
    other states.

    Args:
        slots: a range within one group of `options.batch_size`.

    Attributes:
        passed: segments that the last call has brought paths to the end of, as answers; see `PassedSegments.step`.
    """

    # All have the walk's slots as their first dimension.
    _STATE = ("latents", "prompts", "grids", "last", "position", "born")

    def __init__(
        self, teacher: Teacher | SegmentTeacher, prompt_embeds: PromptEmbeds, options: WalkOptions, slots: range
    ):
        self.options, self.slots, self.prompt_embeds = options, slots, prompt_embeds
        self.teacher = autocast(teacher.velocity_and_features, options.device, options.compute_dtype)
        # Every path of a few-step teacher has those of its levels that are in the range, and ends at the next one.
        num_levels = sum(level >= options.lowest_sigma for level in options.levels[:-1])
        self.levels = torch.tensor(options.levels[: num_levels + 1])
        self.channels = torch.tensor(options.channels, dtype=torch.long, device=options.device)
        self.u_low = lowest_u(options.lowest_sigma, options.shift)
        count, paths, shape = len(slots), options.paths_per_slot, options.latent_shape
        self.latents = torch.zeros(count, paths, *shape, device=options.device)
        self.prompts = torch.zeros(count, paths, dtype=torch.long)
        # Each path's noise levels, the last of them at `last`:
        self.grids = torch.zeros(count, paths, options.num_steps + 2)
        self.last = torch.zeros(count, paths, dtype=torch.long)
        self.position = torch.zeros(count, paths, dtype=torch.long)
        self.born = torch.zeros(count, dtype=torch.long)  # paths that a slot has begun
        self.segments: PassedSegments | None = None
        if options.segment_ends:
            self.segments = PassedSegments(options.segment_ends, (count, paths, *shape), options.device)
        self.passed: list[dict[str, Tensor]] = []
        for row in range(count):
            for path in range(paths):
                self._begin(row, path, is_first=not options.levels)

    # ---- asking ----

    @torch.no_grad()
    def ask(self, call: int, rows: range) -> dict[str, Tensor]:
        """Let the teacher answer a state of each of these slots, and walk the states on; return what a step learns from.

        Args:
            call: number of the global batch that the teacher answers, from 0.
            rows: of the walk's slots, those to be asked now. A caller may ask a micro-batch at a time.

        Returns:
            latents (B, C, H, W), sigma (B,), prompts (B,), velocity (B, C, H, W), rows (B,) and for each layer that was named
            "features.N" (B, L, D). B is smaller than len(rows) where some slots have no path on the side of the expert in use.
        """
        states, self.passed = self._states(call, torch.tensor(rows)), []
        if states is None:
            return {}
        text = self.prompt_embeds.batch(states.prompts, self.options.device)
        velocity, features = self.teacher(states.latents, states.sigma, *text, self.options.layers)
        self._move(call, states, velocity)
        answer = {name: getattr(states, name) for name in ("latents", "sigma", "prompts", "rows")}
        answer["velocity"] = velocity.float()
        return answer | {f"features.{number}": hidden[..., self.channels] for number, hidden in enumerate(features)}

    def _states(self, call: int, rows: Tensor) -> States | None:
        """Return the states to ask at, spread over the noise levels: each slot of a group takes another part of them. None for none."""
        size = self.options.batch_size
        own = torch.tensor(self.slots)[rows] % size
        draw = rng(*self.options.key, CALL, self.slots.start // size, call)
        order, jitter = (torch.from_numpy(values)[own] for values in (draw.permutation(size), draw.random(size)))
        spread = (order + jitter) / size  # (B,) in [0, 1), stratified
        paths, has_path = self._choose(call, rows, spread)
        if not has_path.any():
            return None
        rows, paths = rows[has_path], paths[has_path]
        latents = self.latents[self._there(rows), self._there(paths)]
        sigma = self.grids[rows, paths, self.position[rows, paths]]
        return States(rows, paths, latents, sigma, self.prompts[rows, paths])

    def _there(self, values: Tensor) -> Tensor:
        return to_device(values, self.options.device)

    # ---- choosing ----

    def _choose(self, call: int, rows: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Return a path (B,) of each slot, and whether it may be asked about (B,); together they are spread over the noise levels."""
        if not self.options.levels and call < self.options.paths_per_slot:  # each path jumps to its own level first
            return torch.full_like(rows, call), torch.ones_like(rows, dtype=torch.bool)
        sigma = self.grids[rows].gather(2, self.position[rows][..., None])[..., 0]
        usable = self._on_side(call, sigma)
        counts = usable.sum(dim=1)
        by_noise = sigma.masked_fill(~usable, torch.inf).argsort(dim=1, stable=True)
        places = (spread * counts).long().minimum(counts - 1).clamp(min=0)
        return by_noise.gather(1, places[:, None])[:, 0], counts > 0

    def _on_side(self, call: int, sigma: Tensor) -> Tensor:
        """Return which paths (B, P) may be asked about: all, or those on the side of the expert whose turn it is."""
        if not self.options.in_turns:
            return torch.ones_like(sigma, dtype=torch.bool)
        is_high = sigma >= self.options.boundary
        high, low = turns(self.options)
        return is_high if (call - self.options.paths_per_slot) % (high + low) < high else ~is_high

    # ---- moving ----

    def _move(self, call: int, states: States, velocity: Tensor) -> None:
        """Take one step on the paths that were asked about, and begin the next ones where these end."""
        rows, paths = states.rows, states.paths
        end = self.grids[rows, paths, self.position[rows, paths] + 1]
        if self.segments is not None:
            self.passed = self.segments.step(
                (rows, paths), states.prompts, states.latents, states.sigma, end, velocity.float()
            )
        moved = states.latents + self._there(end - states.sigma)[:, None, None, None] * velocity
        if self.options.renoises:
            moved = self._renoised(call, states, velocity, end)
        self.latents[self._there(rows), self._there(paths)] = moved.float()
        self.position[rows, paths] += 1
        is_done = self.position[rows, paths] == self.last[rows, paths]
        for row, path in zip(rows[is_done].tolist(), paths[is_done].tolist(), strict=True):
            self._begin(row, path)

    def _renoised(self, call: int, states: States, velocity: Tensor, end: Tensor) -> Tensor:
        """Return x_0, where the velocity leads, with fresh noise at the next level (B,), as DMD's few-step generators go on (arXiv 2405.14867)."""
        draws = [rng(*self.options.key, FRESH_NOISE, self.slots[row], call) for row in states.rows.tolist()]
        noise = self._there(seeded_noise([int(draw.integers(MAX_SEED)) for draw in draws], self.options.latent_shape))
        sigma, end = (self._there(level)[:, None, None, None] for level in (states.sigma, end))
        return (1 - end) * (states.latents - sigma * velocity) + end * noise

    def _begin(self, row: int, path: int, is_first: bool = False) -> None:
        """Begin a path of a slot with its next prompt, from noise of its own."""
        options, slot, number = self.options, self.slots[row], int(self.born[row])
        draw = rng(*options.key, PATH, slot, number)
        noise = seeded_noise([int(draw.integers(MAX_SEED))], options.latent_shape)[0]
        self.latents[row, path] = self._there(noise)
        if self.segments is not None:
            self.segments.begin(row, path, None if is_first else self.latents[row, path])
        self.prompts[row, path] = dealt_prompt(options.key, number * options.num_slots + slot, options.num_prompts)
        self.born[row] += 1
        grid = self._grid(slot, path, draw, is_first)
        self.grids[row, path, : len(grid)] = grid
        self.last[row, path], self.position[row, path] = len(grid) - 1, 0

    def _grid(self, slot: int, path: int, draw: np.random.Generator, is_first: bool) -> Tensor:
        """Return the noise levels of a path that begins."""
        if self.options.levels:
            return self.levels
        low, high = steps_of_paths(self.options.num_steps)
        num_steps, jitter = int(draw.integers(low, high + 1)), draw.random()
        if is_first:
            return first_grid(self._first_level(slot, path), num_steps, self.options.shift, self.u_low)
        return path_grid(num_steps, jitter, self.options.shift, self.u_low)

    def _first_level(self, slot: int, path: int) -> float:
        """Return a place in (0, 1) for a first path to jump to; those of a group are spread evenly."""
        group, index = divmod(slot, self.options.batch_size)
        order = permutation((*self.options.key, FIRST_LEVELS, group, path), self.options.batch_size)
        return (path + (float(order[index]) + 0.5) / self.options.batch_size) / self.options.paths_per_slot

    # ---- state ----

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything, no copies, by slots along the first dimension, so that it resumes in any number of processes."""
        of_segments = {} if self.segments is None else {"starts": self.segments.starts, "passed": self.segments.passed}
        return {name: getattr(self, name) for name in self._STATE} | of_segments

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, own in self.state_dict().items():
            own.copy_(state[name])


def turns(options: WalkOptions) -> tuple[int, int]:
    """Return the calls in a row of the high-noise expert and of the other, by the share of the noise levels that each has.

    A turn is no longer than the steps that a slot's paths have on that side, or slots would have nothing to be asked about.
    """
    if options.levels:
        levels = torch.tensor(options.levels[:-1])
        num_steps, share = float(len(levels)), float((levels >= options.boundary).float().mean())
    else:
        num_steps = sum(steps_of_paths(options.num_steps)) / 2
        share = 1 - lowest_u(options.boundary, options.shift)
    each = (min(2 * options.calls_per_expert, options.paths_per_slot * num_steps) * part for part in (share, 1 - share))
    high, low = (max(1, round(calls)) for calls in each)
    return high, low
