"""From what was typed to the settings of a run: every default, correction and refusal, once. Nothing is written, no weight is read.

`resolve` is the order; each function below it decides one thing from those before it, and prints a line where it corrects what was
typed. docs/measurements.md has the measurements that the defaults were chosen by.
"""

import math
import os
import shutil
import sys
from typing import Any

from wandistiller.device import pick_device
from wandistiller.errors import UserError
from wandistiller.model.config import MAX_PATCHES, StudentConfig
from wandistiller.model.image_sizes import resolve_sizes, square
from wandistiller.model.sizes import BACKWARD_PASSES, num_image_tokens, transformer_flops
from wandistiller.processes import Processes, join
from wandistiller.reports.trackers import check_report
from wandistiller.run.flag_files import flags_text
from wandistiller.run.flags import Flags
from wandistiller.run.headers import ALL_LEVELS, Source, open_files
from wandistiller.run.held_out import MAX_SHARE, NUM_MEASUREMENTS, num_answers
from wandistiller.run.inputs import Inputs
from wandistiller.run.settings import Settings, of_fields
from wandistiller.training.loop import steps_of_epochs
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.walk.batches import make_schedules
from wandistiller.walk.grids import steps_of_segments, teacher_levels
from wandistiller.wan.settings import TeacherSettings

# The recipe that won on two teachers (docs/measurements.md)
FEATURE_LOSS_WEIGHT = 1.0
STUDENT_STEPS, FIRST_STAGE_SHARE = 4, 2 / 3
# A LoRA moves little of a weight, and learns best at a higher rate.
LORA_RANK, LORA_LR_FACTOR = 16, 3
# Experts that take turns on the device answer many batches each, so that moving one in is rare.
OFFLOAD_CALLS_PER_EXPERT = 64
# The best learning rates of a student of MEASURED_WIDTH that learns from MEASURED_SAMPLES a step, by optimiser:
MEASURED_LR = {"adamw": 3e-3, "muon": 4e-3}
MEASURED_WIDTH, MEASURED_SAMPLES = 128, 64
WARMUP_SHARE, MAX_WARMUP_STEPS = 0.04, 500
# An answer is learnt from so often at least, however cheap it is; and at most, since more often it would be memorised.
MIN_REPLAY, MAX_REPLAY = 4, 8
TYPICAL_TEXT_TOKENS = 64  # the ratio of two models' FLOPs hardly depends on the text


def resolve(flags: Flags, inputs: Inputs) -> Settings:
    """Join the processes, open the files by their headers and give every setting its value, or refuse what does not fit together."""
    processes = join(flags.device, pick_device)
    check_report(flags.report)
    check_compiler(flags)
    files = open_files(flags, inputs.config)
    print("\n".join(inputs.prompts.lines))
    if 2 * (found := len(inputs.prompts.train)) < (meant := flags.num_prompts or 0):
        print(f"Hint: {found:,} prompts of the {meant:,} of --num_prompts; a student of few prompts draws these alone")
    return decide(flags, inputs, files, processes)


def decide(flags: Flags, inputs: Inputs, files: dict[str, Any], processes: Processes) -> Settings:
    """Return the settings: what was typed, with every default and correction."""
    config, teacher = inputs.config, files["teacher"]
    unit = teacher.vae_scale_factor * math.lcm(config.patch_size, files["wan_files"].config.patch_size)
    sizes = flags.image_sizes or (files["source"].sizes if files["source"] else ()) or [square(config.image_size)]
    known: dict[str, Any] = {
        **files,
        **resolve_states(flags, files, config),
        **resolve_device(flags, processes),
        "flags_text": flags_text(flags),
        "processes": processes,
        "config": config,
        "teacher_levels": teacher_levels(teacher),
        "prompts": inputs.prompts.train,
        "image_sizes": resolve_sizes(sizes, config.image_size, unit, MAX_PATCHES),
        "sample_prompts": inputs.sample_prompts if files["vae_location"] else [],
        "sample_every": flags.sample_every if files["vae_location"] else 0,
    }
    is_lora = flags.train == "lora"
    if is_lora:
        known["lora_rank"] = rank = given(flags.lora_rank, LORA_RANK)
        known["lora_alpha"] = given(flags.lora_alpha, float(rank))
    num_samples = flags.batch_size * flags.grad_accum_steps * processes.count
    known |= resolve_length(flags, known, num_samples)
    lr = suggested_lr(flags.optimizer, config.hidden_size, num_samples) * (LORA_LR_FACTOR if is_lora else 1)
    warmup = given(flags.lr_warmup_steps, suggested_warmup(known["first_stage_steps"]))
    rates = {"lr": flags.lr or lr, "lr_warmup_steps": warmup}
    known["optimization"] = OptimizationOptions(**of_fields(OptimizationOptions, flags) | rates)
    known |= resolve_measuring(flags, teacher, known, num_samples)
    known["held_out_prompts"] = inputs.prompts.held_out if known["eval_every"] else []
    return Settings(**of_fields(Settings, flags) | known)


def given(typed, otherwise):
    return otherwise if typed is None else typed


# ---- states and length; `known` are the settings that are decided already, by their names ----


def resolve_states(flags: Flags, files: dict[str, Any], config: StudentConfig) -> dict[str, Any]:
    """Return the states that the student learns at: those that were typed, else the recipe that won, where it can be had."""
    offload, wan_files, source = flags.teacher_offload, files["wan_files"], files["source"]
    num_experts = len(wan_files.experts)
    if offload == "experts" and num_experts == 1:
        print("--teacher_offload is of no use here, this teacher has one expert; --teacher_offload blocks is for it")
        offload = None
    # A cache keeps no hidden states.
    feature_loss_weight = given(flags.feature_loss_weight, 0.0 if flags.teacher_cache else FEATURE_LOSS_WEIGHT)
    is_of_teacher = source.is_like(wan_files.config) if source else flags.init_from == "teacher"
    if feature_loss_weight and (not is_of_teacher or not config.is_wan):
        print("Hidden states are not compared: the student has none of the teacher's channels")
        feature_loss_weight = 0.0
    if flags.train == "lora":
        feature_loss_weight = 0.0  # which compares a student as a whole
    takes_turns = offload and num_experts > 1
    return {
        "sigma_range": tuple(flags.sigma_range or ALL_LEVELS),
        "calls_per_expert": given(flags.calls_per_expert, OFFLOAD_CALLS_PER_EXPERT if takes_turns else 0),
        "feature_loss_weight": feature_loss_weight,
        "teacher_offload": offload,
    }


def resolve_length(flags: Flags, known: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """Return the steps of the run and of its first stage, and the teacher's calls that they take."""
    teacher, config, sizes = known["teacher"], known["config"], known["image_sizes"]
    largest = max((teacher.latent_shape(config, size)[1:] for size in sizes), key=math.prod)
    replay = flags.replay or suggested_replay(
        known["wan_files"].config, config, largest, is_guided=teacher.uses_guidance
    )
    is_lora = flags.train == "lora"
    student_steps = lora_steps(flags, known["source"]) if is_lora else few_steps(flags, teacher, known["sigma_range"])
    # A LoRA has one stage, whose answers are segments of the teacher's paths where the student draws in few steps.
    share = FIRST_STAGE_SHARE if student_steps and not is_lora else 1
    by_segments = is_lora and student_steps
    calls_per_answer = steps_of_segments(teacher.num_inference_steps, student_steps) if by_segments else 1
    if flags.max_steps is not None or flags.num_epochs is not None or flags.teacher_calls is None:
        num_steps = flags.max_steps or steps_of_epochs(flags.num_epochs or 1, len(known["prompts"]), num_samples)
        first = math.ceil(share * num_steps)
    else:
        first = max(1, replay * flags.teacher_calls // calls_per_answer)
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
    typed, own = flags.student_steps, source.student_steps
    if typed is not None and (typed or None) != own:
        raise UserError(
            f"--student_steps: the student of {flags.init_from} draws in {own or 'all'} steps, and so it does with a LoRA; leave it out"
        )
    if own and tuple(flags.sigma_range or ALL_LEVELS) != ALL_LEVELS:
        raise UserError(
            f"--sigma_range: the student of {flags.init_from} draws in few steps, which take all noise levels; leave it out"
        )
    return own


def few_steps(flags: Flags, teacher: TeacherSettings, sigma_range: tuple[float, float]) -> int | None:
    """Return the steps that the student learns to draw in; None for those of the teacher."""
    typed = flags.student_steps
    if typed is not None:
        return typed or None
    can = not teacher.has_few_levels and sigma_range == ALL_LEVELS
    return STUDENT_STEPS if can and teacher.num_inference_steps > STUDENT_STEPS else None


def suggested_lr(optimizer: str, hidden_size: int, num_samples: int) -> float:
    """Return the learning rate for a student's width and the samples of a step.

    It falls as one over the width, as the best rate of hidden layers does (muP, arXiv 2203.03466), and with the square root of
    the samples (arXiv 2405.14578). It is not raised above the measured one.
    """
    samples = min(num_samples, MEASURED_SAMPLES) / MEASURED_SAMPLES
    rate = MEASURED_LR[optimizer] * MEASURED_WIDTH / max(hidden_size, MEASURED_WIDTH) * math.sqrt(samples)
    return float(f"{rate:.2g}")


def suggested_warmup(num_steps: int) -> int:
    return min(MAX_WARMUP_STEPS, round(WARMUP_SHARE * num_steps))


def suggested_replay(
    teacher: StudentConfig, student: StudentConfig, latent_size: int | tuple[int, int], *, is_guided: bool
) -> int:
    """Return how often each answer is learnt from, so that learning costs about what the teacher's answers cost."""
    asked = teacher, num_image_tokens(teacher, latent_size), TYPICAL_TEXT_TOKENS
    answer = transformer_flops(*asked, TYPICAL_TEXT_TOKENS if is_guided else None)
    forward = transformer_flops(student, num_image_tokens(student, latent_size), TYPICAL_TEXT_TOKENS)
    return min(max(round(answer / ((1 + BACKWARD_PASSES) * forward)), MIN_REPLAY), MAX_REPLAY)


def resolve_measuring(
    flags: Flags, teacher: TeacherSettings, known: dict[str, Any], num_samples: int
) -> dict[str, int]:
    """Return the steps between held-out measurements (0: none), and whether the teacher draws for them."""
    eval_every, most = flags.eval_every, MAX_SHARE * known["num_calls"] * num_samples
    can_draw = known["sigma_range"] == ALL_LEVELS
    draws = can_draw and (eval_every is not None or num_answers(teacher, draws=True) <= most)
    if eval_every is None:
        is_cheap = not flags.offline_teacher and num_answers(teacher, draws=False) <= most
        eval_every = math.ceil(known["first_stage_steps"] / NUM_MEASUREMENTS) if is_cheap else 0
    return {"eval_every": eval_every, "draws_held_out": draws}


# ---- device ----


def check_compiler(flags: Flags) -> None:
    """Refuse --compile where the C++ compiler is missing that torch calls (torch: _inductor/cpp_builder.py), as in slim containers."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if flags.compile and not flags.dry_run and shutil.which(compiler) is None:
        raise UserError(f"--compile: torch.compile needs a C++ compiler, and there is no {compiler}; install one")


def resolve_device(flags: Flags, processes: Processes) -> dict[str, object]:
    """Return the precision for the device of this process, or for the GPU that --dry_run plans for."""
    is_elsewhere = flags.dry_run and (flags.assume_gpu is not None or flags.device is None)
    is_for_gpu = is_elsewhere or processes.device.startswith("cuda")
    dtype = flags.dtype or ("bf16" if is_for_gpu else "fp32")
    if processes.device == "mps" and not is_for_gpu:
        if flags.teacher_dtype == "fp8":
            raise UserError("--teacher_dtype fp8: Apple's GPUs have no fp8; give bf16")
        if flags.teacher_offload:
            raise UserError("--teacher_offload: Apple's GPUs have the host's memory; leave it out")
    return {
        "device": processes.device,
        "dtype": dtype,
        "teacher_dtype": flags.teacher_dtype or dtype,
        "is_for_gpu": is_for_gpu,
        "shard_teacher": flags.shard in ("teacher", "both"),
        "shard_student": flags.shard in ("student", "both"),
    }
