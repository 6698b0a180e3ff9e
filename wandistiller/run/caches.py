"""The teacher's answers on disk as a run has them: where they lie at each image size, in how many parts, and how builders take turns."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wandistiller.errors import UserError
from wandistiller.files.locks import waited_for
from wandistiller.files.output_folder import removed_if_empty
from wandistiller.model.image_sizes import ImageSize
from wandistiller.targets.cache import TeacherCache, describe_cache
from wandistiller.targets.cache_parts import CachePart, parts_of
from wandistiller.targets.replay import answered_batches
from wandistiller.targets.shares import Share

if TYPE_CHECKING:
    from wandistiller.run.plan import Plan
    from wandistiller.run.run import Run


def open_caches(plan: "Plan") -> list[TeacherCache]:
    """Open the folder of --teacher_cache, or the folder of each size in it, and refuse what holds answers to something else."""
    folder = plan.flags.states.teacher_cache
    if folder is None:
        return []
    description = describe_cache(
        plan.wan_files,
        plan.settings,
        plan.states_options,
        plan.trained_texts,
        plan.config,
        plan.lanes.total,
    )
    description |= plan.flags.recipe.teacher_storage()
    if plan.num_used is not None:
        description |= {"num_used_prompts": plan.num_used}
    sizes = plan.flags.student.image_sizes
    if sizes is None:
        return [open_cache(plan, Path(folder), description, Share())]
    description |= plan.flags.recipe.several_sizes()
    check_holds_sizes(Path(folder), sizes)
    return [
        open_cache(
            plan, Path(folder) / str(size), description | {"latent_shape": list(shape)}, Share(index, len(sizes))
        )
        for index, (size, shape) in enumerate(zip(sizes, plan.latent_shapes, strict=True))
    ]


def open_cache(plan: "Plan", folder: Path, description: dict[str, Any], share: Share) -> TeacherCache:
    """Open the folder of one image size, and refuse parts that its answers cannot be asked for in."""
    num_parts, num_batches = plan.flags.states.cache_parts, cached_batches(plan, share)
    parts = parts_of(num_batches, min(num_parts, num_batches)) if num_parts > 1 else []
    cache = TeacherCache(folder, description, plan.processes, parts)
    if cache.is_complete or num_parts == 1:
        return cache
    if plan.processes.are_many:
        raise UserError(
            f"--cache_parts {num_parts}: is for processes that are started one by one; those of torchrun share out the answers by "
            f"themselves. Leave it out, or fill {folder} without torchrun first (--cache_only)"
        )
    if num_parts > num_batches:
        raise UserError(
            f"--cache_parts {num_parts}: {folder} is to hold {num_batches} batches of answers; give at most {num_batches}"
        )
    return cache


def check_holds_sizes(folder: Path, sizes: Sequence[ImageSize]) -> None:
    """Refuse a folder that holds anything but answers at these sizes, each in a folder of its name."""
    others = {path.name for path in folder.iterdir()} - {str(size) for size in sizes} if folder.is_dir() else set()
    if others:
        raise UserError(
            f"--teacher_cache {folder}: holds {min(others)}, which is of no size of this run ({', '.join(map(str, sizes))}); give "
            "another folder, or the sizes that it was made with"
        )


def cached_batches(plan: "Plan", share: Share) -> int:
    """Return how many batches of answers a cache is to hold, of the image size with this share."""
    return answered_batches(share.of(plan.num_steps), plan.flags.states.replay)


def asking_line(cache: TeacherCache, part: CachePart, num_batches: int) -> str:
    """Return the line that says what the teacher is asked for."""
    if not cache.parts:
        return f"Asking the teacher for {num_batches} batches, kept in {cache.folder}"
    return (
        f"Asking the teacher for part {part.index + 1} of {len(cache.parts)}, {part.num_batches} of {num_batches} batches, kept in "
        f"{cache.folder}"
    )


@contextlib.contextmanager
def in_turn_with_builders(run: "Run", lock: Path, what: str) -> Iterator[None]:
    """Keep other builders of the run's caches from doing the same inside, so that they find what this one has kept.

    Where there are no locks, or the folder cannot be written to, all of them do it.
    """
    with contextlib.ExitStack() as held:
        if run.caches and not run.processes.are_many:
            with contextlib.suppress(OSError):
                held.enter_context(removed_if_empty(lock.parent))
                lock.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(waited_for(lock, lambda who: print(f"Waiting for {what}: {who}", flush=True)))
        yield
