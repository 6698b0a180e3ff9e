"""States from finished paths: fresh noise mixed into the samples the teacher has drawn, at any noise level."""

import torch
from torch import Tensor

from wandistiller.flow import sample_sigmas
from wandistiller.prompt_order import PromptSwap
from wandistiller.states import StateBatch, TrajectoryStates, part_of

STORE_BATCHES = 64  # finished samples kept, in batches; a new one replaces the oldest


class RenoisedStates:
    """A share of every batch is x_sigma = (1 - sigma) x_0 + sigma noise of a finished path; the rest are states of paths.

    One sample serves at many noise levels and noises, which no path of its own would (Random Conditioning's recipe for
    training without images, arXiv 2504.02011). Until enough paths are finished, all states are of paths.
    """

    def __init__(
        self,
        paths: TrajectoryStates,
        fraction: float,
        *,
        sigma_range: tuple[float, float] = (0.0, 1.0),
        swap: PromptSwap | None = None,
        seed: int = 0,
    ):
        self.paths = paths
        paths.on_finish = self._keep
        # At least one state of a path, or no path would ever be finished; and at least one that is not, as asked for.
        self.num_renoised = max(1, min(round(fraction * paths.batch_size), paths.batch_size - 1))
        self.sigma_range = sigma_range
        self.swap = swap or paths.swap
        self.generator = torch.Generator().manual_seed(seed)
        capacity = STORE_BATCHES * paths.batch_size
        self.samples = torch.zeros(capacity, *paths.latent_shape, device=paths.latents.device)  # x_0
        self.prompts = torch.zeros(capacity, dtype=torch.long)
        self.num_kept = 0  # ever; the oldest are overwritten

    def _keep(self, latents: Tensor, prompt: int) -> None:
        place = self.num_kept % len(self.prompts)
        self.samples[place], self.prompts[place] = latents, prompt
        self.num_kept += 1

    def draw(self) -> StateBatch:
        """States of paths first, renoised ones after them."""
        stored = min(self.num_kept, len(self.prompts))
        count = self.num_renoised if stored >= self.num_renoised else 0
        part = self.paths.draw(self.paths.batch_size - count)
        if not count:
            return part
        places = torch.randperm(stored, generator=self.generator)[:count]
        sigma = sample_sigmas(count, self.paths.shift, self.sigma_range, self.generator)
        noise = torch.randn(count, *self.paths.latent_shape, generator=self.generator).to(self.samples.device)
        level = sigma.to(noise.device)[:, None, None, None]
        renoised = (1 - level) * self.samples[places.to(self.samples.device)] + level * noise
        prompts = self.swap(self.prompts[places].tolist(), sigma, self.generator)
        return StateBatch(
            torch.cat([part.latents, renoised]), torch.cat([part.sigma, sigma]), part.prompts + prompts, part.slots
        )

    def advance(
        self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None = None, student_share: float = 0.0
    ) -> None:
        """Move the states that are part of a path."""
        self.paths.advance(batch, velocity, student_velocity, student_share)

    def state_dict(self) -> dict[str, Tensor]:
        own = {
            "samples": self.samples.clone(),
            "prompts": self.prompts.clone(),
            "num_kept": torch.tensor(self.num_kept),
            "generator": self.generator.get_state(),
        }
        return {f"paths.{name}": value for name, value in self.paths.state_dict().items()} | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.samples.copy_(state["samples"])
        self.prompts.copy_(state["prompts"])
        self.num_kept = int(state["num_kept"])
        self.generator.set_state(state["generator"])
        self.paths.load_state_dict(part_of(state, "paths."))
