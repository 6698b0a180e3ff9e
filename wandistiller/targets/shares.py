"""Image sizes share what a run of one size keeps: its pool of paths, its finished samples, its store, its steps.

Each size has sources of its own, which know nothing of the others, and sizes_in_turn.py lets them take turns. As they share
out what one size would have, several sizes take no more memory than one. The parts of a teacher cache, each of which is asked for by
itself (cache_parts.py), share out what its one source would have in the same way.
"""

from dataclasses import dataclass, replace

from wandistiller.model.image_sizes import shares

# Sources of one run draw from seeds that lie so far apart; an odd number, so that no two are the same.
SEED_STEP = 0x1E3779B97F4A7C15
MAX_SEED = 2**63


@dataclass(frozen=True)
class Share:
    """The share of one of `count` image sizes, or of one of the `num_parts` parts that a size's teacher cache is asked for in."""

    index: int = 0
    count: int = 1
    part: int = 0
    num_parts: int = 1

    def of_part(self, part: int, num_parts: int) -> "Share":
        """Return the share of a part of this size's cache."""
        return replace(self, part=part, num_parts=num_parts)

    @property
    def of_size(self) -> "Share":
        """The share that all parts of this size have together."""
        return self.of_part(0, 1)

    def of(self, total: int) -> int:
        """Return how many of `total` things this share has, at least one; without that one they add up to all of them."""
        of_size = max(1, shares(total, self.count)[self.index])
        return max(1, shares(of_size, self.num_parts)[self.part])

    def seed(self, seed: int) -> int:
        """Return the seed of this share's sources; the first one has that of a run of one size."""
        return (seed + (self.index + self.part * self.count) * SEED_STEP) % MAX_SEED

    def used(self, num_used: int | None) -> int | None:
        """Return how many prompts come at this size at all, of a number that all sizes may use together; None for all prompts."""
        return None if num_used is None else self.of_size.of(num_used)


WHOLE = Share()


class ExpertTurn:
    """Which of a teacher's two experts is in use, and for how many more batches, whatever size these are of."""

    def __init__(self) -> None:
        self.is_high, self.calls_left = True, 0
