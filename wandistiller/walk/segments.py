"""Few-step targets: a walk over whole segments of the teacher's path, each of which gives one target.

At x_start the student should answer (x_end - x_start) / (sigma_end - sigma_start), so that one Euler step lands on the end of the
segment (the average velocity of progressive distillation, arXiv 2202.00512).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wandistiller.walk.draws import SEGMENT, rng
from wandistiller.walk.grids import calls_per_target, segment_sigmas
from wandistiller.walk.walk import States, Walk, WalkOptions, paths_per_slot
from wandistiller.wan.settings import TeacherSettings

JUMP = -1  # in place of the number of a segment, while a first path jumps to the start of one


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(WalkOptions):
    """A walk over segments; its `sigma_range`, `renoise_fraction`, turns and hidden states are not used.

    Attributes:
        num_segments: steps of the student's sampler, which the teacher's steps are shared over.
    """

    num_segments: int

    @property
    def latents_per_slot(self) -> int:
        """Latents that a walk keeps on the device for each slot: of each path the start, where it is now, and a velocity."""
        return 3 * self.paths_per_slot

    @property
    def steps_per_segment(self) -> int:
        return calls_per_target(self.num_steps, self.num_segments)

    @property
    def calls_before_first(self) -> int:
        """Calls after which every slot has ended a segment."""
        return calls_before_first(self.paths_per_slot, self.steps_per_segment, self.levels is not None)


def calls_before_first(num_paths: int, steps_per_segment: int, has_few_levels: bool) -> int:
    """Return the calls after which a slot of so many paths has ended a segment.

    These are its paths' jumps, which a few-step teacher's do not make, and a step more than leaves all of them one short.
    """
    jumps = 0 if has_few_levels else num_paths
    return jumps + num_paths * (steps_per_segment - 1) + 1


def calls_of_run(teacher: TeacherSettings, num_segments: int | None, batch_size: int) -> tuple[int, int]:
    """Return the calls behind one target, and those until every slot has its first."""
    if num_segments is None:
        return 1, 1
    per_target = calls_per_target(teacher.num_inference_steps, num_segments)
    return per_target, calls_before_first(paths_per_slot(batch_size), per_target, teacher.has_few_levels)


class SegmentWalk(Walk):
    """Paths cut into segments that are equally long in steps; the teacher takes several steps through each.

    The next segment starts where the teacher arrived or, for a share of the paths, where the student's own step over the whole
    segment lands, so that the student learns from the states that it will meet. A few-step teacher takes Euler's steps from each of
    its levels to the next, as its sampler does; the ends of segments are some of its levels.
    """

    _STATE = (*Walk._STATE, "starts", "before", "segments")
    options: SegmentOptions

    def __init__(
        self, teacher, student, prompt_embeds, options: SegmentOptions, slots: range, *, asks_together: bool = False
    ):
        count, shape = len(slots), (options.paths_per_slot, *options.latent_shape)
        self.ends = self._segment_ends(options)
        self.starts = torch.zeros(count, *shape, device=options.device)  # latents at the start of the segment
        self.before = torch.zeros(count, *shape, device=options.device)  # the teacher's velocity one step ago
        self.segments = torch.zeros(count, options.paths_per_slot, dtype=torch.long)
        super().__init__(teacher, student, prompt_embeds, options, slots, asks_together=asks_together)

    @staticmethod
    def _segment_ends(options: SegmentOptions) -> Tensor:
        """Return the noise levels (num_segments + 1,) between segments, from 1 down to 0."""
        if options.levels is not None:
            return torch.tensor(options.levels)[:: options.steps_per_segment]
        return segment_sigmas(options.shift, options.num_segments).float()

    @property
    def calls_before_first(self) -> int:  # type: ignore[override]
        return self.options.calls_before_first

    def _longest_grid(self) -> int:
        return max(2, self.options.steps_per_segment + 1)

    @torch.no_grad()
    def ask(self, call: int, rows: range, progress: float = 0.0) -> dict[str, Tensor]:
        """Let the teacher take a step on a path of each of these slots; return the targets of the segments that end with it.

        See `Walk.ask`; B is the number of slots whose segment ends, and {} stands for none.
        """
        states = self._states(call, torch.tensor(rows))
        velocity, _ = self.teacher(*states.asked)
        velocity = velocity.float()
        self._step(states, velocity)
        self.position[states.rows, states.paths] += 1
        ended = self.position[states.rows, states.paths] == self.last[states.rows, states.paths]
        return self._end_segments(states, ended, progress)

    def _step(self, states: States, velocity: Tensor) -> None:
        """Take a step of Adams-Bashforth of order two, and Euler's on the first step of a segment.

        It costs no more calls than Euler's alone and ends nearer to the exact path. A few-step teacher knows no path but Euler's.
        """
        rows, paths = states.rows, states.paths
        position = self.position[rows, paths]
        step = self.grids[rows, paths, position + 1] - states.sigma
        step_before = states.sigma - self.grids[rows, paths, (position - 1).clamp(min=0)]
        is_euler = (position == 0) | (self.levels is not None)
        slope = torch.where(is_euler, 0.0, step / (2 * torch.where(position == 0, 1.0, step_before)))
        here = self._there(rows), self._there(paths)
        slope, step = (self._there(values)[:, None, None, None] for values in (slope, step))
        self.latents[here] += step * (velocity + slope * (velocity - self.before[here]))
        self.before[here] = velocity

    def _end_segments(self, states: States, ended: Tensor, progress: float) -> dict[str, Tensor]:
        """Return the targets of the segments that ended, and start the next ones where the teacher or the student ends."""
        follows, students = self._rolled_out(states, ended, progress)
        which = ended.nonzero().flatten()
        rows, paths = states.rows[which], states.paths[which]
        here = self._there(rows), self._there(paths)
        starts, ends = self.starts[here], self.latents[here].clone()
        sigma, segments = self.grids[rows, paths, 0], self.segments[rows, paths]
        length = self._there(self.grids[rows, paths, self.last[rows, paths]] - sigma)[:, None, None, None]
        answer = {
            "latents": starts, "sigma": sigma, "prompts": self.prompts[rows, paths], "rows": rows, "velocity": (ends - starts) / length,
        }  # fmt: skip
        if students is not None:
            is_students = self._there(follows[which])[:, None, None, None]
            ends = torch.where(is_students, starts + length * students[self._there(which)], ends)
        for number, (row, path) in enumerate(zip(rows.tolist(), paths.tolist(), strict=True)):
            self.latents[row, path] = ends[number]
            self._next_segment(row, path)
        taught = (segments != JUMP).nonzero().flatten()
        return self._only(answer, taught) if len(taught) else {}

    def _only(self, answer: dict[str, Tensor], which: Tensor) -> dict[str, Tensor]:
        return {
            name: values[self._there(which) if name in ("latents", "velocity") else which]
            for name, values in answer.items()
        }

    def _rolled_out(self, states: States, ended: Tensor, progress: float) -> tuple[Tensor, Tensor | None]:
        """Return which paths (B,) go on from the student's own step over the segment that ended, and its velocity at the starts."""
        segments = self.segments[states.rows, states.paths]
        goes_on = ended & (segments != JUMP) & (segments + 1 < self.options.num_segments)
        at_starts = States(
            states.rows,
            states.paths,
            goes_on,
            self.starts[self._there(states.rows), self._there(states.paths)],
            self.grids[states.rows, states.paths, 0],
            states.prompts,
            states.text,
        )
        return self._students(at_starts, progress)

    def _next_segment(self, row: int, path: int) -> None:
        segment, slot = int(self.segments[row, path]), self.slots[row]
        following = self._first_segment(slot, path) if segment == JUMP else segment + 1
        if following < self.options.num_segments:
            self._start_segment(row, path, following)
        else:
            self._begin(row, path)

    def _first_segment(self, slot: int, path: int) -> int:
        """Return the segment that a first path jumps to, so that all segments are taught early on."""
        return (slot + path * self.options.batch_size) % self.options.num_segments

    def _start_segment(self, row: int, path: int, segment: int) -> None:
        self.segments[row, path] = segment
        self.starts[row, path] = self.latents[row, path]
        self._set_grid(row, path, self._segment_grid(self.slots[row], path, segment, int(self.born[row])))

    def _grid(self, slot: int, path: int, draw: np.random.Generator, is_first: bool) -> Tensor:
        """Return the noise levels of the first segment of a path, or of its jump to another segment."""
        row = self.slots.index(slot)
        target = self._first_segment(slot, path) if is_first else 0
        self.segments[row, path] = JUMP if target else 0
        self.starts[row, path] = self.latents[row, path]
        if target:
            return torch.stack([self.ends[0], self.ends[target]])
        return self._segment_grid(slot, path, 0, int(self.born[row]))

    def _segment_grid(self, slot: int, path: int, segment: int, number: int) -> Tensor:
        """Return the noise levels of the teacher's steps through a segment of a slot's path.

        Those between the ends are moved by a random part of a step, so that they differ from path to path.
        """
        num_steps = self.options.steps_per_segment
        if self.levels is not None:
            return self.levels[segment * num_steps :][: num_steps + 1]
        start, end = self.ends[segment : segment + 2].tolist()
        jitter = rng(*self.options.key, SEGMENT, slot, path, number, segment).random()
        grid = torch.linspace(start, end, num_steps + 1)
        grid[1:-1] += (jitter - 0.5) * (end - start) / num_steps
        return grid
