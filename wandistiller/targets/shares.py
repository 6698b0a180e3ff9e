"""Image sizes share what a run of one size keeps: its pool of paths, its finished samples, its store, its steps.

Each size has sources of its own, which know nothing of the others, and sizes_in_turn.py lets them take turns. As they share
out what one size would have, several sizes take no more memory than one.
"""

from dataclasses import dataclass

from wandistiller.model.image_sizes import shares

# Sources of one run draw from seeds that lie so far apart; an odd number, so that no two are the same.
SEED_STEP = 0x1E3779B97F4A7C15
MAX_SEED = 2**63


@dataclass(frozen=True)
class Share:
    """The share of one of `count` image sizes."""

    index: int = 0
    count: int = 1

    def of(self, total: int) -> int:
        """Return how many of `total` things this size has, at least one; without that one they add up to all of them."""
        return max(1, shares(total, self.count)[self.index])

    def seed(self, seed: int) -> int:
        """Return the seed of this size's sources; the first size has that of a run of one size."""
        return (seed + self.index * SEED_STEP) % MAX_SEED

    def used(self, num_used: int | None) -> int | None:
        """Return how many prompts come at this size at all, of a number that all sizes may use together; None for all prompts."""
        return None if num_used is None else self.of(num_used)


WHOLE = Share()


class ExpertTurn:
    """Which of a teacher's two experts is in use, and for how many more batches, whatever size these are of."""

    def __init__(self) -> None:
        self.is_high, self.calls_left = True, 0
