"""The output folder of a run: taken for it alone, with the checkpoint that the run resumes from."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wandistiller.budget.report import OutOfMemory
from wandistiller.device import is_out_of_memory
from wandistiller.files.output_folder import (
    locked_folder,
    prepare_output_folder,
    removed_if_empty,
)
from wandistiller.processes import leave
from wandistiller.run.dry_run import check_disk, workload_of
from wandistiller.run.settings import NEUTRAL, Settings
from wandistiller.training.checkpoints import Checkpoint, Checkpoints, DamagedCheckpointError
from wandistiller.training.state import RunState
from wandistiller.wan.settings import describe_teacher

# What else a run must share with the one that it resumes, with the value that counts where a checkpoint lacks it. All other settings
# say how long, how fast, and what is shown.
COMPARED = NEUTRAL | {
    "teacher_dtype": None,
    "image_sizes": None,
    "optimizer": "adamw",
    "ema": True,
    "teacher_cache": False,
    "init": "projection",  # what --init_from was called
}


@dataclass(frozen=True)
class Folder:
    """The output folder of a run.

    Attributes:
        path: where the student goes.
        checkpoints: of this run.
        resume_from: the checkpoint that the run resumes from; None where it starts anew.
    """

    path: Path
    checkpoints: Checkpoints
    resume_from: Checkpoint | None

    @property
    def first_step(self) -> int:
        """Steps taken by earlier commands."""
        return 0 if self.resume_from is None else self.resume_from.step

    def resuming_from(self, checkpoint: Checkpoint | None, settings: Any) -> "Folder":
        """Return the folder at a checkpoint, or at the start of a run; say so."""
        if checkpoint is not None:
            print(f"Resuming from step {checkpoint.step} of {self.path} (--overwrite starts anew)")
            if not checkpoint.has_same_batch:
                had, has = checkpoint.batch_size, settings.num_samples_per_step
                print(f"Training states start anew: a step had {had} samples, and has {has} now")
            had, has = checkpoint.threads, torch.get_num_threads()
            if settings.processes.device == "cpu" and had not in (0, has):
                print(
                    f"Hint: the checkpoint was written with {had} threads, and there are {has} now: the result is that of a run never "
                    f"stopped within rounding; bit for bit it is with OMP_NUM_THREADS={had}"
                )
        return replace(self, resume_from=checkpoint)

    def load_newest(
        self, settings: Any, state_of: Callable[[Checkpoint], RunState]
    ) -> "tuple[RunState | None, Folder]":
        """Load the newest checkpoint that holds the state of this run; return the state, None without one, and the folder at it.

        A checkpoint can be damaged though its checksums are right, and then the one before it is loaded.

        Args:
            state_of: returns the state that a checkpoint is loaded into.

        Raises:
            UserError: none of the checkpoints can be loaded.
        """
        folder = self
        while (checkpoint := folder.resume_from) is not None:
            state = state_of(checkpoint)
            try:
                state.load(checkpoint)
                return state, folder
            except DamagedCheckpointError as error:
                folder.checkpoints.tell_of_damage(checkpoint.folder, str(error))
                folder = folder.resuming_from(folder.checkpoints.newest(before=checkpoint.step), settings)
        return None, folder


def run_identity(settings: Settings) -> dict[str, object]:
    """Return what makes two runs the same one: student, teacher, prompts, states and objective."""
    shape = settings.config.to_dict().items()
    sizes = [] if settings.has_one_square_size else [str(size) for size in settings.image_sizes]
    return {
        **{f"student {name}": value for name, value in shape if name != "distillation"},
        **describe_teacher(settings.wan_files, settings.teacher),
        **settings.recipe,
        "prompts": settings.prompts_digest,
        "init_from": settings.source.wan_files.fingerprint() if settings.source else settings.init_from,
        "teacher_cache": settings.teacher_cache is not None,
        "optimizer": settings.optimization.optimizer,
        "ema": settings.optimization.ema_decay > 0,
        # fp8 makes another teacher; fp32 and bf16 may change from one command to the next, as --dtype may.
        "teacher_dtype": "fp8" if settings.teacher_dtype == "fp8" else None,
        "image_sizes": sizes or None,
        "about": settings.about,
    }


@contextlib.contextmanager
def open_folder(
    settings: Any,
    identity: Callable[[Any], dict[str, object]] = run_identity,
    check_disk: Callable[[Checkpoints, Any], None] = check_disk,
) -> Iterator[Folder]:
    """Take the output folder and find where the run resumes; the processes leave together at the end.

    Args:
        settings: of a run of any command.
        identity: what makes two runs the same one.
        check_disk: refuses a run that the disk has no room for.

    Raises:
        UserError: the folder or its checkpoints belong to something else, or the disk has no room.
    """
    processes, output_dir = settings.processes, settings.output_dir
    with (
        removed_if_empty(output_dir) if processes.is_first else contextlib.nullcontext(),
        contextlib.ExitStack() as held,
    ):
        path = processes.first_then_all(lambda: prepare_output_folder(output_dir))
        processes.first_then_all(lambda: held.enter_context(locked_folder(path)))
        checkpoints = Checkpoints(
            path,
            identity(settings),
            settings.num_samples_per_step,
            settings.keep_checkpoints,
            processes,
            neutral=COMPARED,
        )
        resume_from = None if settings.overwrite else checkpoints.newest()
        check_disk(checkpoints, settings)
        yield Folder(path, checkpoints, None).resuming_from(resume_from, settings)
    leave()


@contextlib.contextmanager
def memory_advice(settings: Settings) -> Iterator[None]:
    """Turn running out of memory inside into advice on which flags to change.

    Raises:
        OutOfMemory: the device ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(workload_of(settings)) from error
