"""States from finished paths: fresh noise mixed into the samples the teacher has drawn, at any noise level."""

from dataclasses import replace

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.sampling.flow import sample_sigmas, seeded_noise
from wandistiller.targets.lanes import LANE_PREFIX, draw_seeds
from wandistiller.targets.prompt_order import PromptSwap
from wandistiller.targets.trajectories import StateBatch, TrajectoryStates, loss_weights, part_of

SAMPLES_PER_LANE = 64  # finished samples kept; a new one replaces its lane's oldest


class RenoisedStates:
    """A share of every batch is x_sigma = (1 - sigma) x_0 + sigma noise of a finished path; the rest are states of paths.

    One sample serves at many noise levels and noises, which no path of its own would (Random Conditioning's recipe for
    training without images, arXiv 2504.02011). Until enough lanes have finished a path, all states are of paths.
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
        self.lanes = paths.lanes
        paths.on_finish = self._keep
        # At least one state of a path, or no path would ever be finished; and at least one that is not, as asked for.
        self.num_renoised = max(1, min(round(fraction * self.lanes.total), self.lanes.total - 1))
        self.sigma_range = sigma_range
        self.swap = swap or paths.swap
        self.generator = torch.Generator().manual_seed(seed)
        self.samples = torch.zeros(  # x_0 of this process's lanes
            self.lanes.count, SAMPLES_PER_LANE, *paths.latent_shape, device=paths.latents.device
        )
        self.prompts = torch.zeros(self.lanes.total, SAMPLES_PER_LANE, dtype=torch.long)
        self.num_kept = torch.zeros(self.lanes.total, dtype=torch.long)  # ever; the oldest are overwritten

    def _keep(self, latents: Tensor | None, prompt: int, lane: int) -> None:
        index = int(self.num_kept[lane]) % SAMPLES_PER_LANE
        self.prompts[lane, index] = prompt
        self.num_kept[lane] += 1
        if latents is not None:
            self.samples[self.lanes.place_of(lane), index] = latents

    def draw(self) -> StateBatch:
        """A state of a path or a renoised one for every lane."""
        stored = self.num_kept.clamp(max=SAMPLES_PER_LANE)
        ready = stored.nonzero().flatten()
        if len(ready) < self.num_renoised:
            return self.paths.draw()
        order = torch.randperm(len(ready), generator=self.generator)
        chosen = ready[order[: self.num_renoised]].sort().values
        is_renoised = torch.zeros(self.lanes.total, dtype=torch.bool)
        is_renoised[chosen] = True
        return self._renoise(self.paths.draw(among=~is_renoised), chosen, stored[chosen])

    def _renoise(self, batch: StateBatch, lanes: Tensor, stored: Tensor) -> StateBatch:
        """The batch with renoised samples of these lanes in their rows."""
        count = len(lanes)
        indices = (torch.rand(count, generator=self.generator) * stored).long().minimum(stored - 1)
        sigma = sample_sigmas(count, self.paths.shift, self.sigma_range, self.generator)
        prompts = self.swap(self.prompts[lanes, indices].tolist(), sigma, self.generator)
        seeds = draw_seeds(count, self.generator)
        rows = [self.lanes.place_of(lane) for lane in lanes.tolist()]
        own = [number for number, row in enumerate(rows) if row is not None]
        latents, all_sigma, all_prompts = batch.latents.clone(), batch.sigma.clone(), list(batch.prompts)
        for number in own:
            row, level = rows[number], sigma[number]
            noise = to_device(seeded_noise([seeds[number]], self.paths.latent_shape)[0], latents.device)
            latents[row] = (1 - level) * self.samples[row, indices[number]] + level * noise
            all_sigma[row], all_prompts[row] = level, prompts[number]
        is_counted = batch.drawn >= 0
        is_counted[lanes] = True
        return replace(
            batch,
            latents=latents,
            sigma=all_sigma,
            prompts=all_prompts,
            weights=self.lanes.local(loss_weights(is_counted)),
        )

    def advance(
        self, batch: StateBatch, velocity: Tensor, student_velocity: Tensor | None = None, student_share: float = 0.0
    ) -> None:
        """Move the states that are part of a path."""
        self.paths.advance(batch, velocity, student_velocity, student_share)

    def state_dict(self) -> dict[str, Tensor]:
        own = {
            f"{LANE_PREFIX}samples": self.samples.clone(),
            "prompts": self.prompts.clone(),
            "num_kept": self.num_kept.clone(),
            "generator": self.generator.get_state(),
        }
        return {f"paths.{name}": value for name, value in self.paths.state_dict().items()} | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.samples.copy_(state[f"{LANE_PREFIX}samples"])
        self.prompts.copy_(state["prompts"])
        self.num_kept.copy_(state["num_kept"])
        self.generator.set_state(state["generator"])
        self.paths.load_state_dict(part_of(state, "paths."))
