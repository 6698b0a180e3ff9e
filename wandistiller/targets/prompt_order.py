"""Which prompt a state gets: the order of the prompts, and a swap for another prompt where the state is mostly noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wandistiller.targets.state_dicts import check_order

# A swap at sigma is exp(-SWAP_DECAY (1 - sigma)) times as likely as at sigma 1: a third of it is left at sigma 0.8.
SWAP_DECAY = 5.0


class PromptOrder:
    """Gives prompt indices without end: every prompt once an epoch, in another order each epoch.

    Args:
        num_used: only the first so many of the first epoch's order come at all; None for all of them.
        part, num_parts: the order is dealt out like cards, and this is hand `part` of `num_parts`, from 0 on. All hands together
            are the order without them.
    """

    def __init__(self, num_prompts: int, seed: int, num_used: int | None = None, *, part: int = 0, num_parts: int = 1):
        self.num_prompts, self.num_used = num_prompts, min(num_prompts, num_used or num_prompts)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(num_prompts, generator=self.generator)[: self.num_used].clone()
        self.position, self.num_parts = part, num_parts

    def take(self, count: int) -> list[int]:
        """Return the next `count` indices, or the ones that are left of the epoch."""
        while self.position >= len(self.order):
            places = torch.randperm(len(self.order), generator=self.generator)
            self.position -= len(self.order)  # the first of the next epoch's that is dealt to this hand
            self.order = places if len(places) == self.num_prompts else self.order[places]
        step = self.num_parts
        taken = self.order[self.position : self.position + count * step : step].tolist()
        self.position += len(taken) * step
        return taken

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "order": self.order,
            "position": torch.tensor(self.position),
            "order_generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Resume an order. One of more prompts than are used now ends its epoch earlier, one of fewer goes on with these."""
        order, position = state["order"], state["position"]
        beyond = min(
            max(0, int(position) - len(order)), self.num_parts - 1
        )  # where a hand is dealt on in the next epoch
        check_order(order, position - beyond, self.num_prompts, of_all=False)
        self.order = order[: self.num_used].clone()
        self.position = min(int(position) - beyond, len(self.order)) + beyond
        self.generator.set_state(state["order_generator"])


def reached_prompts(num_prompts: int, seed: int, most_taken: int, num_used: int | None = None) -> list[int]:
    """Return the prompts that a `PromptOrder` gives while at most so many are taken, in the order of the prompts."""
    order = PromptOrder(num_prompts, seed, num_used).order
    return order[: min(most_taken, len(order))].sort().values.tolist()


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
