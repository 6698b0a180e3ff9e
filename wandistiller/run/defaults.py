"""The defaults that depend on teacher, student and batch: how fast a student learns, and how often from each answer.

They stand for flags that are left out; docs/measurements.md has the measurements that they were chosen by.
"""

import math

from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import BACKWARD_PASSES, num_image_tokens, transformer_flops

# The best learning rates of a student of MEASURED_WIDTH that learns from MEASURED_SAMPLES a step, by optimiser:
MEASURED_LR = {"adamw": 3e-3, "muon": 4e-3}
MEASURED_WIDTH, MEASURED_SAMPLES = 128, 64
WARMUP_SHARE, MAX_WARMUP_STEPS = 0.04, 500
# An answer is learnt from so often at least, however cheap it is; and at most, since more often it would be memorised.
MIN_REPLAY, MAX_REPLAY = 4, 8
TYPICAL_TEXT_TOKENS = 64  # the ratio of two models' FLOPs hardly depends on the text


def suggested_lr(optimizer: str, hidden_size: int, num_samples: int) -> float:
    """Return the learning rate for a student's width and the samples of a step.

    It falls as one over the width, as the best rate of hidden layers does (muP, arXiv 2203.03466), and with the square root of
    the samples (arXiv 2405.14578). It is not raised above the measured one.
    """
    samples = min(num_samples, MEASURED_SAMPLES) / MEASURED_SAMPLES
    rate = MEASURED_LR[optimizer] * MEASURED_WIDTH / max(hidden_size, MEASURED_WIDTH) * math.sqrt(samples)
    return float(f"{rate:.2g}")


def suggested_warmup(num_steps: int) -> int:
    """Return the steps of the learning rate's rise."""
    return min(MAX_WARMUP_STEPS, round(WARMUP_SHARE * num_steps))


def suggested_replay(
    teacher: StudentConfig,
    student: StudentConfig,
    latent_size: int | tuple[int, int],
    *,
    is_guided: bool,
) -> int:
    """Return how often each answer is learnt from, so that learning costs about what the teacher's answers cost.

    Args:
        latent_size: side of the latents, or their height and width.
        is_guided: whether an answer takes a second pass.
    """
    asked = teacher, num_image_tokens(teacher, latent_size), TYPICAL_TEXT_TOKENS
    answer = transformer_flops(*asked, TYPICAL_TEXT_TOKENS if is_guided else None)
    forward = transformer_flops(student, num_image_tokens(student, latent_size), TYPICAL_TEXT_TOKENS)
    return min(max(round(answer / ((1 + BACKWARD_PASSES) * forward)), MIN_REPLAY), MAX_REPLAY)
