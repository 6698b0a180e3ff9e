"""Training states made from finished paths: fresh noise mixed into what the teacher has drawn, at any noise level."""

from dataclasses import replace

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.sampling.flow import seeded_noise
from wandistiller.targets.state_batch import DrawOptions, StateBatch, draw_seeds, draw_sigmas, loss_weights
from wandistiller.targets.state_dicts import LANE_PREFIX, part_of, with_prefix
from wandistiller.targets.trajectories import PathOptions, TrajectoryStates

SAMPLES_PER_LANE = 64  # finished samples that are kept; a new one replaces the oldest of its lane


class RenoisedStates:
    """A share of every batch is x_sigma = (1 - sigma) x_0 + sigma noise of a finished path; the rest are states on paths.

    One sample serves at many noise levels and with many noises, which a path of its own would not do (Random Conditioning's
    recipe for training without images, arXiv 2504.02011). Until enough lanes have finished a path, all states are on paths.

    Args:
        fraction: share of a batch that is renoised.
    """

    def __init__(self, options: DrawOptions, paths: PathOptions, fraction: float):
        self.paths = TrajectoryStates(options, paths, on_finish=self._keep)
        self.lanes = lanes = options.lanes
        # At least one state must be on a path, or no path would ever finish; and at least one renoised, as asked for.
        self.num_renoised = max(1, min(round(fraction * lanes.total), lanes.total - 1))
        self.latent_shape, self.levels = options.latent_shape, options.levels
        self.shift, self.sigma_range = options.shift, options.sigma_range
        self.swap = options.swap
        self.generator = torch.Generator().manual_seed(options.own_seed)
        self.num_samples = options.share.of(SAMPLES_PER_LANE)
        # x_0 of this process's lanes:
        self.samples = torch.zeros(lanes.count, self.num_samples, *options.latent_shape, device=options.device)
        self.prompts = torch.zeros(lanes.total, self.num_samples, dtype=torch.long)
        self.num_kept = torch.zeros(lanes.total, dtype=torch.long)  # includes the samples that were replaced since

    def _keep(self, latents: Tensor | None, prompt: int, lane: int) -> None:
        index = int(self.num_kept[lane]) % self.num_samples
        self.prompts[lane, index] = prompt
        self.num_kept[lane] += 1
        if latents is not None:
            self.samples[self.lanes.place_of(lane), index] = latents

    def draw(self) -> StateBatch:
        """Return a state on a path, or a renoised one, for every lane."""
        stored = self.num_kept.clamp(max=self.num_samples)
        ready = stored.nonzero().flatten()
        if len(ready) < self.num_renoised:
            return self.paths.draw()
        order = torch.randperm(len(ready), generator=self.generator)
        chosen = ready[order[: self.num_renoised]].sort().values
        is_renoised = torch.zeros(self.lanes.total, dtype=torch.bool)
        is_renoised[chosen] = True
        return self._renoise(self.paths.draw(among=~is_renoised), chosen, stored[chosen])

    def _renoise(self, batch: StateBatch, lanes: Tensor, stored: Tensor) -> StateBatch:
        """Return the batch with renoised samples in the rows of these lanes.

        Args:
            stored: how many samples each of the lanes keeps.
        """
        count = len(lanes)
        indices = (torch.rand(count, generator=self.generator) * stored).long().minimum(stored - 1)
        sigma = draw_sigmas(count, self.shift, self.sigma_range, self.levels, self.generator)
        prompts = self.swap(self.prompts[lanes, indices].tolist(), sigma, self.generator)
        seeds = draw_seeds(count, self.generator)
        rows = [self.lanes.place_of(lane) for lane in lanes.tolist()]
        own = [number for number, row in enumerate(rows) if row is not None]
        latents, all_sigma, all_prompts = batch.latents.clone(), batch.sigma.clone(), list(batch.prompts)
        for number in own:
            row, level = rows[number], sigma[number]
            noise = to_device(seeded_noise([seeds[number]], self.latent_shape)[0], latents.device)
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
        """Move the states that are on a path."""
        self.paths.advance(batch, velocity, student_velocity, student_share)

    def state_dict(self) -> dict[str, Tensor]:
        own = {
            f"{LANE_PREFIX}samples": self.samples.clone(),
            "prompts": self.prompts.clone(),
            "num_kept": self.num_kept.clone(),
            "generator": self.generator.get_state(),
        }
        return with_prefix("paths.", self.paths.state_dict()) | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.samples.copy_(state[f"{LANE_PREFIX}samples"])
        self.prompts.copy_(state["prompts"])
        self.num_kept.copy_(state["num_kept"])
        self.generator.set_state(state["generator"])
        self.paths.load_state_dict(part_of(state, "paths."))
