"""Lanes: the samples of the global batch, and which of them this process holds.

A lane is one place in the global batch, and it stays the same place for the whole run: with 8 samples a step there are 8
lanes, and lane 3 is the fourth sample of every step. Each lane has sampling paths, kept samples and stored answers of its
own. Of 2 processes the first holds lanes 0 to 3 and the second lanes 4 to 7.

Every process draws whatever decides what a step trains on (prompts, noise levels, which path moves, which answer is replayed)
for all lanes, from the same seeds. Latents and velocities exist only in the process that holds their lane. A step therefore
does not depend on how its batch is shared out, and processes exchange nothing but gradients.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Lanes:
    """A global batch of `total` lanes. This process holds `count` of them from `first` on and takes `micro_batch` at a time."""

    total: int
    first: int = 0
    count: int = 0
    micro_batch: int = 0

    def __post_init__(self):
        object.__setattr__(self, "count", self.count or self.total)
        object.__setattr__(self, "micro_batch", self.micro_batch or self.count)

    @classmethod
    def of_process(cls, micro_batch: int, grad_accum_steps: int, rank: int, num_processes: int) -> "Lanes":
        """Return the lanes of one process; all processes hold equal, adjoining parts."""
        count = micro_batch * grad_accum_steps
        return cls(count * num_processes, rank * count, count, micro_batch)

    @property
    def num_micro_batches(self) -> int:
        return self.count // self.micro_batch

    @property
    def pads(self) -> bool:
        """Whether every lane gives a row at every step, with weight 0 where it has nothing to train on.

        Several processes, or several micro-batches, must agree on their number. Otherwise a batch is simply shorter.
        """
        return self.count < self.total or self.micro_batch < self.count

    def local(self, values: Tensor) -> Tensor:
        """Return this process's part of values (total, ...) of all lanes."""
        return values[self.first : self.first + self.count]

    def place_of(self, lane: int) -> int | None:
        """Return where a lane lies among this process's own, or None if another process holds it."""
        place = lane - self.first
        return place if 0 <= place < self.count else None
