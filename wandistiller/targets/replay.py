"""Answers that are learnt from more than once: a store of them, which later steps draw from."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.targets.answers import Answer, AnswerQueue, Answers
from wandistiller.targets.state_dicts import LANE_PREFIX, part_of, with_prefix
from wandistiller.wan.prompt_embeds import PromptEmbeds

# A wide store mixes what a step learns from, and what was answered last is not memorised while the learning rate falls.
STORED_BATCHES = 128
# So many batches are asked for beyond one in `replay` steps, so that the first steps do not learn from a few answers alone.
LEAD_BATCHES = 8
# Hidden states are kept beside the answers where all of this process's take no more bytes than this.
MAX_FEATURE_BYTES = 256 * 2**20


def expected_calls(num_steps: int, replay: int) -> int:
    """Return how many batches the teacher answers for so many optimiser steps."""
    return min(num_steps, math.ceil(num_steps / replay) + (LEAD_BATCHES if replay > 1 else 0))


def expected_steps(num_calls: int, replay: int) -> int:
    """Return for how many optimiser steps the teacher answers so many batches."""
    return max(num_calls, (num_calls - (LEAD_BATCHES if replay > 1 else 0)) * replay)


def feature_bytes(num_lanes: int, num_layers: int, shape: Sequence[int]) -> int:
    """Return the bytes that hidden states of this shape (L, D) take in the store of so many lanes."""
    return torch.bfloat16.itemsize * num_lanes * STORED_BATCHES * num_layers * math.prod(shape)


class ReplayedAnswers:
    """Gives the answers of `source` once fresh and then, on average, `replay` - 1 times from a store of the last ones.

    A student's pass is far cheaper than a call of the guided teacher, so each call serves for more than one step: one step in
    `replay` asks the teacher, and the first ones. In the other steps every lane draws two of its stored answers and gives the
    one that was given less often. The store takes STORED_BATCHES batches; a new one then replaces the oldest.
    """

    _OF_LANES = ("sigma", "prompts", "weights", "latents", "velocity", "features")
    _ON_DEVICE = ("latents", "velocity", "features")

    def __init__(self, source: Answers, prompt_embeds: PromptEmbeds, replay: int, seed: int = 0, device: str = "cpu"):
        self.source = source
        self.lanes = source.lanes
        self.device = device
        self.replay = replay
        self.generator = torch.Generator().manual_seed(seed)
        self.num_steps = 0  # global batches that were given
        self.num_stored = 0  # of them fresh ones; batch n is stored in place n % STORED_BATCHES
        # How often each answer was given, -1 where there is none:
        self.uses = torch.full((self.lanes.total, STORED_BATCHES), -1)
        self.sigma = torch.zeros(self.lanes.count, STORED_BATCHES)
        self.prompts = torch.zeros(self.lanes.count, STORED_BATCHES, dtype=torch.long)
        self.weights = torch.zeros(self.lanes.count, STORED_BATCHES)
        # Their shapes come with the first answer; features (lanes, STORED_BATCHES, layers, L, D) stay empty where none are kept.
        self.latents = self.velocity = self.features = torch.empty(0)
        self._replayed = AnswerQueue(prompt_embeds, device, self.lanes.micro_batch)
        self._num_fresh = 0  # micro-batches of a fresh batch that the source has not given yet

    @property
    def num_calls(self) -> int:
        return self.source.num_calls

    def next(self) -> Answer:
        if self._replayed:
            return self._replayed.pop()
        if not self._num_fresh:
            is_fresh = self.num_stored < expected_calls(self.num_steps + 1, self.replay)
            self.num_steps += 1
            if not is_fresh:
                self._replay()
                return self._replayed.pop()
            self._num_fresh = self.lanes.num_micro_batches
        first = (self.lanes.num_micro_batches - self._num_fresh) * self.lanes.micro_batch
        self._num_fresh -= 1
        answer = self.source.next()
        self._store(answer, first)
        if not self._num_fresh:
            # A short batch has rows of the first lanes only; padded lanes have no short batches.
            given = self.lanes.total if self.lanes.pads else len(answer.prompts)
            place = self.num_stored % STORED_BATCHES
            self.uses[:, place] = -1
            self.uses[:given, place] = 1
            self.num_stored += 1
        return answer

    def _replay(self) -> None:
        """Queue a stored answer of every lane that has one."""
        is_there = self.uses >= 0
        chances = torch.rand(self.uses.shape, generator=self.generator).masked_fill(~is_there, -1.0)
        drawn = chances.topk(2, dim=1).indices
        uses = self.uses.gather(1, drawn)
        second = (uses[:, 1] >= 0) & (uses[:, 1] < uses[:, 0])
        places, has_one = torch.where(second, drawn[:, 1], drawn[:, 0]), is_there.any(dim=1)
        self.uses[has_one, places[has_one]] += 1
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
            shape = (self.lanes.count, STORED_BATCHES, *answer.latents.shape[1:])
            self.latents, self.velocity = answer.latents.new_zeros(shape), answer.velocity.new_zeros(shape)
            self.features = self._room_for(answer.features)
        rows, place = slice(first, first + len(answer.prompts)), self.num_stored % STORED_BATCHES
        self.latents[rows, place] = answer.latents
        self.velocity[rows, place] = answer.velocity
        if len(self.features):
            self.features[rows, place] = torch.stack(answer.features, dim=1).to(self.features)
        self.sigma[rows, place] = answer.sigma.to(self.sigma)
        self.prompts[rows, place] = torch.tensor(answer.prompts)
        self.weights[rows, place] = answer.weights

    def _room_for(self, features: Sequence[Tensor]) -> Tensor:
        """Return room for hidden states like these (B, L, D) of every layer, or none where it would be too large."""
        if not features or feature_bytes(self.lanes.count, len(features), features[0].shape[1:]) > MAX_FEATURE_BYTES:
            return torch.empty(0)
        shape = (self.lanes.count, STORED_BATCHES, len(features), *features[0].shape[1:])
        return torch.zeros(shape, dtype=torch.bfloat16, device=features[0].device)

    def state_dict(self) -> dict[str, Tensor]:
        source = with_prefix("source.", self.source.state_dict())
        known = [name for name in self._OF_LANES if len(getattr(self, name))]
        # Only places that were ever filled are saved:
        filled = min(self.num_stored, STORED_BATCHES)
        own = {f"{LANE_PREFIX}{name}": getattr(self, name)[:, :filled].clone() for name in known}
        counts = {"uses": self.uses[:, :filled].clone(), "counters": torch.tensor([self.num_steps, self.num_stored])}
        return source | own | counts | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.source.load_state_dict(part_of(state, "source."))
        self.num_steps, self.num_stored = state["counters"].tolist()
        filled = state["uses"].shape[1]
        self.uses[:, :filled] = state["uses"]
        for name, value in part_of(state, LANE_PREFIX).items():
            device = self.device if name in self._ON_DEVICE else "cpu"
            shape = (self.lanes.count, STORED_BATCHES, *value.shape[2:])
            whole = torch.zeros(shape, dtype=value.dtype, device=device)
            whole[:, :filled] = value
            setattr(self, name, whole)
        self.generator.set_state(state["generator"])
