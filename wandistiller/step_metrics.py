"""The measurements of one optimiser step, and the clock of the loop that takes them. Standard library only.

The loop makes a `StepMetrics` of every step; metrics.jsonl, plots and trackers take it from there.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

NUM_BUCKETS = 10  # of noise levels, all equally wide
WINDOW_S, WINDOW_STEPS = 60.0, 16  # that rates are measured over, whichever is longer


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step measured. Seconds count from the start of the loop.

    Attributes:
        teacher_calls: batches that the teacher has answered so far.
        loss_by_sigma: relative squared velocity error of the step's samples in equal buckets of sigma; None for an empty bucket.
        stage: 1 while the student learns the velocity, 2 while it learns to draw in few steps; their losses are of other targets.
        feature_loss: what the feature loss adds; None for an answer without hidden states.
        held_out: measured on what is never trained on, by name: the relative velocity_error, in the first stage; the endpoint, which
            is the distance to the teacher's picture, in so many steps, and in how many teacher_steps the teacher is as near. None
            if this step measured nothing.
        memory_bytes: the most that the first process has held so far: tensors on a GPU, resident memory on the CPU.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    samples_per_s: float
    elapsed_s: float
    eta_s: float
    teacher_calls: int = 0
    loss_by_sigma: list[float | None] = field(default_factory=list)
    stage: int = 1
    feature_loss: float | None = None
    held_out: dict[str, float] | None = None
    memory_bytes: int | None = None


def mean_by_sigma(sigmas: Sequence[float], values: Sequence[float]) -> list[float | None]:
    """Return the mean of the values in equal buckets of sigma [0, 1]; sigma 1 belongs to the last bucket."""
    buckets: list[list[float]] = [[] for _ in range(NUM_BUCKETS)]
    for sigma, value in zip(sigmas, values, strict=True):
        buckets[min(int(sigma * NUM_BUCKETS), NUM_BUCKETS - 1)].append(value)
    return [sum(bucket) / len(bucket) if bucket else None for bucket in buckets]


class Stopwatch:
    """Measures rate and remaining time over the last minute, so that a slower or faster machine shows.

    Some steps are always among those that count, because not all ask the teacher; the first one, which pays for warming up, is not.
    """

    def __init__(self, num_steps: int, steps_before: int = 0, clock: Callable[[], float] = time.perf_counter):
        self.num_steps, self.clock = num_steps, clock
        self.start_s = clock()
        self.laps = deque([(steps_before, self.start_s)])  # steps, and when these were done

    def lap(self, step: int, batch_size: int) -> tuple[float, float, float]:
        """Return samples per second, elapsed seconds and remaining seconds after `step` steps."""
        now, laps = self.clock(), self.laps
        laps.append((step, now))
        if len(laps) > 2 and laps[0][1] == self.start_s:
            laps.popleft()
        while len(laps) > WINDOW_STEPS and now - laps[1][1] >= WINDOW_S:
            laps.popleft()
        first, since = laps[0]
        seconds = (now - since) / (step - first)
        return batch_size / seconds, now - self.start_s, seconds * (self.num_steps - step)
