"""What a person reads when a run is over: what was trained, how well, how long, where it is, what to type next."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.files.output_folder import CARD_NAME, LOSS_PLOT_NAME, METRICS_NAME, SAMPLES_NAME, TENSORBOARD_NAME
from wandistiller.model.config import StudentConfig
from wandistiller.reports.metrics import (
    bucket_name,
    held_out_error,
    loss_change,
    loss_change_by_sigma,
    read_metrics,
    training_seconds,
)
from wandistiller.reports.progress import format_duration
from wandistiller.run.flags import DEFAULTS

if TYPE_CHECKING:
    from wandistiller.wan.files import WanFiles

SHOWN_FILES = [CARD_NAME, LOSS_PLOT_NAME, METRICS_NAME, SAMPLES_NAME, TENSORBOARD_NAME]
HELD_OUT_PROMPTS = "data/heldout_prompts.txt"
OWN_HELD_OUT_PROMPTS = "heldout_prompts.txt"  # in the folder of a teacher whose world is its own


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command as a person would type it again."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    launcher = ["python"] if num_processes == 1 else ["torchrun", "--nproc_per_node", str(num_processes)]
    return shlex.join([*launcher, script, *map(str, argv)])


def summary_lines(folder: Path, calls: str) -> list[str]:
    """What the folder's records say of the run; `calls` is what the teacher was asked."""
    config, lines = StudentConfig.load(folder), read_metrics(folder / METRICS_NAME)
    record = config.distillation
    loss = "{:.4g} over the first tenth of the steps, {:.4g} over the last".format(*loss_change(lines))
    before = {
        "teacher": f"{record['teacher_path']}; {calls}",
        "student": f"{config.num_parameters:,} parameters, {config.block}, {config.image_size} px",
        "time": f"{format_duration(training_seconds(lines))} of training, {record['batch_size']} samples a step",
        "loss": loss,
    }
    after = {
        "held out": _held_out(lines),
        "files": f"{folder}: {', '.join(name for name in SHOWN_FILES if (folder / name).exists())}",
    }
    rows = [[_row(name, text) for name, text in part.items() if text] for part in (before, after)]
    return [*rows[0], *_by_sigma(lines), *rows[1]]


def _by_sigma(lines: Sequence[dict]) -> list[str]:
    """The losses of each noise level below one another: at first, and at last."""
    changes = loss_change_by_sigma(lines)
    names = [bucket_name(bucket, len(changes)) for bucket in range(len(changes))]
    rows = {"by sigma": names} | {
        when: ["-" if change[index] is None else f"{change[index]:.2g}" for change in changes]
        for index, when in enumerate(("  first", "  last"))
    }
    return [_row(name, "".join(f"{cell:<9}" for cell in cells).rstrip()) for name, cells in rows.items() if cells]


def _row(name: str, text: str) -> str:
    return f"  {name:<9} {text}"


def _held_out(lines: Sequence[dict]) -> str:
    errors = held_out_error(lines) or {}
    named = ", ".join(f"{value:.3f} at {name.replace('_', ' ')}" for name, value in errors.items())
    return f"relative velocity error {named}" if named else ""


def held_out_prompts(wan_files: "WanFiles") -> str:
    """A file of prompts that no run of ours trains on: one in the teacher's own folder, the demo world's, or anything's."""
    own = Path(wan_files.location) / OWN_HELD_OUT_PROMPTS
    if own.is_file():
        return str(own)
    return DEFAULTS["eval_prompts"][1] if wan_files.record.get("world") == "shapes" else HELD_OUT_PROMPTS


def next_commands(folder: Path, prompt: str, prompts_file: str, vae_path: str | None = None) -> list[str]:
    """How a finished student is measured, and how it draws a prompt."""
    vae = ["--vae_path", vae_path] if vae_path else []
    student = ["python", "evaluate_student.py", "--student", str(folder), "--prompts_file", prompts_file, *vae]
    pictures = ["--prompt", prompt, "--output", str(folder / "pictures"), *vae]
    return [
        shlex.join(student),
        shlex.join(["python", "generate_images.py", "--student", str(folder), *pictures]),
    ]


def resume_command(script: str, argv: Sequence[str]) -> str:
    """The same one, less what would start anew."""
    return command_line(script, [word for word in argv if word.replace("-", "_") != "__overwrite"])
