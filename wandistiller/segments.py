"""What a student of few steps is to answer: the average velocity over a whole segment of the teacher's path."""

import torch
from torch import Tensor

from wandistiller.answers import Answer, autocast
from wandistiller.flow import sigma_to_timestep
from wandistiller.prompt_embeds import PromptEmbeds
from wandistiller.prompt_order import PromptOrder
from wandistiller.states import POOL_BATCHES, part_of
from wandistiller.student import WanLiteStudent
from wandistiller.teacher import Teacher


class SegmentAnswers:
    """Sampling paths cut into N segments; the target at the start of a segment is where the teacher's path leaves it.

    At x_start the student is to answer (x_end - x_start) / (sigma_end - sigma_start), so that one Euler step lands on the
    segment's end (the average velocity of progressive distillation, arXiv 2202.00512). The teacher walks a segment in
    several steps, so a target costs several calls. The next segment starts where the teacher arrived or, for a share of the
    paths, where the student's own step lands, so that it learns from the states it will meet.

    Args:
        segment_sigmas: (N + 1,) falling from 1 to 0, the noise levels of the student's sampler.
        num_teacher_steps: of the teacher's whole path; every segment gets its part of them.
        student_rollout: share of the paths that go on from the student's own states, at the start and end of training.
    """

    _TENSORS = ("prompts", "segments", "positions", "lots", "grids", "starts", "latents", "before")

    def __init__(
        self,
        teacher: Teacher,
        student: WanLiteStudent,
        prompt_embeds: PromptEmbeds,
        latent_shape: tuple[int, int, int],
        num_prompts: int,
        batch_size: int,
        *,
        segment_sigmas: Tensor,
        num_teacher_steps: int,
        student_rollout: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        device: str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
    ):
        self.prompt_embeds = prompt_embeds
        self.latent_shape = latent_shape
        self.batch_size = batch_size
        self.segment_sigmas = segment_sigmas.float()
        self.num_segments = len(segment_sigmas) - 1
        self.num_steps = max(1, round(num_teacher_steps / self.num_segments))  # of a segment
        self.student_rollout = student_rollout
        self.device = device
        self.teacher_velocity = autocast(teacher.velocity, device, compute_dtype)
        self.student_forward = autocast(student, device, compute_dtype)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = PromptOrder(num_prompts, seed)
        self.progress = 0.0
        self.num_calls = 0

        pool = POOL_BATCHES * batch_size
        self.prompts = torch.zeros(pool, dtype=torch.long)
        self.segments = torch.zeros(pool, dtype=torch.long)
        self.positions = torch.zeros(pool, dtype=torch.long)
        self.lots = torch.zeros(pool)
        self.grids = torch.zeros(pool, self.num_steps + 1)  # noise levels of the teacher's steps through the segment
        self.starts = torch.zeros(pool, *latent_shape, device=device)  # x where the segment starts
        self.latents = torch.zeros(pool, *latent_shape, device=device)  # x where the teacher is now
        self.before = torch.zeros(pool, *latent_shape, device=device)  # its velocity one step ago
        self.ready = _no_targets(latent_shape, device)
        for slot in range(pool):
            self._start_path(slot)

    def next(self) -> Answer:
        """A random batch of the targets that are known; the teacher is asked until there are enough of them."""
        if self.num_calls == 0:
            self._spread()
        while len(self.ready["sigma"]) < 2 * self.batch_size:  # more than a batch, so that batches mix paths
            self._ask()
        order = torch.randperm(len(self.ready["sigma"]), generator=self.generator)
        taken, kept = order[: self.batch_size], order[self.batch_size :]
        batch = {name: value[taken.to(value.device)] for name, value in self.ready.items()}
        self.ready = {name: value[kept.to(value.device)] for name, value in self.ready.items()}
        return Answer(batch["latents"], batch["sigma"], batch["prompts"].tolist(), batch["velocity"])

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        """The paths move when the teacher is asked; this only notes the part of the training that is done."""
        self.progress = progress

    def _spread(self) -> None:
        """One long step of the teacher to the start of a segment of its own, for every path: all segments are taught from
        the first steps on."""
        for slots in torch.arange(len(self.lots)).split(self.batch_size):
            segments = slots % self.num_segments
            velocity = self._velocity(slots, self.starts[slots], torch.ones(len(slots)))
            sigma = self.segment_sigmas[segments]
            starts = self.starts[slots] + (sigma - 1).to(velocity)[:, None, None, None] * velocity
            for slot, segment, start in zip(slots.tolist(), segments.tolist(), starts, strict=True):
                self._start_segment(slot, segment, start)

    def _velocity(self, slots: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        self.num_calls += 1
        embeds, lengths = self.prompt_embeds.batch(self.prompts[slots].tolist(), self.device, torch.float32)
        return self.teacher_velocity(latents, sigma, embeds, lengths)

    def _ask(self) -> None:
        """One step of the teacher on a batch of paths, spread over the noise levels."""
        sigmas = self.grids.gather(1, self.positions[:, None])[:, 0]
        edges = torch.linspace(0, len(sigmas), self.batch_size + 1).long()
        picks = edges[:-1] + (torch.rand(self.batch_size, generator=self.generator) * edges.diff()).long()
        slots = sigmas.argsort()[picks]
        positions, sigma = self.positions[slots], sigmas[slots]
        latents = self.latents[slots]
        velocity = self._velocity(slots, latents, sigma)

        # Adams-Bashforth of order two, Euler on the first step of a segment: no call more, and a nearer end.
        step = self.grids[slots, positions + 1] - sigma
        step_before = sigma - self.grids[slots, (positions - 1).clamp(min=0)]
        slope = torch.where(positions == 0, 0.0, step / (2 * torch.where(positions == 0, 1.0, step_before)))
        weight, step = (value.to(velocity)[:, None, None, None] for value in (slope, step))
        self.latents[slots] = latents + step * (velocity + weight * (velocity - self.before[slots]))
        self.before[slots] = velocity
        self.positions[slots] += 1
        arrived = slots[self.positions[slots] == self.num_steps]
        if len(arrived):
            self._finish(arrived)

    def _finish(self, slots: Tensor) -> None:
        """Give the starts of these segments their targets, and start the next ones."""
        starts, ends, sigma = self.starts[slots], self.latents[slots], self.grids[slots, 0]
        length = (self.grids[slots, -1] - sigma).to(starts)[:, None, None, None]
        targets = {
            "latents": starts,
            "velocity": (ends - starts) / length,
            "sigma": sigma,
            "prompts": self.prompts[slots],
        }
        self.ready = {name: torch.cat([value, targets[name]]) for name, value in self.ready.items()}

        start, end = self.student_rollout
        is_students = self.lots[slots] < start + (end - start) * self.progress
        goes_on = self.segments[slots] + 1 < self.num_segments
        if (is_students & goes_on).any():
            chosen = is_students.to(starts.device)[:, None, None, None]
            ends = torch.where(chosen, starts + length * self._student_velocity(slots, starts, sigma), ends)
        for slot, latents, has_next in zip(slots.tolist(), ends, goes_on.tolist(), strict=True):
            if has_next:
                self._start_segment(slot, int(self.segments[slot]) + 1, latents)
            else:
                self._start_path(slot)

    @torch.no_grad()
    def _student_velocity(self, slots: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
        embeds, lengths = self.prompt_embeds.batch(self.prompts[slots].tolist(), self.device, torch.float32)
        return self.student_forward(latents, sigma_to_timestep(sigma).to(self.device), embeds, lengths).float()

    def _start_path(self, slot: int) -> None:
        self.prompts[slot] = self.order.take(1)[0]
        self.lots[slot] = torch.rand((), generator=self.generator)
        self._start_segment(slot, 0, torch.randn(self.latent_shape, generator=self.generator))

    def _start_segment(self, slot: int, segment: int, latents: Tensor) -> None:
        """The levels between its ends are moved by a random part of a step, so that they differ from path to path."""
        start, end = self.segment_sigmas[segment : segment + 2].tolist()
        grid = torch.linspace(start, end, self.num_steps + 1)
        grid[1:-1] += (torch.rand((), generator=self.generator) - 0.5) * (end - start) / self.num_steps
        self.segments[slot], self.positions[slot] = segment, 0
        self.grids[slot] = grid
        self.starts[slot] = self.latents[slot] = latents.to(self.latents)

    def state_dict(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name).clone() for name in self._TENSORS}
        ready = {f"ready.{name}": value.clone() for name, value in self.ready.items()}
        counters = {
            "num_calls": torch.tensor(self.num_calls),
            "progress": torch.tensor(self.progress, dtype=torch.float64),
            "generator": self.generator.get_state(),
        }
        return self.order.state_dict() | own | ready | counters

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self._TENSORS:
            getattr(self, name).copy_(state[name])
        self.ready = {
            name: value.to(self.ready[name].device, copy=True) for name, value in part_of(state, "ready.").items()
        }
        self.num_calls, self.progress = int(state["num_calls"]), float(state["progress"])
        self.order.load_state_dict(state)
        self.generator.set_state(state["generator"])


def _no_targets(latent_shape: tuple[int, int, int], device: str) -> dict[str, Tensor]:
    empty = torch.zeros(0, *latent_shape, device=device)
    return {
        "latents": empty,
        "velocity": empty.clone(),
        "sigma": torch.zeros(0),
        "prompts": torch.zeros(0, dtype=torch.long),
    }
