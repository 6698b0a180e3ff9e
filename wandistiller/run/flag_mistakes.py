"""Flags of train_distillation.py that contradict each other, each with what would be right.

The module needs the standard library alone, as run/flags.py does.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from wandistiller.command_line import torchrun_environment
from wandistiller.run.states_kinds import STATES

if TYPE_CHECKING:
    from wandistiller.run.flags import Flags

Mistake = tuple[str, str]


def mistakes(flags: "Flags") -> Iterator[Mistake]:
    """Yield flags that contradict each other, each with what would be right."""
    yield from states_mistakes(flags)
    yield from renoise_mistakes(flags)
    if flags.output.eval_every and flags.states.sigma_range != (0.0, 1.0):
        yield "--eval_every", "measures at all noise levels; leave it out with a --sigma_range"
    yield from few_steps_mistakes(flags)
    if flags.student.aspect_ratios and flags.student.image_sizes:
        yield "--aspect_ratios", "says which sizes are trained at, and so does --image_sizes; give one of the two"
    if flags.optimization.teacher_calls and flags.optimization.max_steps:
        yield "--teacher_calls", "says how long the run is, and so does --max_steps; give one of the two"
    yield from shard_mistakes(flags)
    yield from cache_mistakes(flags)
    if flags.output.assume_gpu_gib is not None and not flags.output.dry_run:
        yield "--assume_gpu_gib", "plans for a GPU that is not here; it goes with --dry_run"
    if (guided := flags.teacher.guidance_range) and guided[0] >= guided[1]:
        yield "--guidance_range", f"LOW {guided[0]} must be below HIGH {guided[1]}"
    if flags.states.offline_teacher and flags.output.eval_every:
        yield "--eval_every", "asks the teacher, which --offline_teacher leaves out of memory"


def states_mistakes(flags: "Flags") -> Iterator[Mistake]:
    """Yield what cannot be asked of the noise levels and of the states at them."""
    states = flags.states
    low, high = states.sigma_range
    if low >= high:
        yield "--sigma_range", f"LOW {low} must be below HIGH {high}"
    has_paths = STATES[states.states].has_paths
    if has_paths and high != 1.0:
        yield "--sigma_range", "a trajectory begins at sigma 1, so HIGH must be 1 (or use --states noise)"
    if states.extra_prompts and not states.prompt_swap:
        yield "--extra_prompts", "these prompts come by --prompt_swap alone; give it a probability above 0"
    if states.offline_teacher and not states.teacher_cache:
        yield "--offline_teacher", "the teacher's answers must come from somewhere; add --teacher_cache FOLDER"
    if not has_paths:
        for name, is_given in (
            ("--student_steps", flags.objective.student_steps is not None),
            ("--renoise_fraction", states.renoise_fraction > 0),
            ("--student_rollout", max(states.student_rollout) > 0),
        ):
            if is_given:
                yield name, f"needs sampling paths, and --states {states.states} has none; use --states trajectory"


def renoise_mistakes(flags: "Flags") -> Iterator[Mistake]:
    """Yield what renoised samples do not go together with."""
    if not flags.states.renoise_fraction:
        return
    if flags.states.sigma_range != (0.0, 1.0):
        yield "--renoise_fraction", "needs finished samples, and paths of a --sigma_range above 0 do not finish"
    if flags.states.calls_per_expert:
        yield "--renoise_fraction", "mixes all noise levels in every batch, which --calls_per_expert keeps apart"
    if samples_per_step(flags) < 2:
        yield "--renoise_fraction", "shares a batch with states of paths; needs --batch_size 2 or more"


def few_steps_mistakes(flags: "Flags") -> Iterator[Mistake]:
    """Yield what a student of few steps does not go together with."""
    if not flags.objective.student_steps:
        return
    states = flags.states
    for name, is_given in (
        ("--states", states.states != "trajectory"),
        ("--sigma_range", states.sigma_range != (0.0, 1.0)),
        ("--renoise_fraction", states.renoise_fraction > 0),
        ("--prompt_swap", states.prompt_swap > 0),
        ("--calls_per_expert", states.calls_per_expert > 0),
        ("--feature_loss_weight", flags.objective.feature_loss_weight > 0),
        ("--teacher_cache", states.teacher_cache is not None),
        ("--eval_every", bool(flags.output.eval_every)),
    ):
        if is_given:
            yield name, "does not go together with --student_steps, which teaches whole segments of trajectories"


def shard_mistakes(flags: "Flags") -> Iterator[Mistake]:
    """Yield what sharded weights do not go together with."""
    performance = flags.performance
    if performance.shards_teacher:
        for name, is_given in (
            ("--teacher_dtype", performance.teacher_dtype == "fp8"),
            ("--teacher_offload", performance.teacher_offload),
        ):
            if is_given:
                yield name, "does not go together with a sharded teacher; give --shard student"
        if flags.states.teacher_cache and torchrun_environment().world_size > 1:
            yield "--shard", "with --teacher_cache the teacher answers before training; give --shard student"
    if performance.shards_student and flags.optimization.optimizer == "adamw8bit":
        yield "--optimizer", "adamw8bit does not know sharded weights; --shard shards adamw's moments too"


def cache_mistakes(flags: "Flags") -> Iterator[Mistake]:
    """Yield what answers from a cache cannot bring along."""
    states = flags.states
    if not states.teacher_cache:
        if states.cache_parts > 1:
            yield "--cache_parts", "are parts of a teacher's cache; add --teacher_cache FOLDER"
        if states.cache_only:
            yield "--cache_only", "asks for the teacher's answers and keeps them; add --teacher_cache FOLDER"
        return
    if states.cache_only and flags.output.dry_run:
        yield "--cache_only", "--dry_run plans for the whole run; leave one of the two out"
    for name, is_given, why in (
        (
            "--student_rollout",
            max(flags.states.student_rollout) > 0,
            "answers at the student's own states cannot be asked for beforehand",
        ),
        ("--feature_loss_weight", flags.objective.feature_loss_weight > 0, "hidden states are too large to keep"),
    ):
        if is_given:
            yield name, f"does not go together with --teacher_cache: {why}"


def samples_per_step(flags: "Flags") -> int:
    """Samples that an optimiser step takes, over all processes."""
    own = flags.optimization
    return own.batch_size * own.grad_accum_steps * torchrun_environment().world_size
