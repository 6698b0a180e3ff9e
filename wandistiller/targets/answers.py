"""The teacher's answers that a student learns from, and `TeacherAnswers`, which asks for them at training states.

A step learns from one global batch. Each process hands out its own part of it, a micro-batch at a time. The other sources of
answers lie beside this one: replay.py, segments.py and cache.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from wandistiller.device import autocast, to_device
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.state_batch import StateBatch
from wandistiller.targets.state_dicts import part_of, with_prefix
from wandistiller.targets.states import States
from wandistiller.wan.prompt_embeds import PromptEmbeds


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the student should answer at a micro-batch of states, with the text it is asked with.

    Attributes:
        latents: x_sigma (B, C, H, W) in model space, on the device.
        sigma: noise levels (B,), on the CPU.
        prompts: index of each state's prompt.
        prompt_embeds: text tokens (B, S, text_dim) of these prompts, padded with zeros, on the device.
        prompt_lengths: how many of the tokens are text (B,), on the device.
        velocity: the target (B, C, H, W), on the device.
        weights: weights (B,) of the samples in the loss, on the CPU.
        features: the teacher's hidden states (B, L, D) after the layers that were asked for, of the channels that were asked for.
            Stored answers have them in bfloat16, or not at all.
        states: the states that were asked about, if the answer still has to move them.
    """

    latents: Tensor
    sigma: Tensor
    prompts: list[int]
    prompt_embeds: Tensor
    prompt_lengths: Tensor
    velocity: Tensor
    weights: Tensor
    features: tuple[Tensor, ...] = ()
    states: StateBatch | None = None

    def released(self) -> "Answer":
        """Return the answer without text and hidden states, which may be gigabytes and which nothing but the loss needs."""
        return replace(self, prompt_embeds=torch.empty(0), prompt_lengths=torch.empty(0), features=())


class Answers(Protocol):
    """A source of answers. A step calls `next` `lanes.num_micro_batches` times.

    The loop calls `advance` once the student has answered too, since the student's velocity may move the states. It asks for
    `state_dict` between steps only. Names in it with LANE_PREFIX hold what belongs to this process's lanes, along their first
    dimension.
    """

    lanes: Lanes

    @property
    def num_calls(self) -> int:
        """Global batches that the teacher has answered."""
        ...

    def next(self) -> Answer: ...

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class HiddenStates:
    """Which of the teacher's hidden states come with its answers.

    Attributes:
        layers: those after which they are taken.
        channels: which of their channels; None for all.
    """

    layers: Sequence[int] = ()
    channels: Sequence[int] | None = None


NO_HIDDEN_STATES = HiddenStates()


class AnswerQueue:
    """Hands out stored answers a micro-batch at a time. The text of a micro-batch is read only when its turn comes.

    Args:
        micro_batch: rows handed out at a time.
    """

    def __init__(self, prompt_embeds: PromptEmbeds, device: str | torch.device, micro_batch: int):
        self.prompt_embeds, self.device, self.micro_batch = prompt_embeds, device, micro_batch
        self._rows: dict[str, Any] = {"prompts": []}  # those that are left

    def __len__(self) -> int:
        """Return how many rows are left."""
        return len(self._rows["prompts"])

    def fill(
        self,
        *,
        latents: Tensor,
        sigma: Tensor,
        prompts: list[int],
        velocity: Tensor,
        weights: Tensor,
        features: Tensor | None = None,
    ) -> None:
        """Take the rows of the next step; `features` (B, layers, L, D) are hidden states, where the store has them."""
        self._rows = {"latents": latents, "sigma": sigma, "prompts": prompts, "velocity": velocity, "weights": weights}
        if features is not None:
            self._rows["features"] = features

    def pop(self) -> Answer:
        """Return the next micro-batch, which is shorter if no more rows are left."""
        rows = {name: values[: self.micro_batch] for name, values in self._rows.items()}
        rest = {name: values[self.micro_batch :] for name, values in self._rows.items()}
        self._rows = rest if rest["prompts"] else {"prompts": []}  # which lets go of the tensors
        prompt_embeds, prompt_lengths = self.prompt_embeds.batch(rows["prompts"], self.device)
        features = rows.pop("features").unbind(dim=1) if "features" in rows else ()
        return Answer(**rows, features=features, prompt_embeds=prompt_embeds, prompt_lengths=prompt_lengths)


class TeacherAnswers:
    """Asks the teacher at each batch of states. Its answer, or the student's, also moves those states on.

    Args:
        hidden_states: which of the teacher's come with the answers.
        student_rollout: share of the paths that follow the student's velocity, at the start and at the end of training.
    """

    def __init__(
        self,
        teacher: Teacher,
        states: States,
        prompt_embeds: PromptEmbeds,
        device: str,
        compute_dtype: torch.dtype,
        *,
        hidden_states: HiddenStates = NO_HIDDEN_STATES,
        student_rollout: tuple[float, float] = (0.0, 0.0),
    ):
        self.states = states
        self.lanes = states.lanes
        self.prompt_embeds = prompt_embeds
        self.device = device
        self.layers, channels = hidden_states.layers, hidden_states.channels
        self.channels = None if channels is None else torch.tensor(channels, device=device)
        self.student_rollout = student_rollout
        self.ask = autocast(teacher.velocity_and_features, device, compute_dtype)
        self.num_calls = 0
        self._batch: StateBatch | None = None  # the global batch in hand
        self._num_parts = 0  # its micro-batches
        self._waiting: list[StateBatch] = []  # micro-batches that the teacher has not answered yet
        self._answered: list[tuple[Tensor, Tensor]] = []  # velocities of the teacher and of the student

    def next(self) -> Answer:
        if not self._waiting:
            self._batch = batch = self.states.draw()
            size, count = self.lanes.micro_batch, len(batch.prompts)
            self._waiting = [batch.part(start, min(start + size, count)) for start in range(0, count, size)]
            self._num_parts = len(self._waiting)
            self.num_calls += 1
        part = self._waiting.pop(0)
        latents = to_device(part.latents, self.device)
        prompt_embeds, prompt_lengths = self.prompt_embeds.batch(part.prompts, self.device)
        velocity, features = self.ask(latents, part.sigma, prompt_embeds, prompt_lengths, self.layers)
        return Answer(
            latents=latents,
            sigma=part.sigma,
            prompts=part.prompts,
            prompt_embeds=prompt_embeds,
            prompt_lengths=prompt_lengths,
            velocity=velocity,
            weights=part.weights,
            features=self._of_channels(features),
            states=part,
        )

    def _of_channels(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.channels is None:
            return features
        return tuple(states[..., self.channels] for states in features)

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        """Move the states once all micro-batches of their batch are answered.

        Args:
            progress: how much of the training is done, from 0 to 1.
        """
        if answer.states is None:
            return
        self._answered.append((answer.velocity, student_velocity))
        if len(self._answered) < self._num_parts:
            return
        velocity, students = (_joined(parts) for parts in zip(*self._answered, strict=True))
        self._answered = []
        start, end = self.student_rollout
        self.states.advance(self._batch, velocity, students, start + (end - start) * progress)

    def state_dict(self) -> dict[str, Tensor]:
        return with_prefix("states.", self.states.state_dict()) | {"num_calls": torch.tensor(self.num_calls)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.num_calls = int(state["num_calls"])
        self.states.load_state_dict(part_of(state, "states."))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
