"""What a run measures on (evaluation/held_out.py): how much, and where it is kept for a run without a teacher."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from wandistiller.evaluation.held_out import FEWER_STEPS, NUM_DRAWN, NUM_PATHS, PathErrors, PathStates, draw_path_states
from wandistiller.files.tensor_files import DamagedFileError, read_tensors, write_tensors
from wandistiller.run.settings import Settings
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import Embeds
from wandistiller.wan.settings import TeacherSettings, describe_teacher

# Unless --eval_every is typed, a run measures about so often, and nothing that takes more than this share of its teacher's answers.
NUM_MEASUREMENTS, MAX_SHARE = 6, 0.02
NUM_LEVELS = 4  # of a path
FILE_NAME = "held_out_{}.safetensors"


def path_steps(teacher: TeacherSettings) -> int:
    """Return the teacher's steps on a measured path: one for each noise level, unless its levels need all."""
    steps = teacher.num_inference_steps
    return steps if teacher.has_few_levels else min(steps, NUM_LEVELS)


def num_answers(teacher: TeacherSettings, draws: bool) -> int:
    """Return the teacher's answers that measuring takes, on paths and, where it draws too, in all and in fewer steps."""
    steps = (*FEWER_STEPS, teacher.num_inference_steps)
    return NUM_PATHS * path_steps(teacher) + (NUM_DRAWN * sum(steps) if draws else 0)


def build_measure(settings: Settings, embeds: Embeds, teacher: Teacher | None) -> PathErrors | None:
    """Build what measures the student at held-out states; None where nothing is measured."""
    states = held_out_states(settings, embeds, teacher) if settings.eval_every else None
    if states is None:
        return None
    low, high = settings.sigma_range
    kept = (states.sigma >= low) & (states.sigma <= high)
    if not kept.any():
        return None
    states = replace(states, latents=states.latents[kept], sigma=states.sigma[kept], velocity=states.velocity[kept])
    # As many states at a time as are trained on, so that measuring takes no more memory:
    return PathErrors(states, embeds.held_out, settings.teacher_sampling, min(NUM_PATHS, settings.batch_size))


def held_out_states(settings: Settings, embeds: Embeds, teacher: Teacher | None) -> PathStates | None:
    """Return states of the run's first image size, drawn by the teacher; those of a cache of answers are kept in its folder."""
    if settings.processes.all_true(bool(kept := read_states(settings))):
        return kept
    if teacher is None:
        print("Held-out error: not measured, since no teacher is in memory and its cache holds no held-out states")
        return None
    own = "" if settings.eval_prompts else " (see --eval_prompts)"
    print(f"Held-out states: {NUM_PATHS} paths of the teacher, {settings.held_out_steps} steps{own}", flush=True)
    options = replace(settings.teacher_sampling, num_inference_steps=settings.held_out_steps)
    shape, at_once = settings.latent_shapes[0], min(NUM_PATHS, settings.batch_size)
    full_steps = settings.teacher.num_inference_steps if settings.draws_held_out else None
    states = draw_path_states(teacher, embeds.held_out, shape, options, at_once, full_steps)
    if settings.teacher_cache is not None and settings.processes.is_first:
        try:
            write_tensors(states_file(settings), vars(states))
        except OSError as error:
            print(f"Warning: held-out states cannot be kept ({error}); a run without a teacher will not measure")
    return states


def states_file(settings: Settings) -> Path:
    """Return where the states are kept; the name holds a digest of what they depend on."""
    made_of = describe_teacher(settings.wan_files, settings.teacher) | {
        "prompts": settings.held_out_prompts,
        "shape": settings.latent_shapes[0],
        "text_max_length": settings.config.text_max_length,
        "steps": settings.held_out_steps,
        "drawn": settings.draws_held_out,
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    return Path(settings.teacher_cache) / FILE_NAME.format(digest)


def read_states(settings: Settings) -> PathStates | None:
    """Read the states that an earlier command has kept; None where there are none, or the file is damaged."""
    if settings.teacher_cache is None:
        return None
    try:
        return PathStates(**read_tensors(states_file(settings)))
    except (DamagedFileError, TypeError):
        return None
