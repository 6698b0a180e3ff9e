"""What a run measures on (evaluation/held_out.py), and how often."""

from dataclasses import replace

from wandistiller.evaluation.held_out import NUM_DRAWN, NUM_PATHS, PathErrors, draw_path_states, drawn_steps
from wandistiller.run.settings import Settings
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import Embeds
from wandistiller.wan.settings import TeacherSettings

# Unless --eval_every is typed, a run measures about so often, and nothing that takes more than this share of its teacher's answers.
NUM_MEASUREMENTS, MAX_SHARE = 6, 0.02
NUM_LEVELS = 4  # of a path


def path_steps(teacher: TeacherSettings) -> int:
    """Return the teacher's steps on a measured path: one for each noise level, unless its levels need all."""
    steps = teacher.num_inference_steps
    return steps if teacher.has_few_levels else min(steps, NUM_LEVELS)


def num_answers(teacher: TeacherSettings, draws: bool) -> int:
    """Return the teacher's answers that measuring takes, on paths and, where it draws too, in all and in fewer steps."""
    drawing = NUM_DRAWN * sum(drawn_steps(teacher.num_inference_steps)) if draws else 0
    return NUM_PATHS * path_steps(teacher) + drawing


def build_measure(settings: Settings, embeds: Embeds, teacher: Teacher | None) -> PathErrors | None:
    """Build what measures the student at held-out states of the first image size; None where nothing is measured."""
    if not settings.eval_every or teacher is None:
        return None
    own = "" if settings.eval_prompts else " (see --eval_prompts)"
    steps = path_steps(settings.teacher)
    print(f"Held-out states: {NUM_PATHS} paths of the teacher, {steps} steps{own}", flush=True)
    options = replace(settings.teacher_sampling, num_inference_steps=steps)
    # As many states at a time as are trained on, so that measuring takes no more memory:
    shape, at_once = settings.latent_shapes[0], min(NUM_PATHS, settings.batch_size)
    full_steps = settings.teacher.num_inference_steps if settings.draws_held_out else None
    states = draw_path_states(teacher, embeds.held_out, shape, options, at_once, full_steps)
    low, high = settings.sigma_range
    kept = (states.sigma >= low) & (states.sigma <= high)
    if not kept.any():
        return None
    states = replace(states, latents=states.latents[kept], sigma=states.sigma[kept], velocity=states.velocity[kept])
    return PathErrors(states, embeds.held_out, settings.teacher_sampling, at_once)
