"""The teacher's answers to train on: each asked for once, learnt from up to R times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wandistiller.prompt_embeds import PromptEmbeds
from wandistiller.states import StateBatch
from wandistiller.teacher import Teacher

REPLAY_BATCHES = 16  # answers kept for further use, in batches: enough that a batch seldom meets its own again


class States(Protocol):
    def draw(self) -> StateBatch: ...
    def advance(self, batch: StateBatch, velocity: Tensor) -> None: ...


@dataclass(frozen=True)
class Answer:
    """What the student is to learn at a batch of states.

    Attributes:
        latents: x_sigma (B, C, H, W) in model space, on the device.
        sigma: (B,) noise levels, on the CPU.
        prompts: index of each state's prompt.
        velocity: the teacher's guided velocity (B, C, H, W), on the device.
    """

    latents: Tensor
    sigma: Tensor
    prompts: list[int]
    velocity: Tensor


class TeacherAnswers:
    """Asks the teacher at the states' next batch; the answer also moves those states on."""

    def __init__(
        self, teacher: Teacher, states: States, prompt_embeds: PromptEmbeds, device: str, compute_dtype: torch.dtype
    ):
        self.states = states
        self.prompt_embeds = prompt_embeds
        self.device = device
        self.velocity = autocast(teacher.velocity, device, compute_dtype)
        self.num_calls = 0

    def next(self) -> Answer:
        batch = self.states.draw()
        latents = batch.latents.to(self.device, non_blocking=True)
        embeds, lengths = self.prompt_embeds.batch(batch.prompts, self.device, torch.float32)
        velocity = self.velocity(latents, batch.sigma, embeds, lengths)
        self.states.advance(batch, velocity)
        self.num_calls += 1
        return Answer(latents, batch.sigma, batch.prompts, velocity)


class ReplayedAnswers:
    """Every answer of `source` `replay` times: once fresh, then shuffled among the last REPLAY_BATCHES batches.

    A student's pass is far cheaper than the guided teacher's call, so each call pays for more than one step. At first the
    store is filled, with a call a step; then one step in `replay` asks anew.
    """

    def __init__(self, source: TeacherAnswers, replay: int, batch_size: int, seed: int = 0):
        self.source = source
        self.replay = replay
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        capacity = REPLAY_BATCHES * batch_size
        self.remaining = torch.zeros(capacity, dtype=torch.long)  # uses left of each place; 0 is an empty one
        self.sigma = torch.zeros(capacity)
        self.prompts = [0] * capacity
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
        prompts = [self.prompts[place] for place in places.tolist()]
        return Answer(self.latents[on_device], self.sigma[places], prompts, self.velocity[on_device])

    def _store(self, answer: Answer) -> None:
        if not len(self.latents):
            shape = (len(self.remaining), *answer.latents.shape[1:])
            self.latents, self.velocity = answer.latents.new_zeros(shape), answer.velocity.new_zeros(shape)
        places = (self.remaining == 0).nonzero().flatten()[: len(answer.prompts)]
        on_device = places.to(self.latents.device)
        self.latents[on_device], self.velocity[on_device] = answer.latents, answer.velocity
        self.sigma[places] = answer.sigma.to(self.sigma)
        self.remaining[places] = self.replay - 1
        for place, prompt in zip(places.tolist(), answer.prompts, strict=True):
            self.prompts[place] = prompt


def autocast(function: Callable[..., Tensor], device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Matrix products in `dtype` over float32 weights; a no-op in float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)(function)
