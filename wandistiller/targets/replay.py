"""Answers that are learnt from more than once: a store of them, which later steps draw from."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.model.image_sizes import shares
from wandistiller.targets.answers import Answer, AnswerQueue, Answers
from wandistiller.targets.shares import WHOLE, Share
from wandistiller.targets.state_dicts import LANE_PREFIX, part_of, with_prefix
from wandistiller.wan.prompt_embeds import PromptEmbeds

# A wide store mixes what a step learns from, so that a few answers are not memorised.
STORED_BATCHES = 256
# The first batches are asked for in a row, so that the first steps do not learn from a few answers alone.
LEAD_BATCHES = 8
# The teacher is done after this share of the steps. While the learning rate falls, the student learns from all that is stored.
ASKING_SHARE = 0.5
# Hidden states are kept beside the answers where those of all processes take no more bytes than this together.
MAX_FEATURE_BYTES = 256 * 2**20


def answered_batches(num_steps: int, replay: int, num_sizes: int = 1) -> int:
    """Return how many batches the teacher answers for so many optimiser steps, which image sizes take in turn."""
    return sum(math.ceil(steps / replay) for steps in shares(num_steps, num_sizes))


def stored_batches(num_steps: int, replay: int, num_sizes: int = 1) -> int:
    """Return how many batches a run of so many optimiser steps has room for, over all of its image sizes."""
    each = zip(shares(STORED_BATCHES, num_sizes), shares(num_steps, num_sizes), strict=True)
    return sum(min(room, answered_batches(steps, replay)) for room, steps in each)


def feature_bytes(num_answers: int, num_layers: int, shape: Sequence[int], num_sizes: int = 1) -> int:
    """Return the bytes that hidden states of this shape (L, D) take beside so many answers; 0 where that is too much to keep.

    Args:
        num_sizes: image sizes that share what may be kept.
    """
    num_bytes = torch.bfloat16.itemsize * num_answers * num_layers * math.prod(shape)
    return num_bytes if num_bytes <= MAX_FEATURE_BYTES // num_sizes else 0


class ReplayedAnswers:
    """Gives the answers of `source` once fresh and then, on average, `replay` - 1 times from a store of the last ones.

    A student's pass is far cheaper than a call of the guided teacher, so each call serves for more than one step. Of all steps
    one in `replay` asks the teacher; these are the first few, and then more of the early ones than of the late. In the other
    steps every lane draws two of its stored answers and gives the one that was given less often. The store takes
    STORED_BATCHES batches at most; a new one then replaces the oldest.

    Args:
        num_steps: global batches that will be given, over which the calls are shared out.
        share: of the store that a run of one image size has.
    """

    _OF_LANES = ("sigma", "prompts", "weights", "latents", "velocity", "features")
    _ON_DEVICE = ("latents", "velocity", "features")

    def __init__(
        self,
        source: Answers,
        prompt_embeds: PromptEmbeds,
        replay: int,
        num_steps: int,
        seed: int = 0,
        device: str = "cpu",
        share: Share = WHOLE,
    ):
        self.source, self.share = source, share
        self.lanes = source.lanes
        self.device = device
        self.total_calls = answered_batches(num_steps, replay)
        # Without fresh answers no stored one is given so often that it counts for more than the others:
        room = share.of(STORED_BATCHES)
        self.asking_steps = num_steps - min(round((1 - ASKING_SHARE) * num_steps), room * replay // 2)
        self.generator = torch.Generator().manual_seed(share.seed(seed))
        self.num_steps = 0  # global batches that were given
        self.num_stored = 0  # of them fresh ones; the n-th is stored in place n % capacity
        self.capacity = min(room, self.total_calls)
        # How often each answer was given, -1 where there is none:
        self.uses = torch.full((self.lanes.total, self.capacity), -1)
        self.sigma = torch.zeros(self.lanes.count, self.capacity)
        self.prompts = torch.zeros(self.lanes.count, self.capacity, dtype=torch.long)
        self.weights = torch.zeros(self.lanes.count, self.capacity)
        # Their shapes come with the first answer; features (lanes, capacity, layers, L, D) stay empty where none are kept.
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
            share_asked = min(1.0, self.num_steps / self.asking_steps)
            is_fresh = self.num_stored < min(self.total_calls, LEAD_BATCHES + share_asked * self.total_calls)
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
            place = self.num_stored % self.capacity
            self.uses[:, place] = -1
            self.uses[:given, place] = 1
            self.num_stored += 1
        return answer

    def _replay(self) -> None:
        """Queue a stored answer of every lane that has one."""
        is_there = self.uses >= 0
        chances = torch.rand(self.uses.shape, generator=self.generator).masked_fill(~is_there, -1.0)
        drawn = chances.topk(min(2, self.capacity), dim=1).indices
        uses = self.uses.gather(1, drawn)
        second = (uses[:, -1] >= 0) & (uses[:, -1] < uses[:, 0])
        places, has_one = torch.where(second, drawn[:, -1], drawn[:, 0]), is_there.any(dim=1)
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
            shape = (self.lanes.count, self.capacity, *answer.latents.shape[1:])
            self.latents, self.velocity = answer.latents.new_zeros(shape), answer.velocity.new_zeros(shape)
            self.features = self._room_for(answer.features)
        rows, place = slice(first, first + len(answer.prompts)), self.num_stored % self.capacity
        self.latents[rows, place] = answer.latents
        self.velocity[rows, place] = answer.velocity
        if len(self.features):
            self.features[rows, place] = torch.stack(answer.features, dim=1).to(self.features)
        self.sigma[rows, place] = answer.sigma.to(self.sigma)
        self.prompts[rows, place] = torch.tensor(answer.prompts)
        self.weights[rows, place] = answer.weights

    def _room_for(self, features: Sequence[Tensor]) -> Tensor:
        """Return room for hidden states like these (B, L, D) of every layer, or none where it would be too large."""
        if not features or not self._keeps_features(len(features), features[0].shape[1:]):
            return torch.empty(0)
        shape = (self.lanes.count, self.capacity, len(features), *features[0].shape[1:])
        return torch.zeros(shape, dtype=torch.bfloat16, device=features[0].device)

    def _keeps_features(self, num_layers: int, shape: Sequence[int]) -> bool:
        return feature_bytes(self.lanes.total * self.capacity, num_layers, shape, self.share.count) > 0

    def state_dict(self) -> dict[str, Tensor]:
        source = with_prefix("source.", self.source.state_dict())
        known = [name for name in self._OF_LANES if len(getattr(self, name))]
        filled = min(self.num_stored, self.capacity)
        own = {f"{LANE_PREFIX}{name}": getattr(self, name)[:, :filled].clone() for name in known}
        counts = {"uses": self.uses[:, :filled].clone(), "counters": torch.tensor([self.num_steps, self.num_stored])}
        return source | own | counts | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.source.load_state_dict(part_of(state, "source."))
        self.num_steps, self.num_stored = state["counters"].tolist()
        filled = state["uses"].shape[1]
        if not filled <= self.num_stored <= self.num_steps or len(state["uses"]) != self.lanes.total:
            raise ValueError("the store of answers does not hold what was stored")
        self.capacity = max(self.capacity, filled)  # of a run that was longer
        self.uses = self._with_room(state["uses"], "cpu", empty=-1)
        for name, value in part_of(state, LANE_PREFIX).items():
            if name == "features" and not self._keeps_features(value.shape[2], value.shape[3:]):
                continue  # the run has become longer, and its store too large for them
            setattr(self, name, self._with_room(value, self.device if name in self._ON_DEVICE else "cpu"))
        self.generator.set_state(state["generator"])

    def _with_room(self, filled: Tensor, device: str, empty: int = 0) -> Tensor:
        """Return what was stored (lanes, filled, ...) with the places (lanes, capacity, ...) that are still empty."""
        shape = (len(filled), self.capacity, *filled.shape[2:])
        stored = torch.full(shape, empty, dtype=filled.dtype, device=device)
        stored[:, : filled.shape[1]] = filled
        return stored
