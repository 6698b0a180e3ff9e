"""The teacher's answers to train on: each asked for once, learnt from up to R times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wandistiller.prompt_embeds import PromptEmbeds
from wandistiller.state_sources import States
from wandistiller.states import StateBatch, part_of
from wandistiller.teacher import Teacher

REPLAY_BATCHES = 16  # answers kept for further use, in batches: enough that a batch seldom meets its own again


@dataclass(frozen=True)
class Answer:
    """What the student is to learn at a batch of states.

    Attributes:
        latents: x_sigma (B, C, H, W) in model space, on the device.
        sigma: (B,) noise levels, on the CPU.
        prompts: index of each state's prompt.
        velocity: what the student is to answer (B, C, H, W), on the device.
        features: the teacher's hidden states (B, L, D) after the layers that were asked for; fresh answers alone have them.
        states: the batch that was asked about, where this answer is yet to move it on.
    """

    latents: Tensor
    sigma: Tensor
    prompts: list[int]
    velocity: Tensor
    features: tuple[Tensor, ...] = ()
    states: StateBatch | None = None


class Answers(Protocol):
    """What the loop learns from. `advance` comes after the student's own pass, whose velocity may move the states."""

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
        self.prompt_embeds = prompt_embeds
        self.device = device
        self.feature_layers = feature_layers
        self.student_rollout = student_rollout
        self.answer = autocast(teacher.velocity_and_features, device, compute_dtype)
        self.num_calls = 0

    def next(self) -> Answer:
        batch = self.states.draw()
        latents = batch.latents.to(self.device, non_blocking=True)
        embeds, lengths = self.prompt_embeds.batch(batch.prompts, self.device, torch.float32)
        velocity, features = self.answer(latents, batch.sigma, embeds, lengths, self.feature_layers)
        self.num_calls += 1
        return Answer(latents, batch.sigma, batch.prompts, velocity, features, batch)

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        """Move the states of a fresh answer; `progress` is the part of the training that is done."""
        if answer.states is None:
            return
        start, end = self.student_rollout
        self.states.advance(answer.states, answer.velocity, student_velocity, start + (end - start) * progress)

    def state_dict(self) -> dict[str, Tensor]:
        states = {f"states.{name}": value for name, value in self.states.state_dict().items()}
        return states | {"num_calls": torch.tensor(self.num_calls)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.num_calls = int(state["num_calls"])
        self.states.load_state_dict(part_of(state, "states."))


class ReplayedAnswers:
    """Every answer of `source` `replay` times: once fresh, then shuffled among the last REPLAY_BATCHES batches.

    A student's pass is far cheaper than the guided teacher's call, so each call pays for more than one step. At first the
    store is filled, with a call a step; then one step in `replay` asks anew.
    """

    def __init__(self, source: Answers, replay: int, batch_size: int, seed: int = 0, device: str = "cpu"):
        self.source = source
        self.device = device
        self.replay = replay
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        capacity = REPLAY_BATCHES * batch_size
        self.remaining = torch.zeros(capacity, dtype=torch.long)  # uses left of each place; 0 is an empty one
        self.sigma = torch.zeros(capacity)
        self.prompts = torch.zeros(capacity, dtype=torch.long)
        self.latents = self.velocity = torch.empty(0)  # shaped by the first answer

    @property
    def num_calls(self) -> int:
        """Batches the teacher has answered."""
        return self.source.num_calls

    def next(self) -> Answer:
        stored = (self.remaining > 0).nonzero().flatten()
        # A new answer comes whenever there is room for one, so that the store stays full and its batches well mixed.
        if len(stored) <= (REPLAY_BATCHES - 1) * self.batch_size:
            answer = self.source.next()
            self._store(answer)
            return answer
        places = stored[torch.randperm(len(stored), generator=self.generator)[: self.batch_size]]
        self.remaining[places] -= 1
        on_device = places.to(self.latents.device)
        return Answer(
            self.latents[on_device], self.sigma[places], self.prompts[places].tolist(), self.velocity[on_device]
        )

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        self.source.advance(answer, student_velocity, progress)

    def _store(self, answer: Answer) -> None:
        if not len(self.latents):
            shape = (len(self.remaining), *answer.latents.shape[1:])
            self.latents, self.velocity = answer.latents.new_zeros(shape), answer.velocity.new_zeros(shape)
        places = (self.remaining == 0).nonzero().flatten()[: len(answer.prompts)]
        on_device = places.to(self.latents.device)
        self.latents[on_device], self.velocity[on_device] = answer.latents, answer.velocity
        self.sigma[places] = answer.sigma.to(self.sigma)
        self.prompts[places] = torch.tensor(answer.prompts)
        self.remaining[places] = self.replay - 1

    def state_dict(self) -> dict[str, Tensor]:
        source = {f"source.{name}": value for name, value in self.source.state_dict().items()}
        own = ("remaining", "sigma", "prompts", "latents", "velocity")
        return source | {name: getattr(self, name).clone() for name in own} | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.source.load_state_dict(part_of(state, "source."))
        for name in ("remaining", "sigma", "prompts"):
            getattr(self, name).copy_(state[name])
        self.latents, self.velocity = (state[name].to(self.device, copy=True) for name in ("latents", "velocity"))
        self.generator.set_state(state["generator"])


def autocast(function: Callable, device: str, dtype: torch.dtype) -> Callable:
    """Matrix products in `dtype` over float32 weights; a no-op in float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)(function)
