"""The budget of a run from its plan; no weight is read and nothing is written."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from wandistiller.budget.machine import GIB, Machine, find_machine, matmul_rate
from wandistiller.budget.memory import Component, checkpoint_bytes, disk_budget
from wandistiller.budget.report import (
    Verdict,
    compute_lines,
    gib,
    memory_lines,
    table_line,
    time_lines,
    verdict,
)
from wandistiller.budget.step_time import measure_step
from wandistiller.budget.workload import (
    FP32,
    UMT5_XXL_PARAMETERS,
    HeldOutWork,
    Workload,
    guided_fraction,
    stored_latents,
)
from wandistiller.device import DTYPES
from wandistiller.errors import UserError
from wandistiller.evaluation.held_out import NUM_LEVELS
from wandistiller.files.output_folder import check_writable
from wandistiller.files.paths import nearest_existing
from wandistiller.model.sizes import count_parameters
from wandistiller.run.flags import Flags
from wandistiller.run.measuring import NUM_NOISES, expected_calls
from wandistiller.run.plan import Plan
from wandistiller.run.reach import most_encoded, some_of, token_counts
from wandistiller.run.states_kinds import STATES
from wandistiller.targets.replay import stored_batches
from wandistiller.targets.states import pool_per_lane
from wandistiller.training.checkpoints import Checkpoints


def print_budget(plan: Plan) -> int:
    """Print what the run will take and whether it fits; return the exit code.

    Raises:
        UserError: a folder cannot be written to, the disk has no room, or the run is certain not to fit.
    """
    check_places(plan)
    about, machine = print_budget_tables(plan)
    if about.is_certain_not_to_fit and machine.is_known:
        raise UserError(f"--dry_run: {about.sentence}")
    print(about.sentence)
    return 0


def workload_of(plan: Plan, is_gpu: bool | None = None, dtype: str | None = None) -> Workload:
    """Describe the run by its shapes.

    Args:
        is_gpu: whether it is planned for a GPU; None for the device of this process.
        dtype: of matrix products, "fp32" or "bf16"; None for what the flags say, or the best of the device.
    """
    flags, config = plan.flags, plan.config
    states, own, performance = flags.states, flags.optimization, flags.performance
    is_gpu = torch.device(plan.device).type == "cuda" if is_gpu is None else is_gpu
    dtype = dtype or performance.dtype or ("bf16" if is_gpu else "fp32")
    replays = states.replay > 1 and not states.teacher_cache
    num_sizes = len(plan.image_sizes)
    calls = expected_calls(flags, plan.settings.num_inference_steps, plan.num_steps)
    return Workload(
        teacher=plan.wan_files.config,
        student=config,
        latent_size=plan.largest_latent_size,
        num_experts=len(plan.wan_files.experts),
        guided_fraction=guided_fraction(plan.settings, states.sigma_range),
        batch_size=own.batch_size,
        grad_accum_steps=own.grad_accum_steps,
        num_processes=plan.processes.count,
        dtype=dtype,
        teacher_dtype=performance.teacher_dtype or dtype,
        teacher_offload=performance.teacher_offload,
        offline_teacher=states.offline_teacher,
        shard_teacher=performance.shards_teacher,
        shard_student=performance.shards_student,
        gradient_checkpointing=performance.gradient_checkpointing,
        optimizer=own.optimizer,
        ema=own.ema_decay > 0,
        num_features=config.depth if flags.objective.feature_loss_weight else 0,
        maps_features=config.block != "wan" or flags.student.init == "random",
        replayed_batches=stored_batches(plan.num_steps, states.replay, num_sizes) if replays else 0,
        stored_latents=stored_latents(
            pool_per_lane(plan.states_options, plan.settings, plan.lanes.total)
            if STATES[states.states].has_paths
            else 0,
            renoised=states.renoise_fraction > 0,
            has_segments=flags.objective.student_steps is not None,
            num_sizes=num_sizes,
        ),
        calls_per_step=calls / plan.num_steps,
        num_steps=plan.num_steps,
        num_prompts=most_encoded(plan) + len(plan.held_out_texts),
        keep_checkpoints=flags.output.keep_checkpoints if flags.output.save_every else 0,
        teacher_cache_batches=calls if states.teacher_cache else 0,
        held_out=held_out_work(plan),
        is_gpu=is_gpu,
    )


def held_out_work(plan: Plan) -> HeldOutWork:
    """Count the states that teacher and student are asked at when the student is measured."""
    measuring = plan.measuring
    if not measuring.every:
        return HeldOutWork()
    times = math.ceil(plan.num_steps / measuring.every)
    if measuring.is_default:
        num_states = measuring.num_paths * measuring.num_levels
        return HeldOutWork(teacher=measuring.num_paths * measuring.num_steps, student=times * num_states)
    paths, steps = len(plan.held_out_texts), plan.settings.num_inference_steps
    num_states = paths * min(steps, NUM_LEVELS)
    for_noise = measuring.num_noise_prompts * NUM_NOISES * steps
    for_scale = measuring.num_noise_prompts * sum(measuring.scale_steps)
    return HeldOutWork(
        teacher=paths * steps + for_noise + for_scale + times * num_states,
        student=times * (num_states + paths * steps + for_noise),
    )


def with_texts(plan: Plan, workload: Workload) -> Workload:
    """Return the workload with the tokens of some prompts, evenly spread, and the size of the run's text encoder."""
    counts = token_counts([*some_of(plan.trained_texts), plan.settings.negative_prompt], plan.encoder)
    *of_prompts, negative = [min(count, plan.config.text_max_length) for count in counts]
    without_files = 0 if plan.wan_files.is_mock else UMT5_XXL_PARAMETERS
    return replace(
        workload,
        mean_text_tokens=sum(of_prompts) / len(of_prompts),
        negative_text_tokens=negative if workload.guided_fraction else 0,
        text_encoder_parameters=plan.encoder.num_parameters() if plan.encoder else without_files,
    )


# ---- folders ----


def has_checkpoints(flags: Flags) -> bool:
    """Return whether the folder of --output_dir holds some already."""
    return Checkpoints(flags.output.output_dir, {}, flags.optimization.batch_size).exist()


def folders_of(flags: Flags) -> dict[str, str]:
    """Return the folders that the run would write to, by their flags."""
    folders = {
        "--output_dir": flags.output.output_dir,
        "--prompt_cache": flags.data.prompt_cache,
        "--teacher_cache": flags.states.teacher_cache,
    }
    return {name: folder for name, folder in folders.items() if folder}


def check_disk(checkpoints: Checkpoints, plan: Plan) -> None:
    """Refuse a run whose checkpoints the disk of --output_dir has no room for."""
    if plan.flags.output.save_every:
        workload = workload_of(plan, is_gpu=True, dtype="fp32")  # the precision that they are saved in
        student_bytes = FP32 * count_parameters(plan.config).total
        checkpoints.check_disk(checkpoint_bytes(workload), student_bytes, plan.flags.output.overwrite)


def check_places(plan: Plan) -> None:
    """Refuse folders as the run would, as far as that takes no weight and writes nothing.

    Raises:
        UserError: one cannot be written to, or the disk has no room for the checkpoints.
    """
    flags = plan.flags
    for name, folder in folders_of(flags).items():
        check_writable(folder, name)
    checkpoints = Checkpoints(flags.output.output_dir, {}, flags.optimization.batch_size, flags.output.keep_checkpoints)
    check_disk(checkpoints, plan)
    if has_checkpoints(flags) or flags.states.teacher_cache:
        print("Not looked at, since it takes weights: whether checkpoints and teacher cache belong to this run")


def disk_lines(parts: Sequence[Component], folders: dict[str, str]) -> list[str]:
    """Return a line for each component, and one for each disk with what is free there."""
    lines, disks = [table_line(part.name, part.num_bytes, f"{part.what} ({part.phase})") for part in parts], {}
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


def print_budget_tables(plan: Plan) -> tuple[Verdict, Machine]:
    """Print what the run will take, against what the machine has."""
    flags = plan.flags
    machine = find_machine(plan.device, flags.output.assume_gpu_gib, can_be_elsewhere=flags.performance.device is None)
    dtype = flags.performance.dtype or ("bf16" if machine.is_gpu else "fp32")
    workload = with_texts(plan, workload_of(plan, machine.is_gpu, dtype))
    teacher, student = (count_parameters(model).total for model in (workload.teacher, workload.student))
    experts = f"{workload.num_experts} x " if workload.num_experts > 1 else ""
    unit = "GPU" if machine.is_gpu else "process"
    for title, lines in (
        ("Parameters", [f"  teacher {experts}{teacher:,}, student {student:,} ({student / teacher:.1%} of one)"]),
        (f"Memory of one {unit}, GiB; {machine.name} has {machine.memory / GIB:.2f}", memory_lines(workload)),
        ("Disk, GiB", disk_lines(disk_budget(workload), folders_of(flags))),
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
