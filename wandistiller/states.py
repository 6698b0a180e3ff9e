"""Where training states x_sigma come from: the teacher's own sampling paths, or pure noise as the simple baseline."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wandistiller.flow import sample_sigmas, shift_sigma, unshift_sigma
from wandistiller.student_config import StudentConfig
from wandistiller.teacher import TeacherSettings

POOL_BATCHES = 8  # paths in flight, in batches: many prompts at once, each path still finished soon


@dataclass(frozen=True)
class StateBatch:
    """States to train on.

    Attributes:
        latents: (B, C, H, W) in model space.
        sigma: (B,) noise levels, on the CPU.
        prompts: index of each state's prompt.
        slots: where each state lies in its pool; empty for states that are not part of a path.
    """

    latents: Tensor
    sigma: Tensor
    prompts: list[int]
    slots: list[int] = field(default_factory=list)


def prompt_batches(num_prompts: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of prompt indices: every prompt once an epoch, in an order of its own each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num_prompts, generator=generator).tolist()
        for start in range(0, num_prompts, batch_size):
            yield order[start : start + batch_size]


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
        seed: int = 0,
    ):
        self.latent_shape = latent_shape  # (C, H, W)
        self.shift = shift
        self.sigma_range = sigma_range
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = prompt_batches(num_prompts, batch_size, seed)

    def draw(self) -> StateBatch:
        """The next prompts, each with fresh noise; the last batch of an epoch holds what is left."""
        prompts = next(self.batches)
        sigma = sample_sigmas(len(prompts), self.shift, self.sigma_range, self.generator)
        return StateBatch(torch.randn(len(prompts), *self.latent_shape, generator=self.generator), sigma, prompts)

    def advance(self, batch: StateBatch, velocity: Tensor) -> None:
        """Nothing moves: the next states are fresh noise."""


class TrajectoryStates:
    """A pool of the teacher's sampling paths; the answer a state is trained on also moves it one Euler step on.

    The states are those the teacher meets when it samples, and they cost no call of their own (the pool of DKDM,
    arXiv 2409.03550, on the guided flow ODE). Every path has its own prompt, noise and sigma grid. In the first round
    every slot answers once, at sigma 1, and jumps to a level of its own: from then on the pool covers all noise levels.
    """

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
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.latent_shape = latent_shape
        self.batch_size = min(batch_size, pool_size)
        self.shift = shift
        self.num_steps = num_steps
        self.u_low = float(unshift_sigma(torch.tensor(sigma_low, dtype=torch.float64), shift))
        self.generator = torch.Generator().manual_seed(seed)
        self.prompt_order = (prompts[0] for prompts in prompt_batches(num_prompts, 1, seed))
        self.latents = torch.empty(pool_size, *latent_shape, device=device)
        self.prompts = [0] * pool_size
        self.grids: list[Tensor] = [torch.empty(0)] * pool_size
        self.positions = [0] * pool_size
        self.num_drawn = 0
        levels = (torch.randperm(pool_size, generator=self.generator) + 0.5) / pool_size
        for slot, level in enumerate(levels.tolist()):
            self._start(slot, self._first_grid(self.u_low + (1 - self.u_low) * level))

    @property
    def sigma(self) -> Tensor:
        """The noise level (pool_size,) of every slot."""
        return torch.stack([grid[position] for grid, position in zip(self.grids, self.positions, strict=True)])

    def draw(self) -> StateBatch:
        """The next slots of the first round, then batches stratified over the pool's noise levels."""
        sigma, first = self.sigma, self.num_drawn
        if first < len(self.prompts):
            slots = torch.arange(first, min(first + self.batch_size, len(self.prompts)))
        else:
            slots = self._stratified(sigma)
        self.num_drawn += len(slots)
        latents = self.latents[slots.to(self.latents.device)]
        return StateBatch(latents, sigma[slots], [self.prompts[slot] for slot in slots.tolist()], slots.tolist())

    def _stratified(self, sigma: Tensor) -> Tensor:
        """One slot from each of B equal parts of the pool in order of noise."""
        edges = torch.linspace(0, len(sigma), self.batch_size + 1).long()
        picks = edges[:-1] + (torch.rand(self.batch_size, generator=self.generator) * edges.diff()).long()
        return sigma.argsort()[picks]

    def advance(self, batch: StateBatch, velocity: Tensor) -> None:
        """Move the batch's slots along `velocity` to their next sigma; a finished path starts anew with the next prompt."""
        following = torch.stack([self.grids[slot][self.positions[slot] + 1] for slot in batch.slots])
        step = (following - batch.sigma).to(velocity)[:, None, None, None]
        self.latents[torch.tensor(batch.slots, device=self.latents.device)] = batch.latents + step * velocity
        for slot in batch.slots:
            self.positions[slot] += 1
            if self.positions[slot] == len(self.grids[slot]) - 1:
                self._start(slot, self._grid(self._random_steps()))

    def _random_steps(self) -> int:
        """From half of the teacher's steps to all of them."""
        low = max(1, self.num_steps // 2)
        return int(torch.randint(low, self.num_steps + 1, (), generator=self.generator))

    def _start(self, slot: int, grid: Tensor) -> None:
        noise = torch.randn(self.latent_shape, generator=self.generator)
        self.latents[slot] = noise.to(self.latents.device)
        self.prompts[slot] = next(self.prompt_order)
        self.grids[slot] = grid
        self.positions[slot] = 0

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


def build_states(
    kind: str,
    config: StudentConfig,
    settings: TeacherSettings,
    num_prompts: int,
    batch_size: int,
    *,
    sigma_range: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> "NoiseStates | TrajectoryStates":
    """States ("trajectory" or "noise") of the student's image size behind the teacher's VAE, at the teacher's shift.

    A trajectory begins at sigma 1, so its `sigma_range` must end there.
    """
    side = config.image_size // settings.vae_scale_factor
    shape, shift = (config.num_channels, side, side), settings.shift
    if kind == "noise":
        return NoiseStates(shape, num_prompts, batch_size, shift=shift, sigma_range=sigma_range, seed=seed)
    return TrajectoryStates(
        shape,
        num_prompts,
        batch_size,
        shift=shift,
        num_steps=settings.num_inference_steps,
        pool_size=POOL_BATCHES * batch_size,
        sigma_low=sigma_range[0],
        seed=seed,
        device=device,
    )
