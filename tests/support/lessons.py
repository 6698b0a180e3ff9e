"""A tiny student and lessons that no teacher gives: batches that follow from their number alone.

The loop, the state of a run and its checkpoints are tested with these, apart from where training states come from.
"""

from collections.abc import Callable, Iterator

import torch

from support.runs import PRUNED_CONFIG
from support.wan_folders import random_weights
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.training.loop import Observer
from wandistiller.walk.batches import Batch

LATENTS = (16, 4, 4)


def make_student(seed: int = 0, config: dict = PRUNED_CONFIG) -> WanLiteStudent:
    student = WanLiteStudent(StudentConfig.from_dict(config))
    random_weights(student, seed)
    return student


def make_batch(seed: int = 0, size: int = 3, latents: tuple[int, ...] = LATENTS, **changes) -> Batch:
    """A batch of states, prompts of 2, 3, ... tokens and target velocities; fields given in `changes` win."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(size, *latents, generator=generator) for name in ("latents", "velocity")}
    values["sigma"] = torch.rand(size, generator=generator)
    values["prompt_lengths"] = torch.arange(size) + 2
    values["prompt_embeds"] = torch.randn(size, size + 1, 20, generator=generator)
    return Batch(**values | changes)


class Lessons:
    """Gives a batch by the number of its step, of a teacher that is asked every time; stands in for `walk.batches.Batches`.

    Args:
        broken_at: the step, from 1, whose target velocities are infinite.
    """

    num_micro_batches = 1

    def __init__(self, seed: int = 0, size: int = 3, broken_at: int | None = None, **changes):
        self.seed, self.size, self.broken_at, self.changes = seed, size, broken_at, changes
        self.num_calls = 0

    def of_step(self, step: int) -> Iterator[Batch]:
        self.num_calls += 1
        broken = {"velocity": torch.full((self.size, *LATENTS), torch.inf)} if step + 1 == self.broken_at else {}
        yield make_batch(1000 * self.seed + step + 1, self.size, **self.changes | broken)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"num_calls": torch.tensor(self.num_calls)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.num_calls = int(state["num_calls"])


class Watching(Observer):
    """Passes every step, and every student that is to be measured, to a function."""

    def __init__(self, step: Callable = lambda _: None, evaluate: Callable = lambda _: None):
        self.step, self.evaluate = step, lambda student, stage: evaluate(student)
