"""The teacher's answers on disk as a run has them: a folder, or one for each image size in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wandistiller.errors import UserError
from wandistiller.model.image_sizes import ImageSize
from wandistiller.run.settings import Settings
from wandistiller.targets.cache import TeacherCache, describe_cache
from wandistiller.targets.cache_parts import CachePart, parts_of
from wandistiller.targets.replay import answered_batches
from wandistiller.targets.shares import Share


def open_caches(settings: Settings) -> list[TeacherCache]:
    """Open the folder of --teacher_cache, or the folder of each size in it, and refuse what holds answers to something else."""
    if settings.teacher_cache is None:
        return []
    folder = Path(settings.teacher_cache)
    description = describe_cache(
        settings.wan_files,
        settings.teacher,
        settings.states_options,
        settings.prompts,
        settings.config,
        settings.num_samples_per_step,
    )
    if settings.teacher_dtype == "fp8":
        description |= {"teacher_dtype": "fp8"}
    sizes = settings.image_sizes
    if settings.has_one_square_size:
        return [open_cache(settings, folder, description, Share())]
    description |= {"image_sizes": list(map(str, sizes))}
    check_holds_sizes(folder, sizes)
    return [
        open_cache(settings, folder / str(size), description | {"latent_shape": list(shape)}, Share(index, len(sizes)))
        for index, (size, shape) in enumerate(zip(sizes, settings.latent_shapes, strict=True))
    ]


def open_cache(settings: Settings, folder: Path, description: dict[str, Any], share: Share) -> TeacherCache:
    """Open the folder of one image size, and refuse more parts than it has batches."""
    num_parts, num_batches = (settings.cache_part or (1, 1))[1], cached_batches(settings, share)
    if num_parts > num_batches:
        raise UserError(
            f"--cache_part: {folder} is to hold {num_batches} batches of answers; give at most as many parts"
        )
    return TeacherCache(
        folder, description, settings.processes, parts_of(num_batches, num_parts) if settings.cache_part else []
    )


def check_holds_sizes(folder: Path, sizes: Sequence[ImageSize]) -> None:
    """Refuse a folder that holds anything but answers at these sizes, each in a folder of its name."""
    others = (
        {path.name for path in folder.iterdir() if path.is_dir()} - {str(size) for size in sizes}
        if folder.is_dir()
        else set()
    )
    if others:
        raise UserError(
            f"--teacher_cache {folder}: holds {min(others)}, which is of no size of this run ({', '.join(map(str, sizes))}); give "
            "another folder, or the sizes that it was made with"
        )


def cached_batches(settings: Settings, share: Share) -> int:
    """Return how many batches of answers a cache is to hold, of the image size with this share."""
    return answered_batches(share.of(settings.num_steps), settings.replay)


def asking_line(cache: TeacherCache, part: CachePart, num_batches: int) -> str:
    """Return the line that says what the teacher is asked for."""
    if not cache.parts:
        return f"Asking the teacher for {num_batches} batches, kept in {cache.folder}"
    return (
        f"Asking the teacher for part {part.index + 1} of {len(cache.parts)}, {part.num_batches} of {num_batches} batches, kept in "
        f"{cache.folder}"
    )
