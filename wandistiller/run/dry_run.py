"""The budget of a run from its flags and from the headers of its files; no weight is read."""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from wandistiller.budget.activations import FP32
from wandistiller.budget.machine import Machine, find_machine, free_bytes, matmul_rate
from wandistiller.budget.report import (
    GIB,
    Verdict,
    compute_lines,
    disk_lines,
    memory_lines,
    parameter_lines,
    verdict,
)
from wandistiller.budget.step_time import ASSUMED_UTILISATION, measure_step
from wandistiller.budget.workload import UMT5_XXL_PARAMETERS, Workload, checkpoint_bytes, step_flops, stored_latents
from wandistiller.device import DTYPES
from wandistiller.files.output_folder import check_writable
from wandistiller.files.prompts import Texts
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import count_parameters
from wandistiller.reports.progress import format_duration
from wandistiller.targets.replay import REPLAY_BATCHES
from wandistiller.training.checkpoints import Checkpoints
from wandistiller.training.loop import steps_of_epochs
from wandistiller.wan.files import WanFiles
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.text_encoder import count_tokens
from wandistiller.wan.text_encoder_files import TextEncoderFiles

NUM_COUNTED_PROMPTS = 256  # whose tokens stand for those of all


def workload_from_args(
    args: argparse.Namespace,
    wan_files: WanFiles,
    settings: TeacherSettings,
    config: StudentConfig,
    texts: Texts,
    dtype: str,
    is_gpu: bool = True,
) -> Workload:
    """The run that the flags ask for; a flag that a command has not counts as left out.

    Args:
        dtype: of matrix products, "fp32" or "bf16".
    """
    shard = getattr(args, "shard", None)
    accum, num_processes = getattr(args, "grad_accum_steps", None) or 1, int(os.environ.get("WORLD_SIZE", "1"))
    num_steps = args.max_steps or steps_of_epochs(
        args.num_epochs, len(texts.prompts), args.batch_size * accum * num_processes
    )
    calls = num_calls(args, settings, num_steps)
    return Workload(
        teacher=wan_files.config,
        student=config,
        latent_size=config.image_size // settings.vae_scale_factor,
        num_experts=len(wan_files.experts),
        uses_guidance=settings.uses_guidance,
        batch_size=args.batch_size,
        grad_accum_steps=accum,
        num_processes=num_processes,
        dtype=dtype,
        teacher_dtype=getattr(args, "teacher_dtype", None) or dtype,
        teacher_offload=getattr(args, "teacher_offload", False) and len(wan_files.experts) > 1,
        offline_teacher=args.offline_teacher,
        shard_teacher=shard in ("teacher", "both"),
        shard_student=shard in ("student", "both"),
        gradient_checkpointing=getattr(args, "gradient_checkpointing", False),
        optimizer=getattr(args, "optimizer", None) or "adamw",
        ema=args.ema_decay > 0,
        num_features=config.depth if args.feature_loss_weight else 0,
        maps_features=config.block != "wan" or args.init == "random",
        stored_latents=stored_latents(
            args.states,
            renoised=args.renoise_fraction > 0,
            replay=args.replay,
            has_segments=args.student_steps is not None,
            is_cached=args.teacher_cache is not None,
        ),
        calls_per_step=calls / num_steps,
        num_steps=num_steps,
        num_prompts=len(texts.prompts) + len(texts.extra) + len(texts.held_out),
        keep_checkpoints=args.keep_checkpoints if args.save_every else 0,
        teacher_cache_batches=calls if args.teacher_cache else 0,
        is_gpu=is_gpu,
    )


def num_calls(args: argparse.Namespace, settings: TeacherSettings, num_steps: int) -> int:
    """Global batches that the teacher answers for so many steps, about.

    With --replay a full store is left over at the end, whose answers have half of their uses before them on average; a target
    of --student_steps takes the teacher's steps through one segment.
    """
    replay = args.replay
    per_answer = max(1, round(settings.num_inference_steps / args.student_steps)) if args.student_steps else 1
    left_over = 0 if args.teacher_cache or replay == 1 else (REPLAY_BATCHES - 1) * replay / 2
    at_least = REPLAY_BATCHES if left_over else 1
    return per_answer * min(num_steps, max(at_least, math.ceil((num_steps + left_over) / replay)))


def changeable_flags(args: argparse.Namespace) -> set[str]:
    """The flags that this command has, but for those that contradict what was given."""
    contradicted = {"offline_teacher"} if args.student_steps or args.eval_every else set()
    return set(vars(args)) - contradicted


# ---- text ----


@dataclass(frozen=True)
class TextSizes:
    """Tokens of a prompt on average and of the negative one, and parameters of the encoder that makes them."""

    mean_tokens: float
    negative_tokens: int
    encoder_parameters: int


def measure_texts(
    texts: Texts,
    settings: TeacherSettings,
    config: StudentConfig,
    encoder: TextEncoderFiles | None,
    is_mock: bool = False,
) -> TextSizes:
    """Tokens of some prompts, evenly spread, by the run's own tokenizer; where there is none (the mock) words count."""
    prompts = texts.prompts + texts.extra
    chosen = prompts[:: max(1, len(prompts) // NUM_COUNTED_PROMPTS)][:NUM_COUNTED_PROMPTS]
    everything = [*chosen, settings.negative_prompt]
    if encoder is None:
        counts = [len(text.split()) + 1 for text in everything]
        parameters = 0 if is_mock else UMT5_XXL_PARAMETERS
    else:
        counts, parameters = count_tokens(everything, encoder), encoder.num_parameters()
    *of_prompts, negative = [min(count, config.text_max_length) for count in counts]
    return TextSizes(sum(of_prompts) / len(of_prompts), negative if settings.uses_guidance else 0, parameters)


# ---- places ----


def has_checkpoints(args: argparse.Namespace) -> bool:
    """Whether the folder of --output_dir holds some already."""
    return Checkpoints(args.output_dir, {}, args.batch_size).exist()


def places_of(args: argparse.Namespace) -> dict[str, str]:
    """The folders that the run would write to, by their flags."""
    names = ("output_dir", "prompt_cache", "teacher_cache")
    return {f"--{name}": getattr(args, name) for name in names if getattr(args, name)}


def check_disk(
    checkpoints: Checkpoints,
    args: argparse.Namespace,
    wan_files: WanFiles,
    settings: TeacherSettings,
    config: StudentConfig,
    texts: Texts,
) -> None:
    """Refuse a run whose checkpoints the disk of --output_dir has no room for."""
    if args.save_every:
        workload = workload_from_args(args, wan_files, settings, config, texts, "fp32")  # as they are saved
        checkpoints.check_disk(checkpoint_bytes(workload), FP32 * count_parameters(config).total, args.overwrite)


def check_places(
    args: argparse.Namespace,
    wan_files: WanFiles,
    settings: TeacherSettings,
    config: StudentConfig,
    texts: Texts,
    say: Callable[[str], None] = print,
) -> None:
    """Refuse folders as the run would, as far as that takes no weight and writes nothing.

    Raises:
        UserError: one cannot be written to, or the disk has no room for the checkpoints.
    """
    for flag, folder in places_of(args).items():
        check_writable(folder, flag)
    checkpoints = Checkpoints(args.output_dir, {}, args.batch_size, args.keep_checkpoints)
    check_disk(checkpoints, args, wan_files, settings, config, texts)
    if has_checkpoints(args) or args.teacher_cache:
        say("Not looked at, since it takes weights: whether checkpoints and teacher cache belong to this run")


# ---- report ----


def report_budget(
    args: argparse.Namespace,
    wan_files: WanFiles,
    settings: TeacherSettings,
    config: StudentConfig,
    texts: Texts,
    encoder: TextEncoderFiles | None,
    device: str,
    say: Callable[[str], None] = print,
) -> tuple[Verdict, Machine]:
    """Print what the run will take, against what the machine has."""
    machine = find_machine(args, device)
    dtype = args.dtype or ("bf16" if machine.is_gpu else "fp32")
    sizes = measure_texts(texts, settings, config, encoder, wan_files.is_mock)
    workload = replace(
        workload_from_args(args, wan_files, settings, config, texts, dtype, machine.is_gpu),
        mean_text_tokens=sizes.mean_tokens,
        negative_text_tokens=sizes.negative_tokens,
        text_encoder_parameters=sizes.encoder_parameters,
    )
    memory = (
        f"Memory of one {'GPU' if machine.is_gpu else 'process'}, GiB; {machine.name} has {machine.memory / GIB:.2f}"
    )
    for title, lines in (
        ("Parameters", parameter_lines(workload)),
        (memory, memory_lines(workload)),
        (f"Disk, GiB ({_free(args)})", disk_lines(workload)),
        ("Computing", [*compute_lines(workload), *time_lines(workload, machine, dtype)]),
    ):  # fmt: skip
        say("\n".join([title, *lines]))
    return verdict(workload, machine.memory, changeable_flags(args), machine.name), machine


def _free(args: argparse.Namespace) -> str:
    return ", ".join(f"{flag} has {free_bytes(folder) / GIB:.2f} free" for flag, folder in places_of(args).items())


def time_lines(workload: Workload, machine: Machine, dtype: str) -> list[str]:
    """The loop's time where there is a device: from a few steps of random weights, or from FLOPs where these take too long."""
    if machine.device is None:
        return ["  time: not measured, the device is not here (--device cpu plans for this machine)"]
    rate = matmul_rate(machine.device, DTYPES[dtype])
    try:
        step = measure_step(workload, machine.device, rate)
    except torch.OutOfMemoryError:
        step = None
    if step is None:
        seconds = step_flops(workload).total / (ASSUMED_UTILISATION * rate)
        return [
            f"  time, an estimate: {seconds:.3g} s a step, {_hours(seconds, workload)}, if {ASSUMED_UTILISATION:.0%} (assumed) "
            f"of the {rate / 1e12:.4g} TFLOP/s of plain {dtype} products here are reached"
        ]
    without = [
        *(["what the processes send each other"] if workload.num_processes > 1 else []),
        *(["moving experts"] if workload.teacher_offload else []),
    ]
    mfu = step_flops(workload).total / step.total_s / rate
    sizes = ((step.depths[0], workload.teacher.depth, "teacher"), (step.depths[1], workload.student.depth, "student"))
    blocks = " and ".join(f"{measured} of {depth} {whose} blocks" for measured, depth, whose in sizes)
    return [
        f"  time, measured with random weights in {blocks}: {step.answer_s:.3g} s a teacher's "
        f"answer, {step.learn_s:.3g} s to learn from one, {step.update_s:.3g} s an update",
        f"  so {step.total_s:.3g} s a step ({mfu:.0%} of the {rate / 1e12:.4g} TFLOP/s of plain {dtype} products here), "
        f"{_hours(step.total_s, workload)}" + (f", without {' and '.join(without)}" if without else ""),
    ]


def _hours(step_s: float, workload: Workload) -> str:
    return f"{format_duration(step_s * workload.num_steps)} for all {workload.num_steps:,} steps"
