"""Which prompt a state gets: an order over the prompts, and a swap for another one where the state is mostly noise."""

import torch
from torch import Tensor

SWAP_DECAY = 5.0  # swaps at sigma: probability x exp(-5 (1 - sigma)), a third of it left at sigma 0.8


class PromptOrder:
    """Endless prompt indices: every prompt once an epoch, in an order of its own each epoch."""

    def __init__(self, num_prompts: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(num_prompts, generator=self.generator)
        self.position = 0

    def take(self, count: int) -> list[int]:
        """The next `count` indices, or what is left of the epoch."""
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
        self.order = state["order"].clone()
        self.position = int(state["position"])
        self.generator.set_state(state["order_generator"])


class PromptSwap:
    """Gives a state another prompt, the likelier the noisier it is (Random Conditioning, CVPR 2025, arXiv 2504.02011).

    A mostly noisy state says little of its prompt, so one state serves for many prompts, and a student learns only what it
    saw prompts of. The paper's probability also falls exponentially from high noise.
    """

    def __init__(self, probability: float, num_choices: int):
        self.probability = probability
        self.num_choices = num_choices  # prompts, and after them those that only come this way

    def __call__(self, prompts: list[int], sigma: Tensor, generator: torch.Generator) -> list[int]:
        if not self.probability:
            return prompts
        chance = self.probability * torch.exp(-SWAP_DECAY * (1 - sigma))
        swapped = torch.rand(len(prompts), generator=generator) < chance
        others = torch.randint(self.num_choices, (len(prompts),), generator=generator)
        return torch.where(swapped, others, torch.tensor(prompts)).tolist()
