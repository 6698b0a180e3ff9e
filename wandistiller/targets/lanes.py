"""The samples of a global batch, a lane each, and which of them this process holds.

All that decides what a step trains on (prompts, noise levels, which path moves, which answer is replayed) is drawn for all
lanes by every process, from the same seeds; latents and velocities exist only where their lane is. So a step does not depend
on how its batch is shared out, and no process tells another anything but gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LANE_PREFIX = "lanes."  # of names in a state_dict whose first dimension is this process's lanes


@dataclass(frozen=True)
class Lanes:
    """A global batch of `total` samples, of which this process holds `count` from `first` on, `micro_batch` at a time.

    Attributes:
        pads: whether every lane gives a row at every step, of weight 0 where there is nothing to train on; else a batch is
            shorter there. Several processes, or several passes a step, must agree on their number.
    """

    total: int
    first: int = 0
    count: int = 0
    micro_batch: int = 0

    def __post_init__(self):
        object.__setattr__(self, "count", self.count or self.total)
        object.__setattr__(self, "micro_batch", self.micro_batch or self.count)

    @classmethod
    def of_process(cls, micro_batch: int, grad_accum_steps: int, rank: int, num_processes: int) -> "Lanes":
        """Equal, adjoining parts for all processes."""
        count = micro_batch * grad_accum_steps
        return cls(count * num_processes, rank * count, count, micro_batch)

    @property
    def num_micro_batches(self) -> int:
        return self.count // self.micro_batch

    @property
    def pads(self) -> bool:
        return self.count < self.total or self.micro_batch < self.count

    def local(self, values: Tensor) -> Tensor:
        """This process's part of values (total, ...) of all lanes."""
        return values[self.first : self.first + self.count]

    def place_of(self, lane: int) -> int | None:
        """Where a lane lies among this process's own, or None where another process holds it."""
        place = lane - self.first
        return place if 0 <= place < self.count else None


def draw_seeds(count: int, generator: torch.Generator) -> list[int]:
    """A seed for each of `count` noises (see `flow.seeded_noise`)."""
    return torch.randint(2**62, (count,), generator=generator).tolist()
