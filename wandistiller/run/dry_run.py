"""The budget of a run from its settings; no weight is read and nothing is written."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

from wandistiller.budget.cards import GIB
from wandistiller.budget.memory import checkpoint_bytes, disk_budget, host_budget, memory_budget
from wandistiller.budget.report import (
    Verdict,
    compute_lines,
    conclusion,
    disk_verdict,
    find_card,
    gib,
    host_memory,
    host_verdict,
    memory_lines,
    table_line,
    verdict,
)
from wandistiller.budget.workload import FP32, UMT5_XXL_PARAMETERS, Workload
from wandistiller.command_line import torchrun_environment
from wandistiller.errors import UserError
from wandistiller.files.output_folder import check_writable
from wandistiller.files.paths import nearest_existing
from wandistiller.model.sizes import count_parameters
from wandistiller.run.learning import schedules_of, segment_capacity, walk_options
from wandistiller.run.settings import Settings, of_fields
from wandistiller.training.checkpoints import FOLDER_NAME, manifests_in
from wandistiller.walk.grids import steps_of_segments
from wandistiller.wan.text_encoder import token_ids

# The tokens of so many prompts stand for those of all.
NUM_COUNTED_PROMPTS = 256


def print_budget(settings: Settings) -> int:
    """Print what the run will take and whether it fits; return the exit code. What is certain not to fit is refused."""
    check_places(settings)
    card = find_card(settings.device, settings.is_for_gpu, settings.assume_gpu)
    is_known = settings.assume_gpu is not None or settings.device.startswith("cuda") or not settings.is_for_gpu
    workload = with_texts(settings, workload_of(settings))
    teacher, student = (count_parameters(model).total for model in (workload.teacher, workload.student))
    disk, others = disk_budget(workload), disk_verdicts(workload, settings)
    experts = f"{workload.num_experts} x " if workload.num_experts > 1 else ""
    tables = {
        "Parameters": [f"  teacher {experts}{teacher:,}, student {student:,} ({student / teacher:.1%} of one)"],
        f"Memory of one {'GPU' if workload.is_gpu else 'process'}, GiB; {card.name} has {card.gib:.2f}": memory_lines(
            memory_budget(workload)
        ),
        "Disk, GiB": [table_line(part.name, part.num_bytes, f"{part.what} ({part.phase})") for part in disk],
        "Computing": compute_lines(workload, card),
    }
    if workload.is_gpu:
        tables["Host memory, GiB"] = memory_lines(host_budget(workload))
        others.insert(0, host_verdict(workload, host_memory()))
    for title, lines in tables.items():
        print("\n".join([title, *lines]))
    check_disk(settings)
    about = verdict(workload, int(card.gib * GIB), card.name)
    if about.is_certain_not_to_fit and is_known:
        raise UserError(f"--dry_run: {about.sentence}")
    print(conclusion(about, others))
    return 0


def workload_of(settings: Settings) -> Workload:
    config, sizes = settings.config, range(len(settings.image_sizes))
    walks = [walk_options(settings, size) for size in sizes]
    own = {
        "teacher": settings.wan_files.config,
        "student": config,
        "latent_size": settings.largest_latent_size,
        "num_experts": len(settings.wan_files.experts),
        "is_guided": settings.teacher.uses_guidance,
        "num_processes": settings.processes.count,
        "processes_per_machine": torchrun_environment().local_world_size,
        "optimizer": settings.optimization.optimizer,
        "ema": settings.optimization.ema_decay > 0,
        "num_features": config.depth if settings.feature_loss_weight else 0,
        "stored_batches": 0 if settings.teacher_cache else sum(part.capacity for part in schedules_of(settings)),
        "stored_segments": sum(segment_capacity(settings, size) for size in sizes) if settings.gathers_segments else 0,
        "latents_per_slot": 0 if settings.teacher_cache else sum(walk.latents_per_slot for walk in walks),
        "calls_per_step": settings.num_calls / settings.num_steps,
        "segment_passes": segment_passes(settings),
        "num_prompts": len(settings.prompts) + len(settings.held_out_prompts),
        "keep_checkpoints": settings.keep_checkpoints if settings.save_every else 0,
        "teacher_cache_batches": settings.num_calls if settings.teacher_cache else 0,
        "is_gpu": settings.is_for_gpu,
    }
    return Workload(**of_fields(Workload, settings) | own)


def segment_passes(settings: Settings) -> float:
    """Return the passes of the frozen student through segments for each sample of a step, on average over the run."""
    if settings.student_steps is None:
        return 0.0
    num_calls = math.ceil((settings.num_steps - settings.first_stage_steps) / settings.replay)
    passes = steps_of_segments(settings.teacher.num_inference_steps, settings.student_steps)
    return num_calls * passes / settings.num_steps


def with_texts(settings: Settings, workload: Workload) -> Workload:
    """Return the workload with the tokens of some prompts, evenly spread, and the size of the run's text encoder."""
    every = max(1, len(settings.prompts) // NUM_COUNTED_PROMPTS)
    texts = [*settings.prompts[::every][:NUM_COUNTED_PROMPTS], settings.teacher.negative_prompt]
    encoder = settings.encoder
    slots = settings.config.text_max_length
    if encoder:
        counts = [len(ids) for ids in token_ids(texts, encoder, slots)]
    else:  # the mock's
        counts = [min(len(text.split()) + 1, slots) for text in texts]
    *of_prompts, negative = counts
    without_files = 0 if settings.wan_files.is_mock else UMT5_XXL_PARAMETERS
    return replace(
        workload,
        mean_text_tokens=sum(of_prompts) / len(of_prompts),
        negative_text_tokens=negative if workload.is_guided else 0,
        text_encoder_parameters=encoder.umt5.num_parameters if encoder else without_files,
    )


# ---- folders ----


def folders_of(settings: Settings) -> dict[str, str]:
    names = ("output_dir", "prompt_cache", "teacher_cache")
    return {f"--{name}": getattr(settings, name) for name in names if getattr(settings, name)}


def check_disk(settings: Settings) -> None:
    """Refuse a run whose student and checkpoints the disk of --output_dir has no room for, beside those that are kept already."""
    if not settings.save_every:
        return
    folder, keep = Path(settings.output_dir) / FOLDER_NAME, settings.keep_checkpoints
    count = keep + 1 - (0 if settings.overwrite else min(keep, len(manifests_in(folder))))
    needed = count * checkpoint_bytes(workload_of(settings)) + FP32 * count_parameters(settings.config).total
    free = shutil.disk_usage(nearest_existing(folder)).free
    if needed > free:
        raise UserError(
            f"{folder}: the student and {count} more checkpoints ({keep} are kept while the next is written) take about "
            f"{gib(needed)}, {gib(free)} are free; free some space, give another --output_dir, a smaller --keep_checkpoints, or "
            "--save_every 0"
        )


def check_places(settings: Settings) -> None:
    """Refuse folders as the run would, as far as that takes no weight and writes nothing."""
    for name, folder in folders_of(settings).items():
        check_writable(folder, name)
    if settings.teacher_cache or manifests_in(Path(settings.output_dir) / FOLDER_NAME):
        print("Not looked at, since it takes weights: whether checkpoints and teacher cache belong to this run")


def disk_verdicts(workload: Workload, settings: Settings) -> list[Verdict]:
    """Hold what the run writes against what is free on each disk."""
    places = {flag: nearest_existing(Path(folder).absolute()) for flag, folder in folders_of(settings).items()}
    verdicts = []
    for disk in {place.stat().st_dev: place for place in places.values()}.values():
        flags = [flag for flag, place in places.items() if place.stat().st_dev == disk.stat().st_dev]
        parts = [part for part in disk_budget(workload) if part.phase in flags]
        verdicts.append(disk_verdict(parts, shutil.disk_usage(disk).free))
    return verdicts
