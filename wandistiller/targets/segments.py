"""What a student of few steps should answer: the average velocity over a whole segment of the teacher's path."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wandistiller.device import autocast, to_device
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import seeded_noise, sigma_to_timestep
from wandistiller.sampling.sampler import wan_scheduler
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.answers import Answer, AnswerQueue
from wandistiller.targets.state_batch import DrawOptions, draw_seeds
from wandistiller.targets.state_dicts import LANE_PREFIX, part_of
from wandistiller.targets.trajectories import PATHS_PER_LANE
from wandistiller.wan.prompt_embeds import PromptEmbeds

MIN_READY = 2  # targets that a lane must have before one of them is taken, so that batches mix paths


@dataclass(frozen=True, kw_only=True)
class SegmentOptions:
    """How sampling paths are cut into segments.

    Attributes:
        num_segments: steps of the student's sampler.
        num_teacher_steps: steps of the teacher over a whole path, which the segments share equally.
        student_rollout: share of the paths that continue from the student's own states, at the start and end of training.
        compute_dtype: precision of matrix products.
    """

    num_segments: int
    num_teacher_steps: int
    student_rollout: tuple[float, float] = (0.0, 1.0)
    compute_dtype: torch.dtype = torch.float32


def ready_per_lane(num_paths: int) -> int:
    """Return the room for targets that are known and not learnt from yet, in a lane of so many paths.

    A lane may be so many ahead of another, and each of its paths by one more.
    """
    return 2 * num_paths + 4


def calls_per_answer(num_teacher_steps: int, num_segments: int | None) -> int:
    """Return the teacher's steps through a segment of its path, which one target takes; one without segments."""
    return max(1, round(num_teacher_steps / num_segments)) if num_segments else 1


def most_segment_prompts(num_batches: int, num_lanes: int, num_segments: int) -> int:
    """Return how many prompts paths of segments take at most while so many batches of targets are learnt from.

    A lane takes a prompt for each path that it begins with and for each that comes after one of those, which may have a single
    segment, and then one for every `num_segments` targets; targets that are not learnt from yet count too.
    """
    return num_lanes * (2 * PATHS_PER_LANE + (num_batches + ready_per_lane(PATHS_PER_LANE)) // num_segments)


def segment_sigmas(shift: float, num_segments: int, sampler: str = "euler") -> Tensor:
    """Return the ends of the segments (num_segments + 1,), from 1 down to 0: the noise levels of the student's sampler."""
    return wan_scheduler(shift, num_segments, sampler).sigmas


class SegmentAnswers:
    """Cuts sampling paths into segments. The target at the start of a segment is where the teacher's path leaves it.

    At x_start the student should answer (x_end - x_start) / (sigma_end - sigma_start), so that one Euler step lands on the
    end of the segment (the average velocity of progressive distillation, arXiv 2202.00512). The teacher walks a segment in
    several steps, so a target costs several calls. The next segment starts where the teacher arrived or, for a share of the
    paths, where the student's own step lands, so that the student learns from the states that it will meet.

    A teacher of a few noise levels (`DrawOptions.levels`) takes Euler's steps from each to the next, as its sampler does; the
    ends of segments are some of its levels.

    Args:
        options: `sigma_range` and `swap` are not used, since a segment starts at a noise level of the student's sampler and
            its prompt must stay that of its path.
    """

    _TENSORS = ("prompts", "segments", "positions", "lots", "grids", "ready_sigma", "ready_prompts", "num_ready")
    _OF_LANES = ("starts", "latents", "before", "ready_latents", "ready_velocity")

    def __init__(
        self,
        teacher: Teacher,
        student: WanLiteStudent,
        prompt_embeds: PromptEmbeds,
        options: DrawOptions,
        segments: SegmentOptions,
    ):
        self.prompt_embeds = prompt_embeds
        self.latent_shape = options.latent_shape
        self.lanes = options.lanes
        self.num_segments = segments.num_segments
        self.num_steps = calls_per_answer(segments.num_teacher_steps, self.num_segments)
        self.levels = None if options.levels is None else torch.tensor(options.levels)
        self.segment_sigmas = (
            segment_sigmas(options.shift, self.num_segments).float()
            if self.levels is None
            else self.levels[:: self.num_steps]
        )
        self.student_rollout = segments.student_rollout
        self.device = options.device
        self.teacher_velocity = autocast(teacher.velocity, self.device, segments.compute_dtype)
        self.student_forward = autocast(student, self.device, segments.compute_dtype)
        self.num_paths = options.share.of(PATHS_PER_LANE)
        self.generator = torch.Generator().manual_seed(options.own_seed)
        self.order = options.prompt_order()
        self.progress = 0.0
        self.num_calls = 0
        self._queue = AnswerQueue(prompt_embeds, self.device, self.lanes.micro_batch)
        self._make_pool()
        for lane in range(self.lanes.total):
            for path in range(self.num_paths):
                self._start_path(lane, path)

    def _make_pool(self) -> None:
        """Allocate the paths, and the targets that are ready to be learnt from."""
        pool, room, device = (self.lanes.total, self.num_paths), ready_per_lane(self.num_paths), self.device
        self.prompts = torch.zeros(pool, dtype=torch.long)
        self.segments = torch.zeros(pool, dtype=torch.long)
        self.positions = torch.zeros(pool, dtype=torch.long)
        self.lots = torch.zeros(pool)
        self.grids = torch.zeros(*pool, self.num_steps + 1)  # noise levels of the teacher's steps in the segment
        self.own = torch.arange(self.lanes.count, device=device)
        shape = self.lanes.count, self.num_paths, *self.latent_shape
        self.starts = torch.zeros(shape, device=device)  # latents at the start of the segment
        self.latents = torch.zeros(shape, device=device)  # latents where the teacher is now
        self.before = torch.zeros(shape, device=device)  # the teacher's velocity one step ago
        self.num_ready = torch.zeros(self.lanes.total, dtype=torch.long)
        self.ready_sigma = torch.zeros(self.lanes.total, room)
        self.ready_prompts = torch.zeros(self.lanes.total, room, dtype=torch.long)
        shape = self.lanes.count, room, *self.latent_shape
        self.ready_latents = torch.zeros(shape, device=device)
        self.ready_velocity = torch.zeros(shape, device=device)

    def _local(self, values: Tensor) -> Tensor:
        """Return this process's part of values (total, ...) of all lanes, on the device."""
        return to_device(self.lanes.local(values), self.device)

    def next(self) -> Answer:
        """Return a target of every lane, a random one of those that are known. Ask the teacher first until there are enough."""
        if not self._queue:
            if self.num_calls == 0 and self.levels is None:
                self._jump_to_segments()
            while self.num_ready.min() < MIN_READY:
                self._ask()
            self._take()
        return self._queue.pop()

    def advance(self, answer: Answer, student_velocity: Tensor, progress: float) -> None:
        """Note how much of the training is done. The paths move when the teacher is asked."""
        self.progress = progress

    def _take(self) -> None:
        """Queue a target of every lane, which then leaves the store."""
        lanes, own = torch.arange(self.lanes.total), self.own
        chances = torch.rand(self.lanes.total, generator=self.generator)
        places = (chances * self.num_ready).long().minimum(self.num_ready - 1)
        last = self.num_ready - 1
        here, last_here = self._local(places), self._local(last)
        self._queue.fill(
            latents=self.ready_latents[own, here],
            sigma=self.lanes.local(self.ready_sigma[lanes, places]),
            prompts=self.lanes.local(self.ready_prompts[lanes, places]).tolist(),
            velocity=self.ready_velocity[own, here],
            weights=torch.ones(self.lanes.count),
        )
        # The last target takes the place that is now empty:
        for values in (self.ready_sigma, self.ready_prompts):
            values[lanes, places] = values[lanes, last]
        for values in (self.ready_latents, self.ready_velocity):
            values[own, here] = values[own, last_here]
        self.num_ready -= 1

    def _jump_to_segments(self) -> None:
        """Take the paths to starts of different segments in one long step, so that all segments are taught early on."""
        for path in range(self.num_paths):
            paths = torch.full((self.lanes.total,), path)
            segments = (torch.arange(self.lanes.total) + path * self.lanes.total) % self.num_segments
            sigma = self.segment_sigmas[segments]
            velocity = self._velocity(paths, torch.ones(self.lanes.total))
            step = self._local(sigma - 1)[:, None, None, None]
            starts = self.starts[:, path] + step * velocity
            for lane, segment in enumerate(segments.tolist()):
                self._start_segment(lane, path, segment, starts)

    def _velocity(self, paths: Tensor, sigma: Tensor) -> Tensor:
        """Return the teacher's velocity where one path (total,) of every lane is now, at sigma (total,)."""
        self.num_calls += 1
        return self._asked(self.teacher_velocity, self.latents, paths, sigma)

    def _asked(self, field: Callable[..., Tensor], latents: Tensor, paths: Tensor, sigma: Tensor) -> Tensor:
        """Return a field's velocity (B, C, H, W) at one path of each of this process's lanes."""
        prompts = self.lanes.local(self.prompts).gather(1, self.lanes.local(paths)[:, None])[:, 0].tolist()
        latents, sigma, velocities = latents[self.own, self._local(paths)], self.lanes.local(sigma), []
        for start in range(0, len(prompts), self.lanes.micro_batch):
            rows = slice(start, start + self.lanes.micro_batch)
            embeds, lengths = self.prompt_embeds.batch(prompts[rows], self.device)
            velocities.append(field(latents[rows], sigma[rows], embeds, lengths))
        return torch.cat(velocities)

    def _ask(self) -> None:
        """Let the teacher take one step on a path of every lane, spread over the noise levels."""
        lanes, own = torch.arange(self.lanes.total), self.own
        sigmas = self.grids.gather(2, self.positions[..., None])[..., 0]
        order = torch.randperm(self.lanes.total, generator=self.generator)
        spread = (order + torch.rand(self.lanes.total, generator=self.generator)) / self.lanes.total
        picks = (spread * self.num_paths).long().clamp(max=self.num_paths - 1)
        paths = sigmas.argsort(dim=1).gather(1, picks[:, None])[:, 0]
        positions, sigma = self.positions[lanes, paths], sigmas[lanes, paths]
        velocity = self._velocity(paths, sigma)

        # Adams-Bashforth of order two, and Euler on the first step of a segment: it costs no more calls than Euler alone and
        # ends nearer to the exact path. A teacher of a few levels knows no path but Euler's.
        step = self.grids[lanes, paths, positions + 1] - sigma
        step_before = sigma - self.grids[lanes, paths, (positions - 1).clamp(min=0)]
        is_euler = positions == 0 if self.levels is None else torch.ones_like(positions, dtype=torch.bool)
        slope = torch.where(is_euler, 0.0, step / (2 * torch.where(positions == 0, 1.0, step_before)))
        weight, step = (self._local(value)[:, None, None, None] for value in (slope, step))
        here = self._local(paths)
        self.latents[own, here] += step * (velocity + weight * (velocity - self.before[own, here]))
        self.before[own, here] = velocity
        self.positions[lanes, paths] += 1
        arrived = self.positions[lanes, paths] == self.num_steps
        if arrived.any():
            self._finish(paths, arrived)

    def _finish(self, paths: Tensor, arrived: Tensor) -> None:
        """Store the targets of the segments that have arrived (one path of a lane at most), and start the next segments."""
        lanes, own = torch.arange(self.lanes.total), self.own
        here, rows = self._local(paths), self.lanes.local(arrived).nonzero().flatten()
        starts, ends = self.starts[own, here], self.latents[own, here]
        sigma, segments = self.grids[lanes, paths, 0], self.segments[lanes, paths]
        length = self._local(self.grids[lanes, paths, -1] - sigma)[:, None, None, None]
        rows, places = (to_device(values, self.device) for values in (rows, self.lanes.local(self.num_ready)[rows]))
        self.ready_latents[rows, places] = starts[rows]
        self.ready_velocity[rows, places] = ((ends - starts) / length)[rows]
        chosen = arrived.nonzero().flatten()
        self.ready_sigma[chosen, self.num_ready[chosen]] = sigma[chosen]
        self.ready_prompts[chosen, self.num_ready[chosen]] = self.prompts[lanes, paths][chosen]
        self.num_ready[chosen] += 1

        start, end = self.student_rollout
        is_students = self.lots[lanes, paths] < start + (end - start) * self.progress
        continues = segments + 1 < self.num_segments
        # All lanes are asked or none, since a sharded student can only answer in all processes at once.
        if (arrived & is_students & continues).any():
            follows = self._local(is_students & continues)[:, None, None, None]
            ends = torch.where(follows, starts + length * self._student_velocity(paths, sigma), ends)
        for lane in chosen.tolist():
            if continues[lane]:
                self._start_segment(lane, int(paths[lane]), int(segments[lane]) + 1, ends)
            else:
                self._start_path(lane, int(paths[lane]))

    @torch.no_grad()
    def _student_velocity(self, paths: Tensor, sigma: Tensor) -> Tensor:
        """Return the student's velocity at the starts of these paths' segments."""

        def answer(latents: Tensor, sigma: Tensor, embeds: Tensor, lengths: Tensor) -> Tensor:
            timestep = to_device(sigma_to_timestep(sigma), self.device)
            return self.student_forward(latents, timestep, embeds, lengths).float()

        return self._asked(answer, self.starts, paths, sigma)

    def _start_path(self, lane: int, path: int) -> None:
        self.prompts[lane, path] = self.order.take(1)[0]
        self.lots[lane, path] = torch.rand((), generator=self.generator)
        seeds = draw_seeds(1, self.generator)
        place = self.lanes.place_of(lane)
        if place is not None:
            self.starts[place, path] = to_device(seeded_noise(seeds, self.latent_shape)[0], self.device)
        self._start_segment(lane, path, 0, self.starts[:, path])

    def _start_segment(self, lane: int, path: int, segment: int, starts: Tensor) -> None:
        """Start a segment from the lane's row of `starts` (B, C, H, W).

        The levels between the segment's ends are moved by a random part of a step, so that they differ from path to path.
        """
        if self.levels is not None:
            grid = self.levels[segment * self.num_steps :][: self.num_steps + 1]
        else:
            start, end = self.segment_sigmas[segment : segment + 2].tolist()
            grid = torch.linspace(start, end, self.num_steps + 1)
            grid[1:-1] += (torch.rand((), generator=self.generator) - 0.5) * (end - start) / self.num_steps
        self.segments[lane, path], self.positions[lane, path] = segment, 0
        self.grids[lane, path] = grid
        place = self.lanes.place_of(lane)
        if place is not None:
            self.starts[place, path] = self.latents[place, path] = starts[place]

    def state_dict(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name).clone() for name in self._TENSORS}
        own |= {f"{LANE_PREFIX}{name}": getattr(self, name).clone() for name in self._OF_LANES}
        counters = {
            "num_calls": torch.tensor(self.num_calls),
            "progress": torch.tensor(self.progress, dtype=torch.float64),
            "generator": self.generator.get_state(),
        }
        return self.order.state_dict() | own | counters

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self._TENSORS:
            getattr(self, name).copy_(state[name])
        for name, value in part_of(state, LANE_PREFIX).items():
            getattr(self, name).copy_(value)
        self.num_calls, self.progress = int(state["num_calls"]), float(state["progress"])
        self.order.load_state_dict(state)
        self.generator.set_state(state["generator"])
