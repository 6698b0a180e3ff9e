"""How often a run measures its student, and on how many held-out states, so that it costs next to nothing unless it is asked for."""

import math
from dataclasses import dataclass

from wandistiller.run.flags import Flags
from wandistiller.targets.replay import answered_batches
from wandistiller.targets.segments import calls_per_answer

# Without --eval_every a run measures about so often, and its teacher answers at most so many held-out states, which may be at most
# this share of all that it answers.
NUM_MEASUREMENTS = 6
MOST_ANSWERS = 256
MOST_SHARE = 0.02
# With --eval_every the noise part is measured too, over so many noises of up to so many prompts, where sampling the teacher for it
# takes at most this share of all that it answers. Fewer prompts tell too little of it.
NUM_NOISES = 4
MOST_NOISE_PROMPTS, FEWEST_NOISE_PROMPTS = 8, 4
MOST_NOISE_SHARE = 0.05
# The teacher also draws the first noise of each prompt in these shares of its steps, which is a scale for the student's distance.
SCALE_SHARES = (0.25, 0.5)
# Fewer answers, or a single path, tell too little to be worth asking for.
FEWEST_ANSWERS, FEWEST_PATHS = 16, 2


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """When a student is measured, and the states of the teacher's paths that it then answers.

    Attributes:
        every: steps between measurements; 0 is none.
        num_paths: paths of the teacher; 0 where --eval_every asks for a measurement of its own.
        num_steps: of the teacher on each path.
        num_levels: noise levels of a path that the student is measured at.
        num_noise_prompts: prompts that the noise part is measured on, with NUM_NOISES of each.
        scale_steps: smaller numbers of steps that the teacher draws the first noise of these prompts in.
    """

    every: int = 0
    num_paths: int = 0
    num_steps: int = 0
    num_levels: int = 0
    num_noise_prompts: int = 0
    scale_steps: tuple[int, ...] = ()

    @property
    def is_default(self) -> bool:
        """Whether the run measures by itself."""
        return self.num_paths > 0

    @property
    def segment_steps(self) -> int:
        """Steps of the teacher from one measured noise level of a path to the next."""
        return self.num_steps // self.num_levels


NOTHING = Measuring()


def plan_measuring(
    flags: Flags, teacher_steps: int, num_steps: int, answers_per_call: int, num_prompts: int, *, is_fixed: bool = False
) -> Measuring:
    """Return how a run measures its student.

    Args:
        teacher_steps: of the teacher's sampler.
        num_steps: optimiser steps of the run.
        answers_per_call: states that this process is answered in one of the global batches.
        num_prompts: held-out prompts that there are.
        is_fixed: whether the teacher's paths must take all its steps.
    """
    answers = expected_calls(flags, teacher_steps, num_steps) * answers_per_call
    if flags.output.eval_every is not None:
        fewer = {round(share * teacher_steps) for share in SCALE_SHARES} - {0, teacher_steps}
        scale = () if is_fixed else tuple(sorted(fewer))
        affordable = int(MOST_NOISE_SHARE * answers) // (NUM_NOISES * teacher_steps)
        noise_prompts = min(MOST_NOISE_PROMPTS, num_prompts, affordable)
        return Measuring(
            every=flags.output.eval_every,
            num_noise_prompts=noise_prompts if noise_prompts >= FEWEST_NOISE_PROMPTS else 0,
            scale_steps=scale,
        )
    budget = min(MOST_ANSWERS, int(MOST_SHARE * answers))
    if budget < FEWEST_ANSWERS or num_prompts == 0:
        return NOTHING
    if student_steps := flags.objective.student_steps:
        num_levels, path_steps = student_steps, student_steps * calls_per_answer(teacher_steps, student_steps)
    else:
        # Every answer on a path is one state, and there are about as many paths as noise levels:
        num_levels = path_steps = teacher_steps if is_fixed else min(teacher_steps, math.isqrt(budget))
    num_paths = min(math.isqrt(MOST_ANSWERS), budget // path_steps)
    batch_size = flags.optimization.batch_size
    if num_paths > batch_size:
        num_paths -= num_paths % batch_size  # so that all batches are of the size that the run trains with
    if num_paths < FEWEST_PATHS:
        return NOTHING
    every = math.ceil(num_steps / NUM_MEASUREMENTS)
    return Measuring(every=every, num_paths=num_paths, num_steps=path_steps, num_levels=num_levels)


def expected_calls(flags: Flags, teacher_steps: int, num_steps: int) -> int:
    """Return how many global batches the teacher answers for so many steps; a target of --student_steps takes several."""
    per_answer = calls_per_answer(teacher_steps, flags.objective.student_steps)
    return per_answer * answered_batches(num_steps, flags.states.replay, len(flags.student.image_sizes or [None]))
