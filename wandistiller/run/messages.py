"""The first lines of a run, and its summary; a part prints its own notices where they arise."""

from collections.abc import Sequence
from pathlib import Path

from wandistiller.files.output_folder import LORA_NAMES, METRICS_NAME, RUN_NAME
from wandistiller.model.config import CONFIG_NAME
from wandistiller.model.sizes import count_parameters
from wandistiller.reports.metrics import held_out_text, newest_held_out, read_metrics, training_seconds
from wandistiller.reports.progress import format_duration
from wandistiller.run.settings import Settings
from wandistiller.run.stages import Run
from wandistiller.training.loop import TrainingResult
from wandistiller.walk.cache import TeacherCache
from wandistiller.wan.settings import warnings_about
from wandistiller.wan.wan_files import WanFiles

FEW_STEPS = 300  # a run of fewer is told so


def print_settings(settings: Settings) -> None:
    """Print what is trained from what, how long and how fast, and what of it asks for a second look."""
    config, wan_files, teacher, own = settings.config, settings.wan_files, settings.teacher, settings.optimization
    size = f"{config.image_size} px = {'x'.join(map(str, settings.latent_shapes[0]))} latents"
    if not settings.has_one_square_size:
        size = f"in turn at {', '.join(map(str, settings.image_sizes))} px (width x height)"
    lines = [
        f"Teacher: {wan_files.location} ({' + '.join(wan_files.experts)}), {teacher.summary()}",
        *lora_lines(wan_files),
        wan_files.left_out(),
        f"Student: {config.block}, hidden_size {config.hidden_size}, depth {config.depth}, num_heads {config.num_heads}; {size}",
    ]
    if levels := [f"{level:.4g}" for level in settings.teacher_levels[:-1]]:
        lines.append(
            f"Teacher's {len(levels)} noise levels, and no others: {', '.join(levels)} (--teacher_sampler {teacher.teacher_sampler})"
        )
    lines += [f"Warning: {warning}" for warning in warnings_about(wan_files, teacher, config)]
    lines.append(
        f"Steps: {settings.num_steps} of {settings.num_samples_per_step} samples, {settings.replay} steps for each teacher batch; "
        f"{own.optimizer} at lr {own.lr:g} after {own.lr_warmup_steps} steps of warm-up"
    )
    if settings.num_steps < FEW_STEPS:
        lines.append(
            f"Hint: {settings.num_steps} steps are enough to try things out, not to learn to draw, which takes thousands; "
            "--teacher_calls, --max_steps or --num_epochs make it longer"
        )
    print("\n".join(filter(None, lines)))


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
        lines.append(f"Warning: the {''.join(without)}-noise expert has no LoRA; {flag} gives it one, or the same file")
    return lines


def print_end(run: Run, path: Path, result: TrainingResult) -> None:
    """Print what was trained, how well, how long, where it is, and what to type next."""
    settings = run.settings
    state = "Interrupted after" if result.interrupted else "Done:"
    loras = f"; its LoRA is in {' and '.join(LORA_NAMES.values())}" if settings.is_lora else ""
    print(f"{state} {result.num_steps} steps. Saved {CONFIG_NAME} and diffusion_model.safetensors in {path}{loras}")
    print("\n".join(summary_lines(run, path)))
    if result.interrupted and settings.save_every:
        print(f"The same command resumes it, and so does --config {path / RUN_NAME}")
    elif settings.vae_location is not None and not result.interrupted:
        vae = f" --vae_path {settings.vae_path}" if settings.vae_path else ""
        print(f"Measure it with evaluate_student.py --student {path}{vae}, and draw with generate_images.py")


def print_filled(settings: Settings, caches: Sequence[TeacherCache]) -> None:
    part, num_parts = settings.cache_part
    state = "the cache is complete" if all(cache.is_complete for cache in caches) else "other parts are missing"
    print(
        f"Done: part {part} of {num_parts} is in {settings.teacher_cache}; {state}. To train from all of it, leave --cache_part out"
    )


def calls_text(run: Run) -> str:
    """Return what the teacher was asked; of two experts also how often the one in use changed, since this process began."""
    if run.settings.teacher_cache:
        return f"its answers came from {run.settings.teacher_cache}"
    num_calls, teacher = run.state.teacher_calls, run.teacher
    line = f"the teacher answered {num_calls} batches, {num_calls / run.state.step:.2f} per step"
    return line if len(teacher.experts) == 1 else f"{line}, with {teacher.num_swaps} swaps of its experts"


def summary_lines(run: Run, folder: Path) -> list[str]:
    """Return what was trained by whom, for how long, and how well."""
    config, lines = run.student.config, read_metrics(folder / METRICS_NAME)
    sizes, total = ", ".join(map(str, run.settings.image_sizes)), run.settings.num_samples_per_step
    rows = {
        "teacher": f"{run.settings.teacher_path}; {calls_text(run)}",
        "student": f"{count_parameters(config).total:,} parameters, {config.block}, {sizes} px",
        "time": f"{format_duration(training_seconds(lines))} of training, {total} samples a step",
        "held out": held_out_text(newest_held_out(lines) or {}),
    }
    return [f"  {name:<9} {text}" for name, text in rows.items() if text]
