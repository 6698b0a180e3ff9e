"""Held-out states of a run (evaluation/held_out.py): when they are measured, and where they are kept for a run that resumes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from wandistiller.evaluation.held_out import NUM_PATHS, PathErrors, PathStates, draw_path_states
from wandistiller.files.safetensors_files import DamagedFileError, read_tensors, write_tensors
from wandistiller.model.image_sizes import shares
from wandistiller.run.settings import Settings
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.checkpoints import FOLDER_NAME
from wandistiller.wan.identity import describe_teacher
from wandistiller.wan.prompt_embeds import Embeds
from wandistiller.wan.settings import TeacherSettings

# Unless --eval_every is typed, a run measures about so often, and never where the paths are more than this share of its teacher's
# answers.
NUM_MEASUREMENTS, MAX_SHARE = 6, 0.02
NUM_LEVELS = 4  # of a path
FILE_NAME = "held_out_{}.safetensors"


def path_steps(teacher: TeacherSettings, student_steps: int | None) -> int:
    """Return the teacher's steps on a measured path: one for each noise level, unless its levels or the student's segments need all."""
    steps = teacher.num_inference_steps
    if student_steps:
        return student_steps * max(1, round(steps / student_steps))
    return steps if teacher.has_few_levels else min(steps, NUM_LEVELS)


def held_out_states(settings: Settings, embeds: Embeds, teacher: Teacher | None) -> list[PathStates]:
    """Return the states of each image size: kept ones, else drawn by the teacher; [] where nothing is measured."""
    if not settings.eval_every:
        return []
    kept = read_states(states_file(settings))
    if settings.processes.all_true(bool(kept)):
        return kept
    if teacher is None:
        print("Held-out error: not measured, since no teacher is in memory and no earlier command kept its states")
        return []
    own = "" if settings.eval_prompts else " (see --eval_prompts)"
    print(f"Held-out states: {NUM_PATHS} paths of the teacher, {settings.held_out_steps} steps{own}", flush=True)
    options = replace(settings.teacher_sampling, num_inference_steps=settings.held_out_steps)
    segment_steps = settings.held_out_steps // settings.student_steps if settings.student_steps else None
    counts = shares(NUM_PATHS, len(settings.latent_shapes))
    states = [
        draw_path_states(teacher, embeds.held_out, shape, options, count, segment_steps, batch_size(settings))
        for count, shape in zip(counts, settings.latent_shapes, strict=True)
    ]
    states = [each.within(*settings.sigma_range) for each in states]
    return states if len(states[0].sigma) else []


def batch_size(settings: Settings) -> int:
    """Return how many states are asked at a time, so that measuring takes no more memory than training."""
    return min(NUM_PATHS, settings.batch_size)


def build_measure(settings: Settings, embeds: Embeds, states: list[PathStates]) -> PathErrors | None:
    """Build what measures the student at the states; None where there are none."""
    return PathErrors(states, embeds.held_out, settings.teacher_sampling, batch_size(settings)) if states else None


def states_file(settings: Settings) -> Path:
    """Return where the states are kept; the name holds a digest of what they depend on."""
    made_of = describe_teacher(settings.wan_files, settings.teacher) | {
        "prompts": settings.held_out_prompts,
        "shapes": settings.latent_shapes,
        "text_max_length": settings.config.text_max_length,
        "sigma_range": settings.sigma_range,
        "student_steps": settings.student_steps,
        "steps": settings.held_out_steps,
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return Path(settings.teacher_cache or Path(settings.output_dir) / FOLDER_NAME) / FILE_NAME.format(digest)


def read_states(file: Path) -> list[PathStates]:
    """Read the states that an earlier command has kept; [] where there are none, or the file is damaged."""
    names = [known.name for known in fields(PathStates)]
    try:
        found = read_tensors(file)
        return [
            PathStates(**{name: found[f"{size}.{name}"] for name in names}) for size in range(len(found) // len(names))
        ]
    except (DamagedFileError, KeyError):
        return []


def keep_states(settings: Settings, states: Sequence[PathStates]) -> None:
    """Write the states for a later command, unless they are there; a run without checkpoints and cache keeps none."""
    is_resumable = settings.teacher_cache is not None or settings.save_every > 0
    if not (states and is_resumable and settings.processes.is_first) or read_states(file := states_file(settings)):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(
            file, {f"{size}.{name}": value for size, each in enumerate(states) for name, value in vars(each).items()}
        )
    except OSError as error:
        print(f"Warning: {file}: cannot be written ({error.strerror}); a run that resumes draws the states anew")
