"""What each optimizer step learns from: when the teacher is asked, and the micro-batches that are drawn from the store."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.walk.store import CAPACITY, Store, is_feature
from wandistiller.walk.walk import Walk
from wandistiller.wan.prompt_embeds import PromptEmbeds

# The first calls are made in a row, so that the first steps do not learn from a few answers alone.
LEAD_CALLS = 8
# The teacher is done after this share of the steps. While the learning rate falls, the student learns from all that is stored.
ASKING_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: states, the text they are asked with, and what the student should answer.

    Attributes:
        latents: x_sigma (B, C, H, W) in model space, on the device.
        sigma: noise levels (B,), on the CPU.
        prompt_embeds: text tokens (B, S, text_dim), padded with zeros, on the device.
        prompt_lengths: how many of the tokens are text (B,), on the device.
        velocity: the target (B, C, H, W), on the device.
        features: the teacher's hidden states (B, L, D) after the layers that were asked for; none where they were not kept.
    """

    latents: Tensor
    sigma: Tensor
    prompt_embeds: Tensor
    prompt_lengths: Tensor
    velocity: Tensor
    features: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """How many calls of the teacher are due at each step of a run of `num_steps` that learns `replay` times from each answer.

    Attributes:
        num_sizes: image sizes that share the room of the store.
    """

    num_steps: int
    replay: int
    num_sizes: int = 1

    @property
    def num_calls(self) -> int:
        """Batches that the teacher answers in all."""
        return math.ceil(self.num_steps / self.replay)

    @property
    def capacity(self) -> int:
        """Answers of a slot that a store has room for; one, where each is learnt from once and right away."""
        return 1 if self.replay == 1 else min(CAPACITY // self.num_sizes, self.num_calls)

    def due(self, step: int) -> int:
        """Return the calls that are to be made by a step (from 0): a few in a row, and then more at the early steps than at the late.

        Without fresh answers no stored one is taken so often that it counts for more than the others.
        """
        asking_steps = self.num_steps - min(
            round((1 - ASKING_SHARE) * self.num_steps), self.capacity * self.replay // 2
        )
        calls = LEAD_CALLS + min(1.0, step / asking_steps) * self.num_calls
        return min(step + 1, math.ceil(calls), self.num_calls)


def with_fresh_features(kept: Tensor | None, fresh: Tensor, fresh_rows: Tensor, rows: range) -> Tensor:
    """Return the hidden states (B, L, D) of a micro-batch: those of fresh answers, and what a store has kept of the others.

    A store may have no room for any. Zeros then stand for them, to which the feature loss gives no weight.
    """
    if len(fresh) == len(rows):
        return fresh
    whole = fresh.new_zeros(len(rows), *fresh.shape[1:]) if kept is None else kept.to(fresh.dtype)
    whole[to_device(fresh_rows - rows.start, fresh.device)] = fresh
    return whole


def make_schedules(num_steps: int, replay: int, num_sizes: int) -> list[Schedule]:
    """Return when the teacher is asked at each image size; the sizes take turns, a step each."""
    counts = [len(range(size, num_steps, num_sizes)) for size in range(num_sizes)]
    return [Schedule(count, replay, num_sizes) for count in counts]


class Batches:
    """The batches of a run, of one image size or of several in turn.

    Args:
        sources: for each image size, its walk with the store that it fills; None with the answers of a cache.
        schedules: when the walk of each size is asked.
        micro_batch: slots of this process that are learnt from at a time.
        segments: for each image size, the segments that the teacher's paths have passed. Walks that gather segments fill these
            stores; beside other walks, every second slot learns from them.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Walk | None, Any]],
        schedules: Sequence[Schedule],
        prompt_embeds: PromptEmbeds,
        micro_batch: int,
        device: str = "cpu",
        segments: Sequence[Store] = (),
        calls_per_answer: int = 1,
    ):
        self.segments, self.calls_per_answer = segments, calls_per_answer
        self.sources, self.schedules, self.prompt_embeds, self.device = sources, schedules, prompt_embeds, device
        slots = len(sources[0][1].slots)
        self.micro_batches = [range(start, start + micro_batch) for start in range(0, slots, micro_batch)]
        self.calls = [0] * len(sources)

    @property
    def num_calls(self) -> int:
        """Global batches that the teacher has answered; one for each step through a segment."""
        return self.calls_per_answer * sum(self.calls)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, whose gradients add up (gradient accumulation)."""
        return len(self.micro_batches)

    def of_step(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of a step (from 0), all of one size. The teacher is asked for those that are due."""
        size, own_step = step % len(self.sources), step // len(self.sources)
        walk, store = self.sources[size]
        due = 0 if walk is None else self.schedules[size].due(own_step)
        for rows in self.micro_batches:
            fresh: dict[str, Tensor] = {}
            for call in range(self.calls[size], due):
                fresh = walk.ask(call, rows)
                store.add(fresh)
                for segment in walk.passed:
                    self.segments[size].add(segment)
            taken = store.sample(own_step, rows)
            if self.segments and not (walk and walk.segments):
                self._mix_in(taken, self.segments[size], own_step, rows)
            for name in filter(is_feature, fresh):
                taken[name] = with_fresh_features(taken.get(name), fresh[name], fresh["rows"], rows)
            yield self._batch(taken)
        self.calls[size] = max(due, self.calls[size])

    def _mix_in(self, taken: dict[str, Tensor], segments: Store, step: int, rows: range) -> None:
        """Let every second slot, the others at the next step, learn from a segment of the teacher's, where it has one."""
        has_one = segments.num_stored[rows.start : rows.stop] > 0
        is_turn = torch.tensor([(segments.slots[row] + step) % 2 == 0 for row in rows])
        if (places := (has_one & is_turn).nonzero()[:, 0]).numel():
            for name, values in segments.sample(step, (rows.start + places).tolist()).items():
                taken[name][to_device(places, values.device)] = values

    def _batch(self, taken: dict[str, Tensor]) -> Batch:
        prompt_embeds, prompt_lengths = self.prompt_embeds.batch(taken["prompts"], self.device)
        features = sorted((name for name in taken if is_feature(name)), key=lambda name: int(name.split(".")[1]))
        return Batch(
            latents=taken["latents"],
            sigma=taken["sigma"],
            prompt_embeds=prompt_embeds,
            prompt_lengths=prompt_lengths,
            velocity=taken["velocity"],
            features=tuple(taken[name] for name in features),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return walks and stores by slots along the first dimension, and the calls of each size as plain numbers."""
        state = {f"{number}.calls": torch.tensor(calls) for number, calls in enumerate(self.calls)}
        for prefix, part in self._parts():
            state |= {f"{prefix}{key}": value for key, value in part.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for prefix, part in self._parts():
            part.load_state_dict(part_of(state, prefix))
        self.calls = [int(state[f"{number}.calls"]) for number in range(len(self.calls))]

    def _parts(self) -> Iterator[tuple[str, Walk | Store]]:
        """Yield what has a state, with the prefix of its names; a cache has none."""
        for number, (walk, store) in enumerate(self.sources):
            if walk is not None:
                yield from ((f"{number}.walk.", walk), (f"{number}.store.", store))
        yield from ((f"{number}.segments.", store) for number, store in enumerate(self.segments))


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
