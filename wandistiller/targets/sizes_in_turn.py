"""Answers at several image sizes: a source of answers for each, which take turns, so that every batch is of one size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wandistiller.targets.answers import Answer, Answers
from wandistiller.targets.state_dicts import part_of, with_prefix


class SizesInTurn:
    """Gives a step's answers at one size after another, in the same order all the time, and in all processes.

    Args:
        by_size: a source for each size, with its share of what a run of one size would keep (shares.py).
    """

    def __init__(self, by_size: Sequence[Answers]):
        self.by_size = by_size
        self.lanes = by_size[
            0
        ].lanes  # others differ only in a cache of fewer answers than lanes, which has one micro-batch too
        self.num_steps = 0  # that were begun
        self._micro_batches_left = 0

    @property
    def num_calls(self) -> int:
        return sum(source.num_calls for source in self.by_size)

    @property
    def _current(self) -> Answers:
        return self.by_size[(self.num_steps - 1) % len(self.by_size)]

    def next(self) -> Answer:
        if not self._micro_batches_left:
            self.num_steps += 1
            self._micro_batches_left = self.lanes.num_micro_batches
        self._micro_batches_left -= 1
        return self._current.next()

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        """Move the states of the size that has just been answered."""
        self._current.advance(answer, student_velocity, progress)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"num_steps": torch.tensor(self.num_steps)}
        for number, source in enumerate(self.by_size):
            state |= with_prefix(f"sizes.{number}.", source.state_dict())
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.num_steps = int(state["num_steps"])
        for number, source in enumerate(self.by_size):
            source.load_state_dict(part_of(state, f"sizes.{number}."))
