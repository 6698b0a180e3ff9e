"""From what was typed to the settings of a run: every default, correction and refusal, once. Nothing is written, no weight is read.

`resolve` is the order; each function below it decides one thing from those before it, and prints a line where it corrects what was
typed. The defaults that were measured lie in defaults.py.
"""

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from wandistiller.budget.workload import guided_fraction
from wandistiller.device import pick_device
from wandistiller.errors import UserError
from wandistiller.model.config import MAX_PATCHES, StudentConfig
from wandistiller.model.image_sizes import ImageSize, resolve_sizes, square
from wandistiller.processes import Processes, join
from wandistiller.reports.trackers import check_report
from wandistiller.run.defaults import suggested_lr, suggested_replay, suggested_warmup
from wandistiller.run.flags import Flags
from wandistiller.run.headers import ALL_LEVELS, Files, open_files
from wandistiller.run.held_out import MAX_SHARE, NUM_MEASUREMENTS, NUM_PATHS, path_steps
from wandistiller.run.inputs import Inputs
from wandistiller.run.mistakes import samples_per_step
from wandistiller.run.presets import preset_lines
from wandistiller.run.settings import Settings
from wandistiller.training.loop import steps_of_epochs
from wandistiller.training.optimizer import OptimizationOptions, check_optimizer
from wandistiller.walk.batches import make_schedules
from wandistiller.walk.grids import teacher_levels
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.text_encoder import prompts_digest
from wandistiller.wan.wan_files import WanFiles

# The recipe that won on two teachers (docs/measurements.md)
FEATURE_LOSS_WEIGHT = 1.0
STUDENT_STEPS, FIRST_STAGE_SHARE = 4, 2 / 3
# Experts that take turns on the device answer many batches each, so that moving one in is rare.
OFFLOAD_CALLS_PER_EXPERT = 64


def resolve(flags: Flags, inputs: Inputs, command: Sequence[str] = ()) -> Settings:
    """Join the processes, open the files by their headers and give every setting its value.

    Args:
        command: the words after the script's name.

    Raises:
        UserError: something is missing, damaged or contradictory, or does not fit together.
    """
    processes = join(flags.performance.device, pick_device)
    check_optimizer(flags.optimization.optimizer)
    check_report(flags.output.report)
    check_compiler(flags)
    files = open_files(flags, inputs.config)
    if flags.output.preset:
        print("\n".join(preset_lines(flags.output.preset, len(inputs.prompts.train))))
    print("\n".join(inputs.prompts.lines))
    return decide(flags, inputs, files, processes, command)


def decide(flags: Flags, inputs: Inputs, files: Files, processes: Processes, command: Sequence[str] = ()) -> Settings:
    """Return the settings: what was typed, with every default and correction."""
    config, own, teacher = inputs.config, flags.optimization, files.teacher
    sizes = pixel_sizes(flags, config, files)
    states = resolve_states(flags, files.wan_files, config)
    length = resolve_length(flags, inputs, files, states, sizes)
    num_samples = own.batch_size * own.grad_accum_steps * processes.count
    eval_every, held_out_steps = resolve_measuring(flags, teacher, length, num_samples)
    decided = {
        "command": list(command),
        "config": config,
        "teacher_levels": (teacher_levels(teacher) or ())[:-1],
        "prompts": inputs.prompts.train,
        "held_out_prompts": inputs.prompts.held_out if eval_every else [],
        "prompts_digest": prompts_digest(inputs.prompts.train),
        "image_sizes": sizes,
        "optimization": resolve_optimization(flags, config, num_samples, length.first_stage_steps),
        "processes": processes,
        "eval_every": eval_every,
        "held_out_steps": held_out_steps,
        "sample_every": flags.output.sample_every if files.vae_location else 0,
    }
    names = {known.name for known in fields(Settings)}
    typed = {name: value for name, value in flags.as_dict().items() if name in names}
    parts = vars(files) | vars(states) | vars(length) | resolve_device(flags, processes)
    return Settings(**(typed | decided | parts))


# ---- sizes, states and length ----


def pixel_sizes(flags: Flags, config: StudentConfig, files: Files) -> tuple[ImageSize, ...]:
    """Return the image sizes that are trained at, in turn."""
    unit = files.teacher.vae_scale_factor * math.lcm(config.patch_size, files.wan_files.config.patch_size)
    given = flags.student.image_sizes or [square(config.image_size)]
    return resolve_sizes(given, config.image_size, unit, MAX_PATCHES)


@dataclass(frozen=True)
class States:
    """The states that the student learns at; names and meanings are those of `Settings`."""

    states: str
    sigma_range: tuple[float, float]
    calls_per_expert: int
    feature_loss_weight: float
    teacher_offload: bool


def resolve_states(flags: Flags, wan_files: WanFiles, config: StudentConfig) -> States:
    """Return the states: those that were typed, else the recipe that won, where it can be had."""
    own = flags.states
    low, high = own.sigma_range or ALL_LEVELS
    has_paths, is_live = own.states != "noise", own.teacher_cache is None
    offload = can_offload(flags, wan_files)
    takes_turns = offload and own.states == "trajectory"
    calls = given(own.calls_per_expert, OFFLOAD_CALLS_PER_EXPERT if takes_turns else 0)
    features = FEATURE_LOSS_WEIGHT if has_paths and is_live else 0.0
    return States(
        states=own.states,
        sigma_range=(low, high),
        calls_per_expert=calls,
        feature_loss_weight=comparable(
            given(flags.objective.feature_loss_weight, features), flags.student.init, config
        ),
        teacher_offload=offload,
    )


def given(typed, otherwise):
    """Return what was typed, else the other value."""
    return otherwise if typed is None else typed


def comparable(weight: float, init: str, config: StudentConfig) -> float:
    """Return the weight of the hidden-state loss, which compares the channels that a student has from its teacher."""
    if weight and (init == "random" or config.block != "wan"):
        print("Hidden states are not compared: the student has none of the teacher's channels")
        return 0.0
    return weight


def can_offload(flags: Flags, wan_files: WanFiles) -> bool:
    """Return whether the teacher's experts are kept in host memory in turn."""
    if flags.performance.teacher_offload and len(wan_files.experts) == 1:
        print("--teacher_offload is of no use here, this teacher has one expert; the usual states are trained on")
        return False
    return flags.performance.teacher_offload


@dataclass(frozen=True)
class Length:
    """How long a run is; names and meanings are those of `Settings`."""

    replay: int
    num_steps: int
    first_stage_steps: int
    student_steps: int | None
    num_calls: int
    guided_fraction: float


def resolve_length(flags: Flags, inputs: Inputs, files: Files, states: States, sizes: Sequence[ImageSize]) -> Length:
    """Return the steps of the run, and the teacher's calls that they take."""
    own, teacher = flags.optimization, files.teacher
    guided = guided_fraction(teacher, states.sigma_range)
    replay = flags.states.replay or suggested_replay(
        files.wan_files.config,
        inputs.config,
        max((teacher.latent_shape(inputs.config, size)[1:] for size in sizes), key=math.prod),
        guided_fraction=guided,
    )
    student_steps = few_steps(flags, teacher, states)
    if own.max_steps is not None or own.num_epochs is not None or own.teacher_calls is None:
        epochs = steps_of_epochs(own.num_epochs or 1, len(inputs.prompts.train), samples_per_step(flags))
        num_steps = own.max_steps or epochs
        first = math.ceil(FIRST_STAGE_SHARE * num_steps) if student_steps else num_steps
    else:
        first = replay * own.teacher_calls
        num_steps = round(first / FIRST_STAGE_SHARE) if student_steps else first
    student_steps = student_steps if num_steps > first else None
    schedules = make_schedules(first, replay, len(sizes))
    num_calls = sum(schedule.num_calls for schedule in schedules)
    return Length(replay, num_steps, first, student_steps, num_calls, guided)


def few_steps(flags: Flags, teacher: TeacherSettings, states: States) -> int | None:
    """Return the steps that the student learns to draw in; None for those of the teacher."""
    typed = flags.objective.student_steps
    if typed is not None:
        return typed or None
    can = not teacher.has_few_levels and states.sigma_range == ALL_LEVELS
    return STUDENT_STEPS if can and teacher.num_inference_steps > STUDENT_STEPS else None


def resolve_optimization(flags: Flags, config: StudentConfig, num_samples: int, num_steps: int) -> OptimizationOptions:
    """Return how the weights move; `num_samples` are those of a step."""
    own = flags.optimization
    return OptimizationOptions(
        lr=own.lr or suggested_lr(own.optimizer, config.hidden_size, num_samples, num_steps),
        optimizer=own.optimizer,
        lr_scheduler=own.lr_scheduler,
        lr_warmup_steps=given(own.lr_warmup_steps, suggested_warmup(num_steps)),
        weight_decay=own.weight_decay,
        max_grad_norm=own.max_grad_norm,
        ema_decay=own.ema_decay,
    )


def resolve_measuring(flags: Flags, teacher: TeacherSettings, length: Length, num_samples: int) -> tuple[int, int]:
    """Return the steps between held-out measurements (0: none), and the teacher's steps on a measured path."""
    num_steps = path_steps(teacher)
    if flags.output.eval_every is not None:
        return flags.output.eval_every, num_steps
    is_cheap = NUM_PATHS * num_steps <= MAX_SHARE * length.num_calls * num_samples
    return math.ceil(length.first_stage_steps / NUM_MEASUREMENTS) if is_cheap else 0, num_steps


# ---- device ----


def check_compiler(flags: Flags) -> None:
    """Refuse --compile where the C++ compiler is missing that torch calls (torch: _inductor/cpp_builder.py), as in slim containers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if flags.performance.compile and not flags.output.dry_run and shutil.which(compiler) is None:
        raise UserError(
            f"--compile: torch.compile needs a C++ compiler, and there is no {compiler}; install one, or leave it out"
        )


def resolve_device(flags: Flags, processes: Processes) -> dict[str, object]:
    """Return the precision for the device of this process, or for the GPU that --dry_run plans for."""
    own, output = flags.performance, flags.output
    is_elsewhere = output.dry_run and (output.assume_gpu_gib is not None or own.device is None)
    is_for_gpu = is_elsewhere or processes.device.startswith("cuda")
    dtype = own.dtype or ("bf16" if is_for_gpu else "fp32")
    return {
        "dtype": dtype,
        "teacher_dtype": own.teacher_dtype or dtype,
        "is_for_gpu": is_for_gpu,
        "shard_teacher": own.shard in ("teacher", "both"),
        "shard_student": own.shard in ("student", "both"),
    }
