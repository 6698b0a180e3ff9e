"""What a run measures its student with: states that the teacher answers once, which are kept for a run that resumes."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from wandistiller.evaluation.held_out import (
    BATCH_SIZE,
    SEED,
    HeldOutErrors,
    HeldOutNoise,
    PathErrors,
    PathStates,
    draw_path_states,
)
from wandistiller.files.safetensors_files import DamagedFileError, read_header, read_tensors, write_tensors
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.run.measuring import NUM_NOISES
from wandistiller.run.run import Run
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.cache import prompts_digest
from wandistiller.wan.prompt_embeds import Embeds

logger = logging.getLogger(__name__)

Measure = Callable[[WanLiteStudent], dict[str, float]]
FILE_NAME = "held_out_{}.safetensors"


def build_measure(run: Run, embeds: Embeds, teacher: Teacher | None) -> Measure | None:
    """Build what measures the student; None where nothing is measured. It samples the teacher once, if that is still to be done."""
    if run.measuring.is_default:
        states = held_out_states(run, embeds, teacher)
        return None if states is None else PathErrors(states, embeds.held_out, run.teacher_sampling, batch_size(run))
    if not run.measuring.every or teacher is None:
        return None
    options = run.teacher_sampling
    print_drawing(run, len(embeds.held_out), options.num_inference_steps)
    return HeldOutErrors(teacher, embeds.held_out, run.latent_shape, options, batch_size=batch_size(run))


def build_noise_measure(run: Run, embeds: Embeds, teacher: Teacher | None) -> HeldOutNoise | None:
    """Build what measures the noise part beside --eval_every; it draws with the teacher once."""
    prompts = embeds.held_out.first(run.measuring.num_noise_prompts)
    if teacher is None or not prompts:
        return None
    print(f"Held-out pictures: the teacher draws {len(prompts)} prompts with {NUM_NOISES} noises each", flush=True)
    return HeldOutNoise(teacher, prompts, run.latent_shape, run.teacher_sampling, NUM_NOISES, batch_size(run))


def batch_size(run: Run) -> int:
    """Return how many states are asked at a time, so that measuring takes no more memory than training."""
    return min(BATCH_SIZE, run.flags.optimization.batch_size)


def print_drawing(run: Run, num_paths: int, num_steps: int) -> None:
    own = "" if run.flags.output.eval_prompts else " (prompts of the run with noises of their own; see --eval_prompts)"
    print(f"Held-out states: {num_paths} paths of the teacher, {num_steps} steps{own}", flush=True)


# ---- states that are answered once ----


def held_out_states(run: Run, embeds: Embeds, teacher: Teacher | None) -> PathStates | None:
    """Return the states that a run measures at by itself; None where it does not, or where nobody is there to answer.

    Those of an earlier command are used as they are, however many there are: what is measured stays the same when a run goes on
    for longer.
    """
    plan, (low, high) = run.measuring, run.flags.states.sigma_range
    if not plan.is_default:
        return None
    kept = read_states(states_file(run))
    if run.processes.all_true(kept is not None):
        return kept
    if teacher is None:
        return None
    print_drawing(run, plan.num_paths, plan.num_steps)
    states = draw_path_states(
        teacher,
        embeds.held_out,
        run.latent_shape,
        replace(
            run.teacher_sampling, num_inference_steps=plan.num_steps
        ),  # fewer than its own, where it answers at all levels
        plan.num_paths,
        plan.segment_steps if run.flags.objective.student_steps else None,
        batch_size(run),
    ).within(low, high)
    return states if len(states.sigma) else None


def states_file(run: Run) -> Path | None:
    """Return where the states are kept: with the teacher's cache, else with the checkpoints, if there are any.

    The name holds a digest of what the states depend on but their number, so that no others are ever taken for them.
    """
    place = run.cache or (run.checkpoints if run.flags.output.save_every else None)
    if place is None:
        return None
    own = {"held_out": prompts_digest(run.held_out_texts), "shape": run.latent_shape, "seed": SEED}
    digest = hashlib.sha256(json.dumps(place.description | own, sort_keys=True).encode()).hexdigest()[:16]
    return place.folder / FILE_NAME.format(digest)


def read_states(file: Path | None) -> PathStates | None:
    """Read the states that a run has kept; None where there are none, or the file is damaged."""
    if file is None:
        return None
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


def keep_states(run: Run, states: PathStates | None) -> None:
    """Write the states for a later command, if they are not there yet; one that finds none asks the teacher again."""
    file = states_file(run) if states is not None else None
    if file is None or states is None or not run.processes.is_first or is_whole(file):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, vars(states))
    except OSError as error:
        print(f"Warning: {file}: cannot be written ({error.strerror}); the run goes on without it")
