"""From what was typed to the settings of a run: every default, correction and refusal, once. Nothing is written, no weight is read.

`resolve` is the order; each function below it decides one thing from those before it, and prints a line where it corrects what was
typed. The defaults that were measured lie in defaults.py.
"""

import math
import os
import shutil
import sys
from dataclasses import fields
from typing import Any

from wandistiller.device import pick_device
from wandistiller.errors import UserError
from wandistiller.model.config import MAX_PATCHES, StudentConfig
from wandistiller.model.image_sizes import resolve_sizes, square
from wandistiller.processes import Processes, join
from wandistiller.reports.trackers import check_report
from wandistiller.run.defaults import suggested_lr, suggested_replay, suggested_warmup
from wandistiller.run.flag_files import flags_line, flags_text
from wandistiller.run.flags import Flags
from wandistiller.run.headers import ALL_LEVELS, Files, Source, open_files
from wandistiller.run.held_out import MAX_SHARE, NUM_MEASUREMENTS, num_answers, path_steps
from wandistiller.run.inputs import Inputs, samples_per_step
from wandistiller.run.settings import Settings
from wandistiller.training.loop import steps_of_epochs
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.walk.batches import make_schedules
from wandistiller.walk.grids import steps_of_segments, teacher_levels
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.text_encoder import prompts_digest

# The recipe that won on two teachers (docs/measurements.md)
FEATURE_LOSS_WEIGHT = 1.0
STUDENT_STEPS, FIRST_STAGE_SHARE = 4, 2 / 3
# A LoRA moves little of a weight, and learns best at a higher rate.
LORA_RANK, LORA_LR_FACTOR = 16, 3
# Experts that take turns on the device answer many batches each, so that moving one in is rare.
OFFLOAD_CALLS_PER_EXPERT = 64


def resolve(flags: Flags, inputs: Inputs) -> Settings:
    """Join the processes, open the files by their headers and give every setting its value.

    Raises:
        UserError: something is missing, damaged or contradictory, or does not fit together.
    """
    processes = join(flags.performance.device, pick_device)
    check_report(flags.output.report)
    check_compiler(flags)
    files = open_files(flags, inputs.config)
    if flags.output.preset or flags.output.config:
        print(f"Flags: {flags_line(flags)}")
    print("\n".join(inputs.prompts.lines))
    if 2 * (found := len(inputs.prompts.train)) < (meant := flags.data.num_prompts or 0):
        print(
            f"Hint: {found:,} prompts of the {meant:,} of --num_prompts; a student of few prompts learns to draw these alone"
        )
    return decide(flags, inputs, files, processes)


def decide(flags: Flags, inputs: Inputs, files: Files, processes: Processes) -> Settings:
    """Return the settings: what was typed, with every default and correction."""
    config, own, teacher = inputs.config, flags.optimization, files.teacher
    unit = teacher.vae_scale_factor * math.lcm(config.patch_size, files.wan_files.config.patch_size)
    typed_sizes = flags.student.image_sizes or [square(config.image_size)]
    known: dict[str, Any] = {
        **vars(files),
        **resolve_states(flags, files, config),
        **resolve_device(flags, processes),
        "flags_text": flags_text(flags),
        "processes": processes,
        "config": config,
        "teacher_levels": (teacher_levels(teacher) or ())[:-1],
        "prompts": inputs.prompts.train,
        "prompts_digest": prompts_digest(inputs.prompts.train),
        "image_sizes": resolve_sizes(typed_sizes, config.image_size, unit, MAX_PATCHES),
        "sample_prompts": inputs.sample_prompts if files.vae_location else [],
        "sample_every": flags.output.sample_every if files.vae_location else 0,
    }
    if flags.student.train == "lora":
        known["lora_rank"] = rank = given(flags.student.lora_rank, LORA_RANK)
        known["lora_alpha"] = given(flags.student.lora_alpha, float(rank))
    known |= resolve_length(flags, known)
    num_samples = own.batch_size * own.grad_accum_steps * processes.count
    known["optimization"] = resolve_optimization(flags, config, num_samples, known["first_stage_steps"])
    known |= resolve_measuring(flags, teacher, known, num_samples)
    known["held_out_prompts"] = inputs.prompts.held_out if known["eval_every"] else []
    names = {setting.name for setting in fields(Settings)}
    return Settings(**{name: value for name, value in flags.as_dict().items() if name in names} | known)


def given(typed, otherwise):
    """Return what was typed, else the other value."""
    return otherwise if typed is None else typed


# ---- states and length; `known` are the settings that are decided already, by their names ----


def resolve_states(flags: Flags, files: Files, config: StudentConfig) -> dict[str, Any]:
    """Return the states that the student learns at: those that were typed, else the recipe that won, where it can be had."""
    own, offload, wan_files = flags.states, flags.performance.teacher_offload, files.wan_files
    num_experts = len(wan_files.experts)
    if offload == "experts" and num_experts == 1:
        print("--teacher_offload is of no use here, this teacher has one expert; --teacher_offload blocks is for it")
        offload = None
    # A cache keeps no hidden states, and those at pure noise are not compared.
    has_features = own.states != "noise" and own.teacher_cache is None
    feature_loss_weight = given(flags.objective.feature_loss_weight, FEATURE_LOSS_WEIGHT if has_features else 0.0)
    is_of_teacher = files.source.is_like(wan_files.config) if files.source else flags.student.init_from == "teacher"
    if feature_loss_weight and (not is_of_teacher or not config.is_wan):
        print("Hidden states are not compared: the student has none of the teacher's channels")
        feature_loss_weight = 0.0
    if flags.student.train == "lora":
        feature_loss_weight = 0.0  # which compares a student as a whole
    takes_turns = offload and num_experts > 1 and own.states == "trajectory"
    return {
        "sigma_range": tuple(own.sigma_range or ALL_LEVELS),
        "calls_per_expert": given(own.calls_per_expert, OFFLOAD_CALLS_PER_EXPERT if takes_turns else 0),
        "feature_loss_weight": feature_loss_weight,
        "teacher_offload": offload,
    }


def resolve_length(flags: Flags, known: dict[str, Any]) -> dict[str, Any]:
    """Return the steps of the run and of its first stage, and the teacher's calls that they take."""
    own, teacher, config, sizes = flags.optimization, known["teacher"], known["config"], known["image_sizes"]
    largest = max((teacher.latent_shape(config, size)[1:] for size in sizes), key=math.prod)
    replay = flags.states.replay or suggested_replay(
        known["wan_files"].config, config, largest, is_guided=teacher.uses_guidance
    )
    is_lora = flags.student.train == "lora"
    student_steps = lora_steps(flags, known["source"]) if is_lora else few_steps(flags, teacher, known["sigma_range"])
    # A LoRA has one stage, whose answers are segments of the teacher's paths where the student draws in few steps.
    share = FIRST_STAGE_SHARE if student_steps and not is_lora else 1
    by_segments = is_lora and student_steps
    calls_per_answer = steps_of_segments(teacher.num_inference_steps, student_steps) if by_segments else 1
    if own.max_steps is not None or own.num_epochs is not None or own.teacher_calls is None:
        epochs = steps_of_epochs(own.num_epochs or 1, len(known["prompts"]), samples_per_step(flags))
        num_steps = own.max_steps or epochs
        first = math.ceil(share * num_steps)
    else:
        first = max(1, replay * own.teacher_calls // calls_per_answer)
        num_steps = round(first / share)
    return {
        "replay": replay,
        "num_steps": num_steps,
        "first_stage_steps": first,
        "student_steps": student_steps,
        "num_calls": calls_per_answer * sum(one.num_calls for one in make_schedules(first, replay, len(sizes))),
    }


def lora_steps(flags: Flags, source: Source) -> int | None:
    """Return the steps that the student of a LoRA draws in, which are its own; None for those of the teacher."""
    typed, own = flags.objective.student_steps, source.student_steps
    if typed is not None and (typed or None) != own:
        raise UserError(
            f"--student_steps: the student of {flags.student.init_from} draws in {own or 'all'} steps, and so it does with a LoRA; leave it out"
        )
    return own


def few_steps(flags: Flags, teacher: TeacherSettings, sigma_range: tuple[float, float]) -> int | None:
    """Return the steps that the student learns to draw in; None for those of the teacher."""
    typed = flags.objective.student_steps
    if typed is not None:
        return typed or None
    can = not teacher.has_few_levels and sigma_range == ALL_LEVELS
    return STUDENT_STEPS if can and teacher.num_inference_steps > STUDENT_STEPS else None


def resolve_optimization(flags: Flags, config: StudentConfig, num_samples: int, num_steps: int) -> OptimizationOptions:
    """Return how the weights move; `num_samples` are those of a step."""
    own, factor = flags.optimization, LORA_LR_FACTOR if flags.student.train == "lora" else 1
    return OptimizationOptions(
        lr=own.lr or factor * suggested_lr(own.optimizer, config.hidden_size, num_samples),
        optimizer=own.optimizer,
        lr_scheduler=own.lr_scheduler,
        lr_warmup_steps=given(own.lr_warmup_steps, suggested_warmup(num_steps)),
        weight_decay=own.weight_decay,
        max_grad_norm=own.max_grad_norm,
        ema_decay=own.ema_decay,
    )


def resolve_measuring(
    flags: Flags, teacher: TeacherSettings, known: dict[str, Any], num_samples: int
) -> dict[str, int]:
    """Return the steps between held-out measurements (0: none), the teacher's steps on a path, and whether it draws for them."""
    eval_every, most = flags.output.eval_every, MAX_SHARE * known["num_calls"] * num_samples
    can_draw = known["sigma_range"] == ALL_LEVELS
    draws = can_draw and (eval_every is not None or num_answers(teacher, draws=True) <= most)
    if eval_every is None:
        is_cheap = num_answers(teacher, draws=False) <= most
        eval_every = math.ceil(known["first_stage_steps"] / NUM_MEASUREMENTS) if is_cheap else 0
    return {"eval_every": eval_every, "held_out_steps": path_steps(teacher), "draws_held_out": draws}


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
    is_elsewhere = output.dry_run and (output.assume_gpu is not None or own.device is None)
    is_for_gpu = is_elsewhere or processes.device.startswith("cuda")
    dtype = own.dtype or ("bf16" if is_for_gpu else "fp32")
    if own.teacher_dtype == "fp8" and processes.device == "mps" and not is_for_gpu:
        raise UserError("--teacher_dtype fp8: Apple's GPUs have no fp8; give bf16")
    if own.teacher_offload and processes.device == "mps" and not is_for_gpu:
        raise UserError("--teacher_offload: Apple's GPUs have the host's memory; leave it out")
    return {
        "dtype": dtype,
        "teacher_dtype": own.teacher_dtype or dtype,
        "is_for_gpu": is_for_gpu,
        "shard_teacher": own.shard in ("teacher", "both"),
        "shard_student": own.shard in ("student", "both"),
    }
