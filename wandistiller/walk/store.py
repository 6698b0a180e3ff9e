"""The store of answers that steps learn from: each answer serves several steps, since a student's pass is far cheaper than a call."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.walk.draws import SAMPLE, rng

# A wide store mixes what a step learns from, so that a few answers are not memorised.
CAPACITY = 256
# Hidden states are kept beside the answers where those of all processes take no more bytes than this together.
MAX_FEATURE_BYTES = 256 * 2**20
ON_HOST = ("sigma", "prompts")  # of an answer, what steps take from the CPU


def feature_bytes(num_answers: int, num_layers: int, shape: Sequence[int], num_sizes: int = 1) -> int:
    """Return the bytes of hidden states of this shape (L, D) beside so many answers; 0 where that is too much to keep.

    Args:
        num_sizes: image sizes that share what may be kept.
    """
    num_bytes = torch.bfloat16.itemsize * num_answers * num_layers * math.prod(shape)
    return num_bytes if num_bytes <= MAX_FEATURE_BYTES // num_sizes else 0


def is_feature(name: str) -> bool:
    """Return whether a tensor of an answer holds the hidden states of a layer."""
    return name.startswith("features.")


class Store:
    """The newest answers of every slot.

    A step takes a slot's newest answer if none has learnt from it yet, and else, of two that are drawn, the one that was taken less
    often. So every answer is learnt from, and all about as often.

    Args:
        capacity: answers of a slot; a new one then replaces the oldest.
        slots: a range, of `batch_size` in all.
        key: (seed, number of the image size).
        device: where steps learn.
        num_sizes: image sizes that share the memory of hidden states.
        kept_on: where answers are kept; on the host the GPU has room for other things, and every answer waits to be brought there.
    """

    def __init__(
        self,
        capacity: int,
        slots: range,
        batch_size: int,
        key: tuple[int, int],
        device: str = "cpu",
        num_sizes: int = 1,
        kept_on: str | None = None,
    ):
        self.capacity, self.slots, self.batch_size, self.key = capacity, slots, batch_size, key
        self.device, self.num_sizes, self.kept_on = device, num_sizes, kept_on or device
        self.rows: dict[str, Tensor] = {}  # (slots, capacity, ...); their shapes come with the first answer
        self.uses = torch.zeros(len(slots), capacity, dtype=torch.long)
        self.num_stored = torch.zeros(len(slots), dtype=torch.long)  # includes those that were replaced since

    def add(self, answer: dict[str, Tensor]) -> None:
        """Keep an answer of some of the slots: what `Walk.ask` returns."""
        if not answer:
            return
        rows = answer["rows"]
        places = self.num_stored[rows] % self.capacity
        for name, value in self._kept(answer, 1).items():
            if name not in self.rows:
                shape, dtype = value.shape[1:], torch.bfloat16 if is_feature(name) else value.dtype
                place = "cpu" if name in ON_HOST else self.kept_on
                self.rows[name] = torch.zeros(len(self.slots), self.capacity, *shape, dtype=dtype, device=place)
            kept = self.rows[name]
            kept[to_device(rows, kept.device), to_device(places, kept.device)] = value.to(kept.device, kept.dtype)
        self.uses[rows, places] = 0
        self.num_stored[rows] += 1

    def sample(self, step: int, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return an answer of each of these slots for a step: latents, sigma, prompts, velocity, and features where they are kept."""
        own = torch.tensor(rows)
        stored = self.num_stored[own].clamp(max=self.capacity)
        chances = torch.from_numpy(rng(*self.key, SAMPLE, step).random((self.batch_size, 2)))
        drawn = (chances[torch.tensor(self.slots)[own] % self.batch_size] * stored[:, None]).long()
        uses = self.uses[own[:, None], drawn]
        places = torch.where(uses[:, 1] < uses[:, 0], drawn[:, 1], drawn[:, 0])
        newest = (self.num_stored[own] - 1) % self.capacity
        places = torch.where(self.uses[own, newest] == 0, newest, places)
        self.uses[own, places] += 1
        taken = {
            name: values[to_device(own, values.device), to_device(places, values.device)]
            for name, values in self.rows.items()
        }
        return {name: value if name in ON_HOST else to_device(value, self.device) for name, value in taken.items()}

    def _kept(self, answer: dict[str, Tensor], first_dim: int) -> dict[str, Tensor]:
        """Return what is kept of an answer: hidden states, whose shape (L, D) begins at `first_dim`, if they have room and come again."""
        features = [value for name, value in answer.items() if is_feature(name)]
        num_answers, shape = self.batch_size * self.capacity, features[0].shape[first_dim:] if features else ()
        has_room = self.capacity > 1 and feature_bytes(num_answers, len(features), shape, self.num_sizes) > 0
        return {name: value for name, value in answer.items() if name != "rows" and (has_room or not is_feature(name))}

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything, no copies, by slots along the first dimension, without the places that are still empty."""
        filled = int(self.num_stored.max().clamp(max=self.capacity))
        rows = {f"rows.{name}": values[:, :filled] for name, values in self.rows.items()}
        return rows | {"uses": self.uses[:, :filled], "num_stored": self.num_stored}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        rows = {name.removeprefix("rows."): values for name, values in state.items() if name.startswith("rows.")}
        self.capacity = max(self.capacity, state["uses"].shape[1])  # of a run that was longer
        self.num_stored = state["num_stored"].clone()
        self.uses = self._with_room(state["uses"], "cpu")
        for name, values in self._kept(rows, 2).items():  # those of a shorter run may have no room in a longer one
            self.rows[name] = self._with_room(values, "cpu" if name in ON_HOST else self.kept_on)

    def _with_room(self, filled: Tensor, device: str) -> Tensor:
        """Return what was stored (slots, filled, ...) with the places (slots, capacity, ...) that are still empty."""
        stored = torch.zeros(len(filled), self.capacity, *filled.shape[2:], dtype=filled.dtype, device=device)
        stored[:, : filled.shape[1]] = filled
        return stored
