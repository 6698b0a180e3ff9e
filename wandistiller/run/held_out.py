"""What a run measures its student with: states that the teacher answers once, which are kept for a run that resumes."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from wandistiller.evaluation.held_out import (
    BATCH_SIZE,
    SEED,
    HeldOutErrors,
    HeldOutNoise,
    MeanOverSizes,
    PathErrors,
    PathStates,
    draw_path_states,
)
from wandistiller.files.safetensors_files import DamagedFileError, read_header, read_tensors, write_tensors
from wandistiller.model.image_sizes import shares
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.run.measuring import NUM_NOISES
from wandistiller.run.run import Run
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.cache import TeacherCache, prompts_digest
from wandistiller.training.checkpoints import Checkpoints
from wandistiller.wan.prompt_embeds import Embeds, PromptEmbeds

logger = logging.getLogger(__name__)

Measure = Callable[[WanLiteStudent], dict[str, float]]
NoiseMeasure = Callable[[WanLiteStudent], dict[str, float | None]]
Measured = TypeVar("Measured", bound=Callable[[WanLiteStudent], dict])
FILE_NAME = "held_out_{}.safetensors"


def build_measure(run: Run, embeds: Embeds, teacher: Teacher | None) -> Measure | None:
    """Build what measures the student; None where nothing is measured. It samples the teacher once, if that is still to be done."""
    if run.measuring.is_default:
        states = held_out_states(run, embeds, teacher)
        return PathErrors(states, embeds.held_out, run.teacher_sampling, batch_size(run)) if states else None
    if not run.measuring.every or teacher is None:
        return None
    options = run.teacher_sampling
    print_drawing(run, len(embeds.held_out), options.num_inference_steps)
    return over_sizes(
        [
            (HeldOutErrors(teacher, prompts, shape, options, batch_size=batch_size(run)), len(prompts))
            for prompts, shape in prompts_by_size(run, embeds.held_out)
        ]
    )


def build_noise_measure(run: Run, embeds: Embeds, teacher: Teacher | None) -> NoiseMeasure | None:
    """Build what measures the noise part beside --eval_every; it draws with the teacher once."""
    prompts = embeds.held_out.first(run.measuring.num_noise_prompts)
    if teacher is None or not prompts:
        return None
    print(f"Held-out pictures: the teacher draws {len(prompts)} prompts with {NUM_NOISES} noises each", flush=True)
    options = run.teacher_sampling
    return HeldOutNoise(
        teacher,
        prompts_by_size(run, prompts),
        options,
        NUM_NOISES,
        batch_size(run),
        run.measuring.scale_steps,
    )


def prompts_by_size(run: Run, prompts: PromptEmbeds) -> list[tuple[PromptEmbeds, tuple[int, int, int]]]:
    """Split prompts over the image sizes, so that measuring costs what it costs at one; those that get none are left out."""
    parts, start = [], 0
    for count, shape in zip(shares(len(prompts), len(run.latent_shapes)), run.latent_shapes, strict=True):
        if count:
            parts.append((prompts.part(start, count), shape))
        start += count
    return parts


def over_sizes(measures: Sequence[tuple[Measured, int]]) -> Measured | MeanOverSizes | None:
    """Return a measure of all image sizes, from one of each and what it counts for; None where there is none."""
    return MeanOverSizes(measures) if len(measures) > 1 else measures[0][0] if measures else None


def batch_size(run: Run) -> int:
    """Return how many states are asked at a time, so that measuring takes no more memory than training."""
    return min(BATCH_SIZE, run.flags.optimization.batch_size)


def print_drawing(run: Run, num_paths: int, num_steps: int) -> None:
    own = "" if run.flags.output.eval_prompts else " (prompts of the run with noises of their own; see --eval_prompts)"
    print(f"Held-out states: {num_paths} paths of the teacher, {num_steps} steps{own}", flush=True)


# ---- states that are answered once ----


def held_out_states(run: Run, embeds: Embeds, teacher: Teacher | None) -> list[PathStates]:
    """Return the states that a run measures at by itself, those of each image size that has a path.

    There are none where it does not measure by itself, or where nobody is there to answer.

    Those of an earlier command are used as they are, however many there are: what is measured stays the same when a run goes on
    for longer.
    """
    plan, (low, high) = run.measuring, run.flags.states.sigma_range
    if not plan.is_default:
        return []
    counts = [count for count in shares(plan.num_paths, len(run.image_sizes)) if count]
    found = [read_states(file) for file in states_files(run)[: len(counts)]]
    kept = [states for states in found if states is not None]
    if run.processes.all_true(len(kept) == len(counts)):
        return kept
    if teacher is None:
        return []
    print_drawing(run, plan.num_paths, plan.num_steps)
    # Fewer steps than its own, where it answers at all levels
    options = replace(run.teacher_sampling, num_inference_steps=plan.num_steps)
    states = [
        draw_path_states(
            teacher,
            embeds.held_out,
            shape,
            options,
            count,
            plan.segment_steps if run.flags.objective.student_steps else None,
            batch_size(run),
        ).within(low, high)
        for count, shape in zip(counts, run.latent_shapes, strict=False)
    ]
    return states if len(states[0].sigma) else []


def states_files(run: Run) -> list[Path]:
    """Return where the states of each image size are kept: with the teacher's cache, else with the checkpoints, if there are any.

    The name holds a digest of what the states depend on but their number, so that no others are ever taken for them.
    """
    places: Sequence[TeacherCache | Checkpoints] = run.caches
    if not places and run.flags.output.save_every:
        places = [run.checkpoints] * len(run.image_sizes)
    files = []
    for place, shape in zip(places, run.latent_shapes, strict=False):
        own = {"held_out": prompts_digest(run.held_out_texts), "shape": shape, "seed": SEED}
        digest = hashlib.sha256(json.dumps(place.description | own, sort_keys=True).encode()).hexdigest()[:16]
        files.append(place.folder / FILE_NAME.format(digest))
    return files


def has_states(run: Run) -> bool:
    """Return whether all states that a run measures at by itself are kept; also where it measures at none."""
    counts = [count for count in shares(run.measuring.num_paths, len(run.image_sizes)) if count]
    return not run.measuring.is_default or all(is_whole(file) for file in states_files(run)[: len(counts)])


def read_states(file: Path) -> PathStates | None:
    """Read the states that a run has kept; None where there are none, or the file is damaged."""
    try:
        return PathStates(**read_tensors(file))
    except (DamagedFileError, TypeError):
        return None


def is_whole(file: Path) -> bool:
    """Return whether a safetensors file is there and is not damaged, by its header."""
    try:
        read_header(file)
    except DamagedFileError:
        return False
    return True


def measured_states(measure: Measure | None) -> list[PathStates]:
    """Return the states that a measure was built with; none where it keeps none."""
    return list(measure.states) if isinstance(measure, PathErrors) else []


def keep_states(run: Run, by_size: Sequence[PathStates]) -> None:
    """Write the states for a later command, if they are not there yet; one that finds none asks the teacher again."""
    for file, states in zip(states_files(run), by_size, strict=False):
        if not run.processes.is_first or is_whole(file):
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, vars(states))
        except OSError as error:
            print(f"Warning: {file}: cannot be written ({error.strerror}); the run goes on without it")
