"""What every source of training states is given, and the batch of states that it draws."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from wandistiller.sampling.flow import sample_sigmas
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.prompt_order import NO_SWAP, PromptOrder, PromptSwap
from wandistiller.targets.shares import WHOLE, ExpertTurn, Share


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """What states are drawn of, and where they are kept.

    Attributes:
        latent_shape: (C, H, W).
        num_prompts: prompts that come in turn.
        num_used: how many of them come at all, the first of their order; None for all of them.
        lanes: the samples of a batch.
        shift: warp of the noise levels.
        sigma_range: lowest and highest noise level.
        levels: the only noise levels that there are, from 1 down to the 0 where paths end; None for all between. A teacher
            that was distilled to few steps answers rightly at those of its own sampler alone.
        swap: gives some states another prompt.
        device: where latents of sampling paths are kept.
        share: of what a run of one image size keeps; it also decides the seed, and which of the prompts come.
        expert_turn: of a teacher's two experts, the same for all sizes of a run.
    """

    latent_shape: tuple[int, int, int]
    num_prompts: int
    lanes: Lanes
    shift: float
    sigma_range: tuple[float, float] = (0.0, 1.0)
    levels: tuple[float, ...] | None = None
    swap: PromptSwap = NO_SWAP
    seed: int = 0
    device: str | torch.device = "cpu"
    num_used: int | None = None
    share: Share = WHOLE
    expert_turn: ExpertTurn = field(default_factory=ExpertTurn)

    @property
    def own_seed(self) -> int:
        """The seed of everything that is drawn for this share."""
        return self.share.seed(self.seed)

    def prompt_order(self) -> PromptOrder:
        """Return the order that the prompts come in at this size, from its beginning; parts of a cache deal it out."""
        share = self.share
        return PromptOrder(
            self.num_prompts,
            share.of_size.seed(self.seed),
            share.used(self.num_used),
            part=share.part,
            num_parts=share.num_parts,
        )

    def of_part(self, part: int, num_parts: int) -> "DrawOptions":
        """Return what the states of a part of this size's teacher cache are drawn of."""
        return replace(self, share=self.share.of_part(part, num_parts))


@dataclass(frozen=True)
class StateBatch:
    """States to train on: this process's part of a global batch, with a row for each of its lanes.

    Attributes:
        latents: (B, C, H, W) in model space.
        sigma: noise levels (B,), on the CPU.
        prompts: index of each state's prompt.
        slots: place of each state in the pool of sampling paths, -1 if it is not part of a path.
        weights: weights (B,) of the samples in the loss: 0 for a lane that had nothing to give, 1 for all if all had.
        drawn: slots of the lanes of every process, -1 for a lane without one.
    """

    latents: Tensor
    sigma: Tensor
    prompts: list[int]
    slots: list[int]
    weights: Tensor
    drawn: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def part(self, start: int, stop: int) -> "StateBatch":
        """Return the rows from `start` to `stop`; `drawn` stays that of the whole batch."""
        if (start, stop) == (0, len(self.slots)):
            return self
        rows = slice(start, stop)
        return replace(
            self,
            latents=self.latents[rows],
            sigma=self.sigma[rows],
            prompts=self.prompts[rows],
            slots=self.slots[rows],
            weights=self.weights[rows],
        )


def levels_within(levels: Sequence[float], sigma_range: tuple[float, float]) -> Tensor:
    """Return the noise levels (N,) that a state may have, of the levels of `DrawOptions`."""
    low, high = sigma_range
    return torch.tensor([level for level in levels[:-1] if low <= level <= high])


def draw_sigmas(
    count: int,
    shift: float,
    sigma_range: tuple[float, float],
    levels: Sequence[float] | None,
    generator: torch.Generator,
) -> Tensor:
    """Draw noise levels (count,), spread over the range as `sample_sigmas` does, or over the levels in it."""
    if levels is None:
        return sample_sigmas(count, shift, sigma_range, generator)
    known = levels_within(levels, sigma_range)
    slices = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return known[(slices / count * len(known)).long().clamp(max=len(known) - 1)]


def loss_weights(is_counted: Tensor) -> Tensor:
    """Return weights (total,) with which the mean over all lanes is the mean over the lanes that count."""
    return is_counted.float() * (len(is_counted) / is_counted.sum())


def draw_seeds(count: int, generator: torch.Generator) -> list[int]:
    """Return a seed for each of `count` noises (see `flow.seeded_noise`)."""
    return torch.randint(2**62, (count,), generator=generator).tolist()
