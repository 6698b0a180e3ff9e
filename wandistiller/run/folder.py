"""The output folder of a run: taken for it alone, with the checkpoints in it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from wandistiller.budget.report import OutOfMemory, advice
from wandistiller.device import is_out_of_memory
from wandistiller.files.output_folder import locked_folder, prepare_output_folder, removed_if_empty
from wandistiller.processes import leave
from wandistiller.run.dry_run import workload_of
from wandistiller.run.flags import NEUTRAL
from wandistiller.run.learning import described
from wandistiller.run.settings import Settings
from wandistiller.training.checkpoints import Checkpoint, Checkpoints

# What else a run must share with the one that it resumes, with the value that counts where a checkpoint lacks it. All other settings
# say how long, how fast, and what is shown.
COMPARED = NEUTRAL | {
    "teacher_dtype": None,
    "image_sizes": None,
    "optimizer": "adamw",
    "ema": True,
    "teacher_cache": False,
}


def print_resuming(checkpoint: Checkpoint, settings: Any) -> None:
    """Print where a run goes on, and what about that asks for a second look."""
    print(f"Resuming from step {checkpoint.step} of {settings.output_dir} (--overwrite starts anew)")
    if checkpoint.step >= settings.num_steps:
        print(f"Nothing is left to train: the run is of {settings.num_steps} steps; --max_steps makes it longer")
    had, has = checkpoint.threads, torch.get_num_threads()
    if settings.processes.device == "cpu" and had != has:
        print(
            f"Hint: the checkpoint was written with {had} threads, and there are {has} now: the result is that of a run never "
            f"stopped within rounding; bit for bit it is with OMP_NUM_THREADS={had}"
        )


def run_identity(settings: Settings) -> dict[str, object]:
    """Return what makes two runs the same one: student, teacher, prompts, states and objective."""
    shape = settings.config.to_dict().items()
    sizes = [] if settings.has_one_square_size else [str(size) for size in settings.image_sizes]
    return {
        **{f"student {name}": value for name, value in shape if name != "distillation"},
        **described(settings),
        **settings.recipe,
        "init_from": settings.source.wan_files.fingerprint() if settings.source else settings.init_from,
        "teacher_cache": settings.teacher_cache is not None,
        "optimizer": settings.optimization.optimizer,
        "ema": settings.optimization.ema_decay > 0,
        "image_sizes": sizes or None,
        "samples_per_step": settings.num_samples_per_step,
    }


@contextlib.contextmanager
def open_folder(settings: Any, identity: dict[str, object]) -> Iterator[Checkpoints]:
    """Take the output folder and find where a run of this identity resumes; the processes leave together at the end."""
    processes, path = settings.processes, Path(settings.output_dir)
    with contextlib.ExitStack() as held:
        if processes.is_first:
            held.enter_context(removed_if_empty(path))
        processes.first_then_all(lambda: prepare_output_folder(path))
        processes.first_then_all(lambda: held.enter_context(locked_folder(path)))
        # A teacher in host memory leaves no room there for a copy of the student's state.
        is_full = getattr(settings, "teacher_offload", None) is not None
        checkpoints = Checkpoints(
            path, identity, settings.keep_checkpoints, processes, neutral=COMPARED, in_background=not is_full
        )
        if not settings.overwrite and (checkpoint := checkpoints.newest()):
            print_resuming(checkpoint, settings)
        yield checkpoints
    leave()


@contextlib.contextmanager
def memory_advice(settings: Settings) -> Iterator[None]:
    """Turn running out of the device's memory inside into advice on which flags to change (`OutOfMemory`)."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"the device is out of memory. {advice(workload_of(settings))}") from error
