"""Answers that are learnt from more than once: a store of the last ones, which later steps draw from."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.targets.answers import Answer, AnswerQueue, Answers
from wandistiller.targets.state_dicts import LANE_PREFIX, part_of, with_prefix
from wandistiller.wan.prompt_embeds import PromptEmbeds

# So many batches are kept for further use that answers of one call seldom meet again.
REPLAY_BATCHES = 16
# Hidden states are kept beside the answers, in bfloat16, where all of this process's take no more bytes than this.
MAX_FEATURE_BYTES = 2 * 2**30


def unused_answers(replay: int) -> float:
    """Return in how many batches' uses a run ends early: its store is left full, of answers with half of theirs before them."""
    return (REPLAY_BATCHES - 1) * replay / 2 if replay > 1 else 0


def expected_calls(num_steps: int, replay: int) -> int:
    """Return about how many batches the teacher answers for so many optimiser steps; the first steps fill the store."""
    at_least = REPLAY_BATCHES if replay > 1 else 1
    return min(num_steps, max(at_least, math.ceil((num_steps + unused_answers(replay)) / replay)))


def expected_steps(num_calls: int, replay: int) -> int:
    """Return for how many optimiser steps the teacher answers about so many batches."""
    return max(num_calls, round(num_calls * replay - unused_answers(replay)))


def feature_bytes(num_lanes: int, num_layers: int, shape: Sequence[int]) -> int:
    """Return the bytes that hidden states of this shape (L, D) take in the store of so many lanes."""
    return 2 * num_lanes * REPLAY_BATCHES * num_layers * math.prod(shape)


class ReplayedAnswers:
    """Gives every answer of `source` `replay` times: once fresh, then shuffled among the last REPLAY_BATCHES of its lane.

    A student's pass is far cheaper than a call of the guided teacher, so each call serves for more than one step. The first
    steps fill the store with a call each; from then on one step in `replay` asks the teacher.
    """

    _OF_LANES = ("sigma", "prompts", "weights", "latents", "velocity", "features")
    _ON_DEVICE = ("latents", "velocity", "features")

    def __init__(self, source: Answers, prompt_embeds: PromptEmbeds, replay: int, seed: int = 0, device: str = "cpu"):
        self.source = source
        self.lanes = source.lanes
        self.device = device
        self.replay = replay
        self.generator = torch.Generator().manual_seed(seed)
        # How often each answer may still be used; 0 is an empty place:
        self.remaining = torch.zeros(self.lanes.total, REPLAY_BATCHES, dtype=torch.long)
        self.sigma = torch.zeros(self.lanes.count, REPLAY_BATCHES)
        self.prompts = torch.zeros(self.lanes.count, REPLAY_BATCHES, dtype=torch.long)
        self.weights = torch.zeros(self.lanes.count, REPLAY_BATCHES)
        # Their shapes come with the first answer; features (lanes, REPLAY_BATCHES, layers, L, D) stay empty where none are kept.
        self.latents = self.velocity = self.features = torch.empty(0)
        self._replayed = AnswerQueue(prompt_embeds, device, self.lanes.micro_batch)
        self._num_fresh = 0  # micro-batches of a fresh batch that the source has not given yet
        self._places = torch.empty(0, dtype=torch.long)  # where the fresh batch in hand is stored

    @property
    def num_calls(self) -> int:
        return self.source.num_calls

    def next(self) -> Answer:
        if self._replayed:
            return self._replayed.pop()
        if not self._num_fresh:
            # A new answer comes whenever there is room for it, so that the store stays full and its batches well mixed.
            is_full = (self.remaining > 0).all(dim=1).any()
            if is_full:
                self._replay()
                return self._replayed.pop()
            self._num_fresh = self.lanes.num_micro_batches
            self._places = (self.remaining == 0).int().argmax(dim=1)
        first = (self.lanes.num_micro_batches - self._num_fresh) * self.lanes.micro_batch
        self._num_fresh -= 1
        answer = self.source.next()
        self._store(answer, first)
        if not self._num_fresh:
            # A short batch has rows of the first lanes only; padded lanes have no short batches.
            given = self.lanes.total if self.lanes.pads else len(answer.prompts)
            self.remaining[torch.arange(given), self._places[:given]] = self.replay - 1
        return answer

    def _replay(self) -> None:
        """Queue a stored answer of every lane that has one left."""
        chances = torch.rand(self.remaining.shape, generator=self.generator).masked_fill(self.remaining == 0, -1.0)
        places, has_one = chances.argmax(dim=1), (self.remaining > 0).any(dim=1)
        self.remaining[has_one, places[has_one]] -= 1
        is_used = self.lanes.local(has_one)
        rows = torch.arange(self.lanes.count) if self.lanes.pads else is_used.nonzero().flatten()
        places = self.lanes.local(places)[rows]
        on_device, places_there = (to_device(indices, self.latents.device) for indices in (rows, places))
        self._replayed.fill(
            latents=self.latents[on_device, places_there],
            sigma=self.sigma[rows, places],
            prompts=self.prompts[rows, places].tolist(),
            velocity=self.velocity[on_device, places_there],
            weights=self.weights[rows, places] * is_used[rows],
            features=self.features[on_device, places_there] if len(self.features) else None,
        )

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        self.source.advance(answer, student_velocity, progress)

    def _store(self, answer: Answer, first: int) -> None:
        """Keep a fresh answer, whose rows are this process's lanes from `first` on."""
        if not len(self.latents):
            shape = (self.lanes.count, REPLAY_BATCHES, *answer.latents.shape[1:])
            self.latents, self.velocity = answer.latents.new_zeros(shape), answer.velocity.new_zeros(shape)
            self.features = self._room_for(answer.features)
        rows = torch.arange(first, first + len(answer.prompts))
        places = self.lanes.local(self._places)[rows]
        on_device, places_there = (to_device(indices, self.latents.device) for indices in (rows, places))
        self.latents[on_device, places_there] = answer.latents
        self.velocity[on_device, places_there] = answer.velocity
        if len(self.features):
            self.features[on_device, places_there] = torch.stack(answer.features, dim=1).to(self.features)
        self.sigma[rows, places] = answer.sigma.to(self.sigma)
        self.prompts[rows, places] = torch.tensor(answer.prompts)
        self.weights[rows, places] = answer.weights

    def _room_for(self, features: Sequence[Tensor]) -> Tensor:
        """Return room for hidden states like these (B, L, D) of every layer, or none where it would be too large."""
        if not features or feature_bytes(self.lanes.count, len(features), features[0].shape[1:]) > MAX_FEATURE_BYTES:
            return torch.empty(0)
        shape = (self.lanes.count, REPLAY_BATCHES, len(features), *features[0].shape[1:])
        return torch.zeros(shape, dtype=torch.bfloat16, device=features[0].device)

    def state_dict(self) -> dict[str, Tensor]:
        source = with_prefix("source.", self.source.state_dict())
        known = [name for name in self._OF_LANES if len(getattr(self, name))]
        own = {f"{LANE_PREFIX}{name}": getattr(self, name).clone() for name in known}
        return source | own | {"remaining": self.remaining.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.source.load_state_dict(part_of(state, "source."))
        self.remaining.copy_(state["remaining"])
        for name, value in part_of(state, LANE_PREFIX).items():
            device = self.device if name in self._ON_DEVICE else "cpu"
            setattr(self, name, value.to(device, copy=True))
        self.generator.set_state(state["generator"])
