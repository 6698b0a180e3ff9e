"""Pure noise as a training state, at every noise level: the baseline of all other states."""

import torch
from torch import Tensor

from wandistiller.sampling.flow import sample_sigmas, seeded_noise
from wandistiller.targets.lanes import Lanes, draw_seeds
from wandistiller.targets.prompt_order import PromptOrder, PromptSwap
from wandistiller.targets.trajectories import StateBatch, loss_weights


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
        lanes: Lanes | None = None,
    ):
        self.latent_shape = latent_shape  # (C, H, W)
        self.lanes = lanes or Lanes(batch_size)
        self.shift = shift
        self.sigma_range = sigma_range
        self.swap = swap or PromptSwap(0.0, num_prompts)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = PromptOrder(num_prompts, seed)

    def draw(self) -> StateBatch:
        """The next prompts, each with fresh noise; the last batch of an epoch holds what is left."""
        prompts = self.order.take(self.lanes.total)
        count = len(prompts)
        sigma = sample_sigmas(count, self.shift, self.sigma_range, self.generator)
        prompts = torch.tensor(self.swap(prompts, sigma, self.generator))
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
        """Nothing moves: the next states are fresh noise."""

    def state_dict(self) -> dict[str, Tensor]:
        return self.order.state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.order.load_state_dict(state)
        self.generator.set_state(state["generator"])
