"""The first lines of a run, and its summary; a part prints its own notices where they arise."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from wandistiller.command_line import command_words, torchrun_environment
from wandistiller.files.clone import HELD_OUT_PROMPTS
from wandistiller.files.output_folder import (
    CARD_NAME,
    LOSS_PLOT_NAME,
    METRICS_NAME,
    RUN_NAME,
    SAMPLES_NAME,
    TENSORBOARD_NAME,
)
from wandistiller.model.config import CONFIG_NAME, StudentConfig
from wandistiller.model.sizes import count_parameters
from wandistiller.reports.metrics import (
    held_out_text,
    loss_change,
    newest_held_out,
    read_metrics,
    rise_of_held_out,
    training_seconds,
)
from wandistiller.reports.progress import format_duration
from wandistiller.run.folder import Folder
from wandistiller.run.settings import Settings
from wandistiller.sampling.teacher import Teacher
from wandistiller.students.record import StudentRecord
from wandistiller.training.loop import TrainingResult
from wandistiller.walk.cache import TeacherCache
from wandistiller.wan.settings import warnings_about
from wandistiller.wan.wan_files import WanFiles

FEW_STEPS = 300  # a run of fewer is told so
SHOWN_FILES = [CARD_NAME, RUN_NAME, LOSS_PLOT_NAME, METRICS_NAME, SAMPLES_NAME, TENSORBOARD_NAME]


# ---- before it begins ----


def print_settings(settings: Settings) -> None:
    """Print what is trained from what, and what of it asks for a second look."""
    config, wan_files, teacher = settings.config, settings.wan_files, settings.teacher
    print(f"Teacher: {wan_files.location} ({' + '.join(wan_files.experts)}), {teacher.summary()}")
    lines = [*lora_lines(wan_files), wan_files.left_out()]
    size = f"{config.image_size} px = {'x'.join(map(str, settings.latent_shapes[0]))} latents"
    if not settings.has_one_square_size:
        size = f"in turn at {', '.join(map(str, settings.image_sizes))} px (width x height)"
    lines.append(
        f"Student: {config.block}, hidden_size {config.hidden_size}, depth {config.depth}, num_heads {config.num_heads}; {size}"
    )
    if levels := [f"{level:.4g}" for level in settings.teacher_levels]:
        lines.append(
            f"Teacher's {len(levels)} noise levels, and no others: {', '.join(levels)} (--teacher_sampler {teacher.teacher_sampler})"
        )
    lines += [f"Warning: {warning}" for warning in warnings_about(wan_files, teacher, config)]
    print("\n".join(filter(None, lines)))
    print_steps(settings)


def print_steps(settings: Settings) -> None:
    """Print how long the run is and how fast it learns."""
    own, total = settings.optimization, settings.num_samples_per_step
    print(
        f"Steps: {settings.num_steps} of {total} samples, {own.optimizer} at {own.lr:g} after {own.lr_warmup_steps} of warm-up, "
        f"{settings.replay} for each teacher batch"
    )
    if settings.num_steps < FEW_STEPS:
        print(
            f"Hint: {settings.num_steps} steps are enough to try things out, not to learn to draw, which takes thousands; "
            "--teacher_calls, --max_steps or --num_epochs make it longer"
        )
    if total != settings.batch_size:
        parts = [f"--batch_size {settings.batch_size}", f"--grad_accum_steps {settings.grad_accum_steps}"]
        print(f"Samples a step: {' x '.join([*parts, f'{settings.processes.count} processes'])} = {total}")


def lora_lines(wan_files: WanFiles) -> list[str]:
    """Return a line for each LoRA that is merged into the teacher, and one where only one expert of two has any."""
    of_two = len(wan_files.experts) > 1
    lines = [
        f"LoRA: {lora.path} at scale {lora.scale:g}, {len(lora.changes)} of {len(lora.shapes)} tensors"
        f"{f' of the {lora.expert}-noise expert' if of_two else ''}"
        for lora in wan_files.loras
    ]
    without = wan_files.experts.keys() - {lora.expert for lora in wan_files.loras}
    if lines and without:
        flag = "--teacher_lora_low" if "low" in without else "--teacher_lora"
        lines.append(
            f"Warning: the {''.join(without)}-noise expert has no LoRA; {flag} gives it one, which may be the same file"
        )
    return lines


# ---- when it is over ----


def print_end(settings: Settings, folder: Folder, result: TrainingResult, calls: str) -> None:
    """Print what was trained, how well, how long, where it is, and what to type next.

    Args:
        calls: what the teacher was asked, as `calls_line` says it.
    """
    path = folder.path
    state = "Interrupted after" if result.interrupted else "Done:"
    print(f"{state} {result.num_steps} steps. Saved {CONFIG_NAME} and diffusion_model.safetensors in {path}")
    print("\n".join(summary_lines(path, calls)))
    if line := memorising_line(read_metrics(path / METRICS_NAME), settings.replay):
        print(line)
    if result.interrupted and settings.save_every:
        words = command_words("train_distillation.py", torchrun_environment().local_world_size)
        print(f"To resume:\n  {shlex.join([*words, '--config', str(path / RUN_NAME)])}")
    elif settings.vae_location is not None and not result.interrupted:
        prompts_file = settings.eval_prompts or HELD_OUT_PROMPTS
        print("\n  ".join(["Next:", *next_commands(path, settings.prompts[0], prompts_file, settings.vae_path)]))


def print_filled(settings: Settings, caches: Sequence[TeacherCache]) -> None:
    """Print which part of the cache was filled, and what trains from it."""
    part, num_parts = settings.cache_part
    state = "the cache is complete" if all(cache.is_complete for cache in caches) else "other parts are missing"
    print(
        f"Done: part {part} of {num_parts} is in {settings.teacher_cache}; {state}. To train from all of it, leave --cache_part out"
    )


def memorising_line(lines: Sequence[dict], replay: int) -> str | None:
    """Return a line for a run that seems to learn its answers by heart, and what to do about it; None for any other run."""
    rise = rise_of_held_out(lines)
    if rise is None:
        return None
    (lowest_step, lowest), (last_step, last) = rise
    return (
        f"Warning: the held-out error rose from {lowest:.3f} at step {lowest_step} to {last:.3f} at step {last_step}; if the loss "
        "fell meanwhile, the student learns its answers by heart: give more prompts"
        + (f", or a smaller --replay than {replay}" if replay > 1 else ", or fewer steps")
    )


def calls_line(settings: Settings, num_calls: int, num_steps: int, teacher: Teacher | None) -> str:
    """Return what the teacher was asked; of two experts also how often the one in use changed, since this process began."""
    if settings.teacher_cache:
        return f"its answers came from {settings.teacher_cache}"
    line = f"the teacher answered {num_calls} batches, {num_calls / num_steps:.2f} a step"
    return line if len(teacher.experts) == 1 else f"{line}, with {teacher.num_swaps} swaps of its experts"


def summary_lines(folder: Path, calls: str) -> list[str]:
    """Return what the folder's records say of the run; `calls` is what the teacher was asked."""
    config, steps = StudentConfig.load(folder), read_metrics(folder / METRICS_NAME)
    record, errors = config.distillation, newest_held_out(steps)
    first, last = loss_change(steps)
    sizes = ", ".join(StudentRecord.of(config).image_sizes or [str(config.image_size)])
    rows = {
        "teacher": f"{record['teacher_path']}; {calls}",
        "student": f"{count_parameters(config).total:,} parameters, {config.block}, {sizes} px",
        "time": f"{format_duration(training_seconds(steps))} of training, {record['batch_size']} samples a step",
        "loss": last
        and f"{first:.4g} over the first tenth of the steps that learn the velocity, {last:.4g} over the last",
        "held out": errors and held_out_text(errors),
        "files": f"{folder}: {', '.join(name for name in SHOWN_FILES if (folder / name).exists())}",
    }
    return [f"  {name:<9} {text}" for name, text in rows.items() if text]


def next_commands(folder: Path, prompt: str, prompts_file: str, vae_path: str | None = None) -> list[str]:
    """Return the commands that measure a finished student and draw a prompt with it."""
    student, vae = ["--student", str(folder)], ["--vae_path", vae_path] if vae_path else []
    pictures = ["--prompt", prompt, "--output", str(folder / "pictures")]
    return [
        shlex.join([*command_words("evaluate_student.py"), *student, "--prompts_file", prompts_file, *vae]),
        shlex.join([*command_words("generate_images.py"), *student, *pictures, *vae]),
    ]
