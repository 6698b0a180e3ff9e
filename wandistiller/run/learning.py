"""What a run learns from, by its settings: the walk and the store of each image size, or its answers in a folder."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wandistiller.errors import UserError
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.reports.progress import Countdown
from wandistiller.run.settings import Settings
from wandistiller.sampling.teacher import Teacher
from wandistiller.walk.batches import Batches, Schedule, make_schedules
from wandistiller.walk.cache import CALLS_PER_GROUP, CachedAnswers, Layout, TeacherCache
from wandistiller.walk.segments import SegmentOptions, SegmentWalk, calls_of_run
from wandistiller.walk.store import Store
from wandistiller.walk.walk import NO_HIDDEN_STATES, HiddenStates, Walk, WalkOptions, turns
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import describe_teacher


def build_batches(
    settings: Settings,
    caches: Sequence[TeacherCache],
    prompt_embeds: PromptEmbeds,
    teacher: Teacher | None,
    student: WanLiteStudent,
    hidden_states: HiddenStates,
) -> Batches:
    """Build what each step learns from, at all image sizes; the store and its hidden states are shared out over them."""
    micro_batch, total, device = settings.batch_size, settings.num_samples_per_step, settings.device
    slots, schedules = own_slots(settings), schedules_of(settings)
    if caches:
        keys = [(settings.seed, size) for size in range(len(caches))]
        cached = [
            CachedAnswers(cache, slots, total, key, len(settings.prompts), device)
            for cache, key in zip(caches, keys, strict=True)
        ]
        return Batches(cached, schedules, prompt_embeds, micro_batch, device)
    sources = []
    for size, schedule in enumerate(schedules):
        options = walk_options(settings, size, total, hidden_states)
        kind: type[Walk] = SegmentWalk if isinstance(options, SegmentOptions) else Walk
        walk = kind(teacher, student, prompt_embeds, options, slots, asks_together=settings.shard_student)
        store = Store(schedule.capacity, slots, total, options.key, device, num_sizes=len(schedules))
        sources.append((walk, store))
    return Batches(sources, schedules, prompt_embeds, micro_batch, device)


def own_slots(settings: Settings) -> range:
    """Return this process's part of the global batch."""
    count = settings.batch_size * settings.grad_accum_steps
    return range(settings.processes.rank * count, (settings.processes.rank + 1) * count)


def schedules_of(settings: Settings) -> list[Schedule]:
    """Return when the teacher is asked at each image size; the sizes take turns, a step each."""
    calls = calls_of_run(settings.teacher, settings.student_steps, settings.num_samples_per_step)
    return make_schedules(settings.num_steps, settings.replay, len(settings.image_sizes), *calls)


def walk_options(
    settings: Settings, size: int, num_slots: int, hidden_states: HiddenStates = NO_HIDDEN_STATES
) -> WalkOptions:
    """Return which states are walked at an image size.

    Args:
        num_slots: those of a batch, or those of a cache.
    """
    teacher = settings.teacher
    known: dict[str, Any] = {
        "key": (settings.seed, size),
        "latent_shape": settings.latent_shapes[size],
        "num_prompts": len(settings.prompts),
        "num_slots": num_slots,
        "batch_size": settings.num_samples_per_step,
        "shift": teacher.shift,
        "num_steps": teacher.num_inference_steps,
        "levels": (*settings.teacher_levels, 0.0) if settings.teacher_levels else None,
        "student_rollout": settings.student_rollout,
        "num_sizes": len(settings.image_sizes),
        "device": settings.device,
        "compute_dtype": settings.compute_dtype,
    }
    if settings.student_steps:
        return SegmentOptions(**known, num_segments=settings.student_steps)
    return WalkOptions(
        **known,
        kind="noise" if settings.states == "noise" else "paths",
        sigma_range=settings.sigma_range,
        boundary=teacher.boundary_ratio,
        calls_per_expert=settings.calls_per_expert,
        renoise_fraction=settings.renoise_fraction,
        layers=hidden_states.layers,
        channels=hidden_states.channels,
    )


# ---- answers in a folder ----


def open_caches(settings: Settings) -> list[TeacherCache]:
    """Open the folder of --teacher_cache, or the folder of each size in it, and refuse what holds answers to something else."""
    if settings.teacher_cache is None:
        return []
    folder, sizes = Path(settings.teacher_cache), settings.image_sizes
    if settings.has_one_square_size:
        return [open_cache(settings, folder, 0)]
    names = [str(size) for size in sizes]
    others = {path.name for path in folder.iterdir() if path.is_dir()} - set(names) if folder.is_dir() else set()
    if others:
        raise UserError(
            f"--teacher_cache {folder}: holds {min(others)}, which is of no size of this run ({', '.join(names)}); give another "
            "folder, or the sizes that it was made with"
        )
    return [open_cache(settings, folder / name, size) for size, name in enumerate(names)]


def open_cache(settings: Settings, folder: Path, size: int) -> TeacherCache:
    """Open the folder of one image size."""
    num_calls, total = schedules_of(settings)[size].num_calls, settings.num_samples_per_step
    options = walk_options(settings, size, total)
    # Where experts take turns, a group of slots is walked through several turns of both.
    per_group = 4 * sum(turns(options)) if options.in_turns else CALLS_PER_GROUP
    layout = Layout(num_calls, total, settings.batch_size, per_group)
    return TeacherCache(folder, describe_answers(settings, options), layout)


def describe_answers(settings: Settings, options: WalkOptions) -> dict[str, Any]:
    """Return what makes the answers of a cache what they are, as JSON values."""
    description = {
        **describe_teacher(settings.wan_files, settings.teacher),
        "teacher_dtype": "fp8" if settings.teacher_dtype == "fp8" else None,
        "text_max_length": settings.config.text_max_length,
        "latent_shape": options.latent_shape,
        "image_size": options.key[1],
        "states": options.kind,
        "sigma_range": options.sigma_range,
        "renoise_fraction": options.renoise_fraction,
        "calls_per_expert": options.calls_per_expert,
        "seed": settings.seed,
        "batch_size": settings.num_samples_per_step,
        "num_prompts": options.num_prompts,
        "prompts": settings.prompts_digest,
    }
    return json.loads(json.dumps(description))  # as it will be read back


def fill_caches(
    settings: Settings, caches: Sequence[TeacherCache], prompt_embeds: PromptEmbeds, teacher: Teacher
) -> None:
    """Ask the teacher for what the caches lack: all of it, or this process's part of it."""
    for size, cache in enumerate(caches):
        layout, processes = cache.layout, settings.processes
        if settings.cache_part is not None:
            part, num_parts = settings.cache_part
            chunks = layout.of_part(part - 1, num_parts)
        else:
            chunks = layout.of_process(processes)
        options = walk_options(settings, size, layout.num_slots)
        calls = sum(layout.calls_of(chunk) for chunk in cache.missing(chunks)) * layout.micro_batch // layout.batch_size
        print(f"Asking the teacher for {calls} batches, kept in {cache.folder}", flush=True)
        countdown = Countdown("Chunks of the teacher's answers", len(chunks))
        cache.fill(chunks, partial(Walk, teacher, None, prompt_embeds, options), countdown)
        processes.barrier()
