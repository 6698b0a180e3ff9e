"""What a run learns from, by its settings: the walk and the store of each image size, or its answers in a folder."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from wandistiller.projection.project import ProjectionReport
from wandistiller.run.settings import Settings
from wandistiller.sampling.sampler import VelocityField
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.objective import span_ends
from wandistiller.walk.batches import Batches, Schedule, make_schedules
from wandistiller.walk.cache import CALLS_PER_GROUP, CachedAnswers, Layout, TeacherCache
from wandistiller.walk.grids import segment_grids
from wandistiller.walk.segments import SegmentTeacher
from wandistiller.walk.store import CAPACITY, Store
from wandistiller.walk.walk import Walk, WalkOptions, turns
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import describe_teacher
from wandistiller.wan.text_encoder import prompts_digest


def build_batches(
    settings: Settings,
    caches: Sequence[TeacherCache],
    prompt_embeds: PromptEmbeds,
    teacher: Teacher | None,
    projection: ProjectionReport,
) -> Batches:
    """Build what each step learns from, at all image sizes; `projection` says whose hidden states are compared."""
    total, device, schedules = settings.num_samples_per_step, settings.device, schedules_of(settings)
    if caches:
        cached = [
            (None, CachedAnswers(cache, own_slots(settings), total, (settings.seed, size), device))
            for size, cache in enumerate(caches)
        ]
        return Batches(cached, schedules, prompt_embeds, settings.batch_size, device)
    if settings.walks_segments:
        return build_few_step_batches(settings, prompt_embeds, teacher, settings.num_steps)
    compared: dict[str, Any] = {}
    if settings.feature_loss_weight:
        layers = span_ends(projection.layers, settings.wan_files.config.depth)
        compared = {"layers": layers, "channels": projection.channels}
    options = [replace(walk_options(settings, size), **compared) for size in range(len(schedules))]
    return walked_batches(settings, prompt_embeds, teacher, schedules, options)


def walked_batches(
    settings: Settings,
    prompt_embeds: PromptEmbeds,
    teacher: Teacher | SegmentTeacher,
    schedules: Sequence[Schedule],
    options: Sequence[WalkOptions],
    calls_per_answer: int = 1,
) -> Batches:
    """Build a walk with its store for each image size, and the batches that come of them."""
    slots, total, sources, segments = own_slots(settings), settings.num_samples_per_step, [], []
    # Where the GPU has no room for the teacher it has none for thousands of answers either.
    kept_on = "cpu" if settings.teacher_offload == "blocks" else settings.device
    for size, (schedule, own) in enumerate(zip(schedules, options, strict=True)):
        store = Store(schedule.capacity, slots, total, own.key, settings.device, len(schedules), kept_on)
        sources.append((Walk(teacher, prompt_embeds, own, slots), store))
        if settings.gathers_segments:
            key = settings.seed, 2 * len(schedules) + size
            capacity = segment_capacity(settings, size)
            segments.append(Store(capacity, slots, total, key, settings.device, kept_on=kept_on))
    return Batches(sources, schedules, prompt_embeds, settings.batch_size, settings.device, segments, calls_per_answer)


def own_slots(settings: Settings) -> range:
    """Return this process's part of the global batch."""
    count = settings.batch_size * settings.grad_accum_steps
    return range(settings.processes.rank * count, (settings.processes.rank + 1) * count)


def schedules_of(settings: Settings) -> list[Schedule]:
    """Return when the teacher is asked at each image size; the sizes take turns, a step each."""
    return make_schedules(settings.first_stage_steps, settings.replay, len(settings.image_sizes))


def walk_options(settings: Settings, size: int) -> WalkOptions:
    """Return which states are walked at an image size."""
    teacher = settings.teacher
    return WalkOptions(
        key=(settings.seed, size),
        latent_shape=settings.latent_shapes[size],
        num_prompts=len(settings.prompts),
        num_slots=settings.num_samples_per_step,
        batch_size=settings.num_samples_per_step,
        shift=teacher.shift,
        num_steps=teacher.num_inference_steps,
        lowest_sigma=settings.sigma_range[0],
        levels=settings.teacher_levels,
        renoises=teacher.teacher_sampler == "renoise",
        boundary=teacher.boundary_ratio,
        calls_per_expert=settings.calls_per_expert,
        segment_ends=(*grids_of_segments(settings)[:, 0].tolist(), 0.0) if settings.gathers_segments else (),
        device=settings.device,
        compute_dtype=settings.compute_dtype,
    )


def grids_of_segments(settings: Settings) -> Tensor:
    """Return the noise levels (student_steps, N + 1) of the teacher's steps through each segment of a path."""
    own = settings.teacher
    return segment_grids(own.num_inference_steps, settings.student_steps, own.shift, settings.teacher_levels)


def segment_capacity(settings: Settings, size: int) -> int:
    """Return the segments of the teacher's paths that each slot has room for; none has more of them than calls."""
    return min(CAPACITY // len(settings.image_sizes), schedules_of(settings)[size].num_calls)


def build_few_step_batches(
    settings: Settings, prompt_embeds: PromptEmbeds, field: VelocityField, num_steps: int
) -> Batches:
    """Build what each of the `num_steps` of a few-step stage learns from: segments that a teacher or a frozen student walks.

    Their random numbers are those of image sizes beyond the run's own.
    """
    sizes, grids = len(settings.image_sizes), grids_of_segments(settings)
    options = [
        replace(
            walk_options(settings, size),
            key=(settings.seed, sizes + size),
            num_steps=settings.student_steps,
            levels=(*grids[:, 0].tolist(), 0.0),
            calls_per_expert=0,
            segment_ends=(),
        )
        for size in range(sizes)
    ]
    teacher = SegmentTeacher(field, grids, bool(settings.teacher_levels))
    schedules = make_schedules(num_steps, settings.replay, sizes)
    return walked_batches(settings, prompt_embeds, teacher, schedules, options, grids.shape[1] - 1)


# ---- answers in a folder ----


def open_caches(settings: Settings) -> list[TeacherCache]:
    """Open the folder of --teacher_cache, or the folder of each size in it, and refuse what holds answers to something else."""
    if settings.teacher_cache is None:
        return []
    folder = Path(settings.teacher_cache)
    if settings.has_one_square_size:
        return [open_cache(settings, folder, 0)]
    return [open_cache(settings, folder / str(name), size) for size, name in enumerate(settings.image_sizes)]


def open_cache(settings: Settings, folder: Path, size: int) -> TeacherCache:
    num_calls, total = schedules_of(settings)[size].num_calls, settings.num_samples_per_step
    options = walk_options(settings, size)
    # Where experts take turns, a group of slots is walked through several turns of both.
    per_group = 4 * sum(turns(options)) if options.in_turns else CALLS_PER_GROUP
    layout = Layout(num_calls, total, settings.batch_size, per_group)
    return TeacherCache(folder, describe_answers(settings, options), layout)


def described(settings: Settings) -> dict[str, Any]:
    """Return what a run and a cache of answers must share with another to be the same: the teacher and the prompts."""
    return {
        **describe_teacher(settings.wan_files, settings.teacher),
        # fp8 makes another teacher; fp32 and bf16 may change from one command to the next, as --dtype may.
        "teacher_dtype": "fp8" if settings.teacher_dtype == "fp8" else None,
        "prompts": prompts_digest(settings.prompts),
        "about": settings.about,
    }


def describe_answers(settings: Settings, options: WalkOptions) -> dict[str, Any]:
    """Return what makes the answers of a cache what they are, as JSON values."""
    description = {
        **described(settings),
        "text_max_length": settings.config.text_max_length,
        "latent_shape": options.latent_shape,
        "image_size": options.key[1],
        "sigma_range": settings.sigma_range,
        "calls_per_expert": options.calls_per_expert,
        "seed": settings.seed,
        "batch_size": settings.num_samples_per_step,
        "num_prompts": options.num_prompts,
    }
    return json.loads(json.dumps(description))  # as it will be read back


def fill_caches(
    settings: Settings, caches: Sequence[TeacherCache], prompt_embeds: PromptEmbeds, teacher: Teacher
) -> None:
    """Ask the teacher for what the caches lack: all of it, or this process's part of it."""
    for size, cache in enumerate(caches):
        layout, processes = cache.layout, settings.processes
        part, num_parts = settings.cache_part or (processes.rank + 1, processes.count)
        chunks = layout.of_part(part - 1, num_parts)
        options = replace(walk_options(settings, size), num_slots=layout.num_slots)
        calls = sum(layout.calls_of(chunk) for chunk in cache.missing(chunks)) * layout.micro_batch // layout.batch_size
        print(f"Asking the teacher for {calls} batches, kept in {cache.folder}", flush=True)
        with tqdm(total=len(chunks), desc="Chunks of the teacher's answers", mininterval=10) as bar:
            cache.fill(chunks, partial(Walk, teacher, prompt_embeds, options), lambda done: bar.update(done - bar.n))
        processes.barrier()
