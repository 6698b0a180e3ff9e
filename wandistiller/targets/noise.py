"""Pure noise as a training state, at every noise level: the baseline that all other states are measured against."""

import torch
from torch import Tensor

from wandistiller.sampling.flow import seeded_noise
from wandistiller.targets.state_batch import DrawOptions, StateBatch, draw_seeds, draw_sigmas, loss_weights


class NoiseStates:
    """Draws pure noise at every noise level. Such states lie on the teacher's paths only near sigma 1."""

    def __init__(self, options: DrawOptions):
        self.latent_shape = options.latent_shape
        self.lanes = options.lanes
        self.shift, self.sigma_range, self.levels = options.shift, options.sigma_range, options.levels
        self.swap = options.swap
        self.generator = torch.Generator().manual_seed(options.own_seed)
        self.order = options.prompt_order()

    def draw(self) -> StateBatch:
        """Return the next prompts, each with fresh noise. The last batch of an epoch holds the prompts that are left."""
        taken = self.order.take(self.lanes.total)
        count = len(taken)
        sigma = draw_sigmas(count, self.shift, self.sigma_range, self.levels, self.generator)
        prompts = torch.tensor(self.swap(taken, sigma, self.generator))
        is_counted = torch.ones(count, dtype=torch.bool)
        if self.lanes.pads and count < self.lanes.total:
            rows = torch.arange(self.lanes.total) % count
            is_counted = torch.arange(self.lanes.total) < count
            sigma, prompts = sigma[rows], prompts[rows]
        seeds = torch.tensor(draw_seeds(self.lanes.total, self.generator))[: len(sigma)]
        seeds = self.lanes.local(seeds)
        return StateBatch(
            seeded_noise(seeds.tolist(), self.latent_shape),
            self.lanes.local(sigma),
            self.lanes.local(prompts).tolist(),
            [-1] * len(seeds),
            self.lanes.local(loss_weights(is_counted)),
        )

    def advance(
        self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None = None, student_share: float = 0.0
    ) -> None:
        """Do nothing: the next states are fresh noise."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.order.state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.order.load_state_dict(state)
        self.generator.set_state(state["generator"])
