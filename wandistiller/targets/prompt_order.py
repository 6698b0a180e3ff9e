"""Which prompt a state gets: the order of the prompts, and a swap for another prompt where the state is mostly noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wandistiller.targets.state_dicts import check_order

# A swap at sigma is exp(-SWAP_DECAY (1 - sigma)) times as likely as at sigma 1: a third of it is left at sigma 0.8.
SWAP_DECAY = 5.0


class PromptOrder:
    """Gives prompt indices without end: every prompt once an epoch, in another order each epoch."""

    def __init__(self, num_prompts: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(num_prompts, generator=self.generator)
        self.position = 0

    def take(self, count: int) -> list[int]:
        """Return the next `count` indices, or the ones that are left of the epoch."""
        if self.position == len(self.order):
            self.order = torch.randperm(len(self.order), generator=self.generator)
            self.position = 0
        taken = self.order[self.position : self.position + count].tolist()
        self.position += len(taken)
        return taken

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "order": self.order,
            "position": torch.tensor(self.position),
            "order_generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        check_order(state["order"], state["position"], len(self.order))
        self.order = state["order"].clone()
        self.position = int(state["position"])
        self.generator.set_state(state["order_generator"])


@dataclass(frozen=True)
class PromptSwap:
    """Gives a state another prompt, more often the noisier it is (Random Conditioning, CVPR 2025, arXiv 2504.02011).

    A mostly noisy state says little about its prompt, so it serves for many prompts, and the student learns more of them than
    it has states for. In the paper the probability falls exponentially from high noise too.

    Attributes:
        probability: of a swap at sigma 1.
        num_choices: prompts to choose from: the run's own, and after them those that only come this way.
    """

    probability: float
    num_choices: int

    def __call__(self, prompts: list[int], sigma: Tensor, generator: torch.Generator) -> list[int]:
        if not self.probability:
            return prompts
        chance = self.probability * torch.exp(-SWAP_DECAY * (1 - sigma))
        swapped = torch.rand(len(prompts), generator=generator) < chance
        others = torch.randint(self.num_choices, (len(prompts),), generator=generator)
        return torch.where(swapped, others, torch.tensor(prompts)).tolist()


NO_SWAP = PromptSwap(0.0, 0)
