"""Where training states x_sigma come from: the teacher's own sampling paths, or pure noise as the simple baseline."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wandistiller.flow import sample_sigmas, shift_sigma, unshift_sigma
from wandistiller.prompt_order import PromptOrder, PromptSwap

POOL_BATCHES = 8  # paths in flight, in batches: many prompts at once, each path still finished soon


@dataclass(frozen=True)
class StateBatch:
    """States to train on.

    Attributes:
        latents: (B, C, H, W) in model space.
        sigma: (B,) noise levels, on the CPU.
        prompts: index of each state's prompt.
        slots: where the first len(slots) states lie in their pool; the others are no part of a path.
    """

    latents: Tensor
    sigma: Tensor
    prompts: list[int]
    slots: list[int] = field(default_factory=list)


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state_dict whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class NoiseStates:
    """Pure noise at every noise level: on the teacher's paths only near sigma 1."""

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_prompts: int,
        batch_size: int,
        *,
        shift: float,
        sigma_range: tuple[float, float] = (0.0, 1.0),
        swap: PromptSwap | None = None,
        seed: int = 0,
    ):
        self.latent_shape = latent_shape  # (C, H, W)
        self.batch_size = batch_size
        self.shift = shift
        self.sigma_range = sigma_range
        self.swap = swap or PromptSwap(0.0, num_prompts)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = PromptOrder(num_prompts, seed)

    def draw(self) -> StateBatch:
        """The next prompts, each with fresh noise; the last batch of an epoch holds what is left."""
        prompts = self.order.take(self.batch_size)
        sigma = sample_sigmas(len(prompts), self.shift, self.sigma_range, self.generator)
        noise = torch.randn(len(prompts), *self.latent_shape, generator=self.generator)
        return StateBatch(noise, sigma, self.swap(prompts, sigma, self.generator))

    def advance(
        self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None = None, student_share: float = 0.0
    ) -> None:
        """Nothing moves: the next states are fresh noise."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.order.state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.order.load_state_dict(state)
        self.generator.set_state(state["generator"])


class TrajectoryStates:
    """A pool of sampling paths; the answer a state is trained on also moves it one Euler step on.

    The states are those the teacher meets when it samples, and they cost no call of their own (the pool of DKDM,
    arXiv 2409.03550, on the guided flow ODE). Every path has its own prompt, noise and sigma grid. In the first round
    every slot answers once, at sigma 1, and jumps to a level of its own: from then on the pool covers all noise levels.

    A share of the paths may follow the student's velocity instead, so that the student is corrected where its own mistakes
    lead (DAgger, arXiv 1011.0686; pi-Flow, arXiv 2510.14974): every path draws a lot when it starts, and is the student's
    while the share exceeds it.

    Args:
        boundary: noise level between two experts; None where one expert answers everything.
        calls_per_expert: batches in a row for one expert of two; 0 mixes both in every batch.
        on_finish: called with x_0 (C, H, W) and prompt of every path that the teacher alone has walked to sigma 0.
    """

    _TENSORS = ("latents", "prompts", "grids", "last", "positions", "lots", "is_teachers")

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_prompts: int,
        batch_size: int,
        *,
        shift: float,
        num_steps: int,
        pool_size: int,
        sigma_low: float = 0.0,
        boundary: float | None = None,
        calls_per_expert: int = 0,
        swap: PromptSwap | None = None,
        on_finish: Callable[[Tensor, int], None] | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.latent_shape = latent_shape
        self.batch_size = min(batch_size, pool_size)
        self.shift = shift
        self.num_steps = num_steps
        self.boundary = boundary
        self.calls_per_expert = calls_per_expert if boundary is not None else 0
        self.swap = swap or PromptSwap(0.0, num_prompts)
        self.on_finish = on_finish
        self.u_low = float(unshift_sigma(torch.tensor(sigma_low, dtype=torch.float64), shift))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = PromptOrder(num_prompts, seed)
        self.num_drawn = 0  # states of the first round that were drawn
        self.on_high, self.calls_left = True, 0  # the expert in use, and for how many more batches

        self.latents = torch.empty(pool_size, *latent_shape, device=device)
        self.prompts = torch.zeros(pool_size, dtype=torch.long)
        self.grids = torch.zeros(pool_size, num_steps + 2)  # each path's noise levels, the last of them at `last`
        self.last = torch.zeros(pool_size, dtype=torch.long)
        self.positions = torch.zeros(pool_size, dtype=torch.long)
        self.lots = torch.zeros(pool_size)
        self.is_teachers = torch.zeros(pool_size, dtype=torch.bool)  # walked by the teacher alone so far
        levels = (torch.randperm(pool_size, generator=self.generator) + 0.5) / pool_size
        for slot, level in enumerate(levels.tolist()):
            self._start(slot, self._first_grid(self.u_low + (1 - self.u_low) * level))
        self.is_teachers.fill_(False)  # the jump of the first round is too long a step for a true sample

    @property
    def pool_size(self) -> int:
        return len(self.last)

    @property
    def sigma(self) -> Tensor:
        """The noise level (pool_size,) of every slot."""
        return self.grids.gather(1, self.positions[:, None])[:, 0]

    def draw(self, count: int | None = None) -> StateBatch:
        """The next slots of the first round, then batches stratified over the pool's noise levels."""
        count, first = count or self.batch_size, self.num_drawn
        if first < self.pool_size:
            slots = torch.arange(first, min(first + count, self.pool_size))
            self.num_drawn += len(slots)
        else:
            slots = self._stratified(self._candidates(count), count)
        sigma = self.sigma[slots]
        self.prompts[slots] = torch.tensor(self.swap(self.prompts[slots].tolist(), sigma, self.generator))
        latents = self.latents[slots.to(self.latents.device)]
        return StateBatch(latents, sigma, self.prompts[slots].tolist(), slots.tolist())

    def _candidates(self, count: int) -> Tensor:
        """All slots; or those of the expert in use, which changes after its turn or when too few are left for a batch."""
        if not self.calls_per_expert:
            return torch.arange(self.pool_size)
        is_high = self.sigma >= self.boundary
        sides = {True: is_high.nonzero().flatten(), False: (~is_high).nonzero().flatten()}
        if self.calls_left == 0 or len(sides[self.on_high]) < count:
            other = not self.on_high
            self.on_high = other if len(sides[other]) >= count else len(sides[True]) >= len(sides[False])
            # In proportion to its slots, so that neither side of the boundary runs dry.
            share = len(sides[self.on_high]) / self.pool_size
            self.calls_left = max(1, round(2 * self.calls_per_expert * share))
        self.calls_left -= 1
        return sides[self.on_high]

    def _stratified(self, candidates: Tensor, count: int) -> Tensor:
        """One slot from each of `count` equal parts of the candidates in order of noise."""
        count = min(count, len(candidates))
        edges = torch.linspace(0, len(candidates), count + 1).long()
        picks = edges[:-1] + (torch.rand(count, generator=self.generator) * edges.diff()).long()
        return candidates[self.sigma[candidates].argsort()[picks]]

    def advance(
        self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None = None, student_share: float = 0.0
    ) -> None:
        """Move the batch's slots to their next sigma; a finished path starts anew with the next prompt.

        Args:
            velocity: the teacher's (B, C, H, W); student_velocity moves the paths whose lot is below `student_share`.
        """
        slots, count = torch.tensor(batch.slots, dtype=torch.long), len(batch.slots)
        velocity = velocity[:count]
        if student_velocity is not None and student_share > 0:
            is_students = self.lots[slots] < student_share
            self.is_teachers[slots] &= ~is_students
            chosen = is_students.to(velocity.device)[:, None, None, None]
            velocity = torch.where(chosen, student_velocity[:count].to(velocity), velocity)
        following = self.grids[slots, self.positions[slots] + 1]
        step = (following - batch.sigma[:count]).to(velocity)[:, None, None, None]
        self.latents[slots.to(self.latents.device)] = batch.latents[:count] + step * velocity
        self.positions[slots] += 1
        for slot in slots[self.positions[slots] == self.last[slots]].tolist():
            if self.on_finish is not None and self.is_teachers[slot]:
                self.on_finish(self.latents[slot], int(self.prompts[slot]))
            self._start(slot, self._grid(self._random_steps()))

    def _random_steps(self) -> int:
        """From half of the teacher's steps to all of them."""
        low = max(1, self.num_steps // 2)
        return int(torch.randint(low, self.num_steps + 1, (), generator=self.generator))

    def _start(self, slot: int, grid: Tensor) -> None:
        noise = torch.randn(self.latent_shape, generator=self.generator)
        self.latents[slot] = noise.to(self.latents.device)
        self.prompts[slot] = self.order.take(1)[0]
        self.grids[slot, : len(grid)] = grid
        self.last[slot] = len(grid) - 1
        self.positions[slot] = 0
        self.lots[slot] = torch.rand((), generator=self.generator)
        self.is_teachers[slot] = True

    def _first_grid(self, level: float) -> Tensor:
        """From 1 straight to u = `level`, and on in steps of the usual size."""
        num_steps = round((level - self.u_low) / (1 - self.u_low) * self.num_steps)
        u = torch.linspace(level, self.u_low, max(1, num_steps) + 1)
        return shift_sigma(torch.cat([torch.ones(1), u]), self.shift)

    def _grid(self, num_steps: int) -> Tensor:
        """Shifted noise levels from 1 down in `num_steps` steps; those between are moved by one random part of a step."""
        u = torch.linspace(1, self.u_low, num_steps + 1)
        u[1:-1] += (torch.rand((), generator=self.generator) - 0.5) * (1 - self.u_low) / num_steps
        return shift_sigma(u, self.shift)

    def state_dict(self) -> dict[str, Tensor]:
        counters = torch.tensor([self.num_drawn, self.on_high, self.calls_left])
        own = {name: getattr(self, name).clone() for name in self._TENSORS}
        return self.order.state_dict() | own | {"counters": counters, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self._TENSORS:
            getattr(self, name).copy_(state[name])
        self.num_drawn, on_high, self.calls_left = state["counters"].tolist()
        self.on_high = bool(on_high)
        self.order.load_state_dict(state)
        self.generator.set_state(state["generator"])
