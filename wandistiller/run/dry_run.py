"""The budget of a run from its settings; no weight is read and nothing is written."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from wandistiller.budget.machine import GIB, Machine, find_machine, matmul_rate
from wandistiller.budget.memory import Component, checkpoint_bytes, disk_budget
from wandistiller.budget.report import Verdict, compute_lines, gib, memory_lines, table_line, time_lines, verdict
from wandistiller.budget.step_time import measure_step
from wandistiller.budget.workload import (
    FP32,
    UMT5_XXL_PARAMETERS,
    HeldOutWork,
    Workload,
)
from wandistiller.device import DTYPES
from wandistiller.errors import UserError
from wandistiller.files.output_folder import check_writable
from wandistiller.files.paths import nearest_existing
from wandistiller.model.sizes import count_parameters
from wandistiller.run.held_out import NUM_LEVELS, NUM_PATHS
from wandistiller.run.learning import schedules_of, walk_options
from wandistiller.run.resolve import some_of, token_counts
from wandistiller.run.settings import Settings
from wandistiller.training.checkpoints import Checkpoints


def print_budget(settings: Settings) -> int:
    """Print what the run will take and whether it fits; return the exit code.

    Raises:
        UserError: a folder cannot be written to, the disk has no room, or the run is certain not to fit.
    """
    check_places(settings)
    about, machine = print_budget_tables(settings)
    if about.is_certain_not_to_fit and machine.is_known:
        raise UserError(f"--dry_run: {about.sentence}")
    print(about.sentence)
    return 0


def workload_of(settings: Settings, dtype: str | None = None) -> Workload:
    """Describe the run by its shapes.

    Args:
        dtype: of matrix products, "fp32" or "bf16"; None for that of the run.
    """
    config = settings.config
    num_samples = settings.num_samples_per_step
    walks = [walk_options(settings, size, num_samples) for size in range(len(settings.image_sizes))]
    stored = sum(schedule.capacity for schedule in schedules_of(settings))
    return Workload(
        teacher=settings.wan_files.config,
        student=config,
        latent_size=settings.largest_latent_size,
        num_experts=len(settings.wan_files.experts),
        guided_fraction=settings.guided_fraction,
        batch_size=settings.batch_size,
        grad_accum_steps=settings.grad_accum_steps,
        num_processes=settings.processes.count,
        dtype=dtype or settings.dtype,
        teacher_dtype=settings.teacher_dtype,
        teacher_offload=settings.teacher_offload,
        offline_teacher=settings.offline_teacher,
        shard_teacher=settings.shard_teacher,
        shard_student=settings.shard_student,
        gradient_checkpointing=settings.gradient_checkpointing,
        optimizer=settings.optimization.optimizer,
        ema=settings.optimization.ema_decay > 0,
        num_features=config.depth if settings.feature_loss_weight else 0,
        maps_features=config.block != "wan" or settings.init == "random",
        stored_batches=0 if settings.teacher_cache else stored,
        latents_per_slot=0 if settings.teacher_cache else sum(walk.latents_per_slot for walk in walks),
        calls_per_step=settings.num_calls / settings.num_steps,
        num_steps=settings.num_steps,
        num_prompts=len(settings.prompts) + len(settings.held_out_prompts),
        keep_checkpoints=settings.keep_checkpoints if settings.save_every else 0,
        teacher_cache_batches=settings.num_calls if settings.teacher_cache else 0,
        held_out=held_out_work(settings),
        is_gpu=settings.is_for_gpu,
    )


def held_out_work(settings: Settings) -> HeldOutWork:
    """Count the states that teacher and student are asked at when the student is measured."""
    if not settings.eval_every:
        return HeldOutWork()
    levels = settings.student_steps or len(settings.teacher_levels) or NUM_LEVELS
    times = math.ceil(settings.num_steps / settings.eval_every)
    return HeldOutWork(teacher=NUM_PATHS * settings.held_out_steps, student=times * NUM_PATHS * levels)


def with_texts(settings: Settings, workload: Workload) -> Workload:
    """Return the workload with the tokens of some prompts, evenly spread, and the size of the run's text encoder."""
    counts = token_counts([*some_of(settings.prompts), settings.teacher.negative_prompt], settings.encoder)
    *of_prompts, negative = [min(count, settings.config.text_max_length) for count in counts]
    without_files = 0 if settings.wan_files.is_mock else UMT5_XXL_PARAMETERS
    return replace(
        workload,
        mean_text_tokens=sum(of_prompts) / len(of_prompts),
        negative_text_tokens=negative if workload.guided_fraction else 0,
        text_encoder_parameters=settings.encoder.num_parameters() if settings.encoder else without_files,
    )


# ---- folders ----


def has_checkpoints(settings: Settings) -> bool:
    """Return whether the folder of --output_dir holds some already."""
    return Checkpoints(settings.output_dir, {}, settings.batch_size).exist()


def folders_of(settings: Settings) -> dict[str, str]:
    """Return the folders that the run would write to, by their flags."""
    folders = {
        "--output_dir": settings.output_dir,
        "--prompt_cache": settings.prompt_cache,
        "--teacher_cache": settings.teacher_cache,
    }
    return {name: folder for name, folder in folders.items() if folder}


def check_disk(checkpoints: Checkpoints, settings: Settings) -> None:
    """Refuse a run whose checkpoints the disk of --output_dir has no room for."""
    if settings.save_every:
        workload = workload_of(settings, dtype="fp32")  # the precision that they are saved in
        student_bytes = FP32 * count_parameters(settings.config).total
        checkpoints.check_disk(checkpoint_bytes(workload), student_bytes, settings.overwrite)


def check_places(settings: Settings) -> None:
    """Refuse folders as the run would, as far as that takes no weight and writes nothing.

    Raises:
        UserError: one cannot be written to, or the disk has no room for the checkpoints.
    """
    for name, folder in folders_of(settings).items():
        check_writable(folder, name)
    checkpoints = Checkpoints(settings.output_dir, {}, settings.batch_size, settings.keep_checkpoints)
    check_disk(checkpoints, settings)
    if has_checkpoints(settings) or settings.teacher_cache:
        print("Not looked at, since it takes weights: whether checkpoints and teacher cache belong to this run")


def disk_lines(parts: Sequence[Component], folders: dict[str, str]) -> list[str]:
    """Return a line for each component, and one for each disk with what is free there."""
    lines = [table_line(part.name, part.num_bytes, f"{part.what} ({part.phase})") for part in parts]
    disks: dict[int, tuple[Path, list[str]]] = {}
    for name, folder in folders.items():
        existing = nearest_existing(Path(folder).absolute())
        disks.setdefault(os.stat(existing).st_dev, (existing, []))[1].append(name)
    for existing, names in disks.values():
        needed = sum(part.num_bytes for part in parts if part.phase in names)
        free = shutil.disk_usage(existing).free
        told = "fits" if needed <= free else "does not fit, unless it is there already"
        lines.append(f"  {', '.join(names)}: up to {gib(needed)} of {gib(free)} free, {told}")
    return lines


# ---- report ----


def print_budget_tables(settings: Settings) -> tuple[Verdict, Machine]:
    """Print what the run will take, against what the machine has."""
    machine = find_machine(settings.device, settings.assume_gpu_gib, can_be_elsewhere=not settings.is_device_typed)
    workload = with_texts(settings, workload_of(settings))
    teacher, student = (count_parameters(model).total for model in (workload.teacher, workload.student))
    experts = f"{workload.num_experts} x " if workload.num_experts > 1 else ""
    unit = "GPU" if machine.is_gpu else "process"
    for title, lines in (
        ("Parameters", [f"  teacher {experts}{teacher:,}, student {student:,} ({student / teacher:.1%} of one)"]),
        (f"Memory of one {unit}, GiB; {machine.name} has {machine.memory / GIB:.2f}", memory_lines(workload)),
        ("Disk, GiB", disk_lines(disk_budget(workload), folders_of(settings))),
        ("Computing", [*compute_lines(workload), *measured_time_lines(workload, machine)]),
    ):
        print("\n".join([title, *lines]))
    return verdict(workload, machine.memory, machine.name), machine


def measured_time_lines(workload: Workload, machine: Machine) -> list[str]:
    """Return the loop's time if the device is here: from a few steps of random weights, or from FLOPs if these take too long."""
    if machine.device is None:
        return ["  time: not measured, the device is not here (--device cpu plans for this machine)"]
    rate = matmul_rate(machine.device, DTYPES[workload.dtype])
    try:
        step = measure_step(workload, machine.device, rate)
    except torch.OutOfMemoryError:
        step = None
    return time_lines(workload, step, rate)
