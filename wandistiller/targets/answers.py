"""The teacher's answers to train on: each asked for once, learnt from up to R times.

A step learns from one global batch. Each process hands out its own part of it, a micro-batch at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.states import States
from wandistiller.targets.trajectories import StateBatch, part_of
from wandistiller.wan.prompt_embeds import PromptEmbeds


@dataclass(frozen=True)
class Answer:
    """What the student is to learn at a micro-batch of states.

    Attributes:
        latents: x_sigma (B, C, H, W) in model space, on the device.
        sigma: (B,) noise levels, on the CPU.
        prompts: index of each state's prompt.
        velocity: what the student is to answer (B, C, H, W), on the device.
        features: the teacher's hidden states (B, L, D) after the layers that were asked for; fresh answers alone have them.
        states: the states that were asked about, where this answer is yet to move them on.
        weights: (B,) of the samples in the loss, 1 all over unless given.
    """

    latents: Tensor
    sigma: Tensor
    prompts: list[int]
    velocity: Tensor
    features: tuple[Tensor, ...] = ()
    states: StateBatch | None = None
    weights: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self):
        if not len(self.weights):
            object.__setattr__(self, "weights", torch.ones(len(self.prompts)))

    def split(self, size: int) -> list["Answer"]:
        """Micro-batches of `size` rows, of an answer without features."""
        parts = [slice(start, start + size) for start in range(0, len(self.prompts), size)]
        names = ("latents", "sigma", "prompts", "velocity", "weights")
        return [Answer(**{name: getattr(self, name)[rows] for name in names}) for rows in parts]


class Answers(Protocol):
    """What the loop learns from, a micro-batch a call of `next`, `lanes.num_micro_batches` of them a step.

    `advance` comes after the student's own pass on each, whose velocity may move the states. `state_dict` is asked for
    between steps; names with LANE_PREFIX hold what belongs to this process's lanes, along their first dimension.
    """

    lanes: Lanes

    @property
    def num_calls(self) -> int: ...

    def next(self) -> Answer: ...

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class TeacherAnswers:
    """Asks the teacher at the states' next batch; the answer, or the student's, also moves those states on.

    Args:
        feature_layers: teacher layers whose output the answers bring along.
        student_rollout: share of the paths that follow the student's velocity, at the start and at the end of training.

    Attributes:
        num_calls: global batches that the teacher has answered.
    """

    def __init__(
        self,
        teacher: Teacher,
        states: States,
        prompt_embeds: PromptEmbeds,
        device: str,
        compute_dtype: torch.dtype,
        *,
        feature_layers: Sequence[int] = (),
        student_rollout: tuple[float, float] = (0.0, 0.0),
    ):
        self.states = states
        self.lanes = states.lanes
        self.prompt_embeds = prompt_embeds
        self.device = device
        self.feature_layers = feature_layers
        self.student_rollout = student_rollout
        self.answer = autocast(teacher.velocity_and_features, device, compute_dtype)
        self.num_calls = 0
        self._batch: StateBatch | None = None  # the one in hand
        self._num_parts = 0  # micro-batches of it
        self._waiting: list[StateBatch] = []  # those that are yet to be answered
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
        embeds, lengths = self.prompt_embeds.batch(part.prompts, self.device, torch.float32)
        velocity, features = self.answer(latents, part.sigma, embeds, lengths, self.feature_layers)
        return Answer(latents, part.sigma, part.prompts, velocity, features, part, part.weights)

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        """Move the states once the whole of their batch is answered; `progress` is the part of the training that is done."""
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
        states = {f"states.{name}": value for name, value in self.states.state_dict().items()}
        return states | {"num_calls": torch.tensor(self.num_calls)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.num_calls = int(state["num_calls"])
        self.states.load_state_dict(part_of(state, "states."))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def autocast(function: Callable, device: str, dtype: torch.dtype) -> Callable:
    """Matrix products in `dtype` over float32 weights; a no-op in float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)(function)
