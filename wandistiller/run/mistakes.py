"""Typed flags that contradict each other, each with what is allowed. Standard library only."""

from collections.abc import Iterator

from wandistiller.command_line import torchrun_environment
from wandistiller.errors import UserError
from wandistiller.run.flags import Flags

Mistake = tuple[str, str]  # the flag to change, and why


def check_flags(flags: Flags) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UserError: the message names the flag to change.
    """
    for find in (length_mistakes, range_mistakes, states_mistakes, few_steps_mistakes, shard_mistakes, cache_mistakes):
        for name, message in find(flags):
            raise UserError(f"{name}: {message}")


def samples_per_step(flags: Flags) -> int:
    """Samples of an optimizer step, over all processes."""
    own = flags.optimization
    return own.batch_size * own.grad_accum_steps * torchrun_environment().world_size


def length_mistakes(flags: Flags) -> Iterator[Mistake]:
    if flags.optimization.teacher_calls and flags.optimization.max_steps:
        yield "--teacher_calls", "sets the length of the run, and so does --max_steps; give one of the two"
    if flags.output.assume_gpu_gib is not None and not flags.output.dry_run:
        yield "--assume_gpu_gib", "plans for a GPU that is not here; it goes with --dry_run"


def range_mistakes(flags: Flags) -> Iterator[Mistake]:
    low, high = flags.states.sigma_range or (0.0, 1.0)
    if low >= high:
        yield "--sigma_range", f"LOW {low} must be below HIGH {high}"
    if flags.states.states != "noise" and high != 1.0:
        yield "--sigma_range", "a sampling path begins at sigma 1, so HIGH must be 1 (or use --states noise)"
    if (guided := flags.teacher.guidance_range) and guided[0] >= guided[1]:
        yield "--guidance_range", f"LOW {guided[0]} must be below HIGH {guided[1]}"


def states_mistakes(flags: Flags) -> Iterator[Mistake]:
    states = flags.states
    if states.states == "noise":
        for name, is_given in (
            ("--student_steps", flags.objective.student_steps is not None),
            ("--renoise_fraction", bool(states.renoise_fraction)),
            ("--student_rollout", max(states.student_rollout or [0.0]) > 0),
        ):
            if is_given:
                yield name, "needs sampling paths, and --states noise has none; use --states trajectory"
    if states.renoise_fraction:
        if (states.sigma_range or [0.0])[0] > 0:
            yield "--renoise_fraction", "needs finished samples, and paths of a --sigma_range above 0 do not finish"
        if states.calls_per_expert:
            yield "--renoise_fraction", "mixes all noise levels in every batch, which --calls_per_expert keeps apart"
        if samples_per_step(flags) < 2:
            yield "--renoise_fraction", "shares a batch with states of paths; needs --batch_size 2 or more"


def few_steps_mistakes(flags: Flags) -> Iterator[Mistake]:
    if not flags.objective.student_steps:
        return
    states = flags.states
    for name, is_given in (
        ("--states", states.states != "trajectory"),
        ("--sigma_range", states.sigma_range not in (None, [0.0, 1.0])),
        ("--renoise_fraction", bool(states.renoise_fraction)),
        ("--calls_per_expert", bool(states.calls_per_expert)),
        ("--feature_loss_weight", bool(flags.objective.feature_loss_weight)),
        ("--teacher_cache", states.teacher_cache is not None),
    ):
        if is_given:
            yield name, "does not go together with --student_steps, which teaches whole segments of sampling paths"


def shard_mistakes(flags: Flags) -> Iterator[Mistake]:
    performance = flags.performance
    if performance.shard in ("teacher", "both"):
        for name, is_given in (
            ("--teacher_dtype", performance.teacher_dtype == "fp8"),
            ("--teacher_offload", performance.teacher_offload),
        ):
            if is_given:
                yield name, "does not go together with a sharded teacher; give --shard student"
        if flags.states.teacher_cache and torchrun_environment().world_size > 1:
            yield "--shard", "with --teacher_cache the teacher answers before training; give --shard student"
    if performance.shard in ("student", "both") and flags.optimization.optimizer == "adamw8bit":
        yield "--optimizer", "adamw8bit does not know sharded weights; --shard shards adamw's moments too"


def cache_mistakes(flags: Flags) -> Iterator[Mistake]:
    states = flags.states
    if not states.teacher_cache:
        if states.offline_teacher:
            yield "--offline_teacher", "the teacher's answers must come from somewhere; add --teacher_cache FOLDER"
        if states.cache_part:
            yield "--cache_part", "is a part of the teacher's answers on disk; add --teacher_cache FOLDER"
        return
    if states.cache_part and flags.output.dry_run:
        yield "--cache_part", "fills a cache, and --dry_run plans the whole run; leave one of the two out"
    if states.cache_part and torchrun_environment().world_size > 1:
        yield "--cache_part", "is for processes started one by one; torchrun's share the work already, leave it out"
    if max(states.student_rollout or [0.0]) > 0:
        why = "answers at the student's own states cannot be computed beforehand"
        yield "--student_rollout", f"does not go together with --teacher_cache: {why}"
    if flags.objective.feature_loss_weight:
        yield "--feature_loss_weight", "does not go together with --teacher_cache: hidden states are too large to keep"
