"""A run: a plan with the folder it writes to, the state it resumes from, and what happens when it ends early."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wandistiller.budget.report import OutOfMemory, out_of_memory_message
from wandistiller.device import is_out_of_memory
from wandistiller.files.output_folder import (
    STUDENT_NAMES,
    check_replaceable,
    locked_folder,
    prepare_output_folder,
    removed_if_empty,
)
from wandistiller.processes import leave
from wandistiller.run.caches import open_caches
from wandistiller.run.dry_run import check_disk, has_checkpoints, workload_of
from wandistiller.run.messages import typed_command
from wandistiller.run.plan import Plan
from wandistiller.run.record import commands_so_far
from wandistiller.targets.cache import TeacherCache, describe_teacher, prompts_digest
from wandistiller.training.checkpoints import Checkpoint, Checkpoints

logger = logging.getLogger(__name__)

SCRIPT = "train_distillation.py"


@dataclass(frozen=True, kw_only=True)
class Run(Plan):
    """A plan that is carried out.

    Attributes:
        folder: where the student goes.
        checkpoints: of this run.
        resume_from: the state that the run resumes from; None where it starts anew.
        caches: the teacher's answers on disk, at each size, where --teacher_cache asks for them.
        command: the words after the script's name.
    """

    folder: Path
    checkpoints: Checkpoints
    resume_from: Checkpoint | None
    caches: list[TeacherCache]
    command: list[str]

    @property
    def first_step(self) -> int:
        """Steps that were taken before this process."""
        return 0 if self.resume_from is None else self.resume_from.step

    @property
    def has_all_answers(self) -> bool:
        """Whether everything that the teacher is to answer lies in its cache."""
        return bool(self.caches) and all(cache.is_complete for cache in self.caches)

    def going_on_from(self, checkpoint: Checkpoint | None) -> "Run":
        """Return this run at the state of a checkpoint, or at its start, with the commands that have led there; say so."""
        first_step, before = 0, []
        if checkpoint is not None:
            first_step, before = checkpoint.step, checkpoint.commands
            print(f"Resuming from step {first_step} of {self.folder} (--overwrite starts anew)")
            if not checkpoint.has_same_batch:
                had = checkpoint.batch_size
                why = (
                    f"a step had {had} samples, and has {self.lanes.total} now"
                    if had
                    else "this checkpoint was saved without them"
                )
                print(f"Training states start anew: {why}")
        command = typed_command(SCRIPT, self.command)
        self.checkpoints.commands = commands_so_far(before, first_step, command, self.flags.optimization.lr)
        return replace(self, resume_from=checkpoint)


@contextlib.contextmanager
def open_run(plan: Plan, command: list[str]) -> Iterator[Run]:
    """Take the output folder and find where the run resumes; the processes leave together when all is done.

    Args:
        command: the words after the script's name.

    Raises:
        UserError: the folder, its checkpoints or the teacher's cache belong to something else, or the disk has no room.
        OutOfMemory: the device ran out of memory inside; the message says which flags to change.
    """
    processes = plan.processes
    with memory_advice(plan):
        caches = open_caches(plan)
        output_dir = plan.flags.output.output_dir
        with (
            removed_if_empty(output_dir) if processes.is_first else contextlib.nullcontext(),
            contextlib.ExitStack() as held,
        ):
            folder = processes.first_then_all(lambda: prepare_output_folder(output_dir))
            processes.first_then_all(lambda: held.enter_context(locked_folder(folder)))
            yield make_run(plan, folder, caches, command)
    leave()


@contextlib.contextmanager
def open_builder(plan: Plan, command: list[str]) -> Iterator[Run]:
    """Open the caches of a run that fills them and ends. Its output folder, where another run may be at work, is not touched.

    Raises:
        UserError, OutOfMemory: as in `open_run`.
    """
    with memory_advice(plan):
        folder = Path(plan.flags.output.output_dir)
        checkpoints = Checkpoints(folder, {}, plan.lanes.total)
        yield Run(
            **known_of(plan),
            folder=folder,
            checkpoints=checkpoints,
            resume_from=None,
            caches=open_caches(plan),
            command=command,
        )
    leave()


@contextlib.contextmanager
def memory_advice(plan: Plan) -> Iterator[None]:
    """Turn running out of memory inside into advice on which flags to change.

    Raises:
        OutOfMemory: the device ran out of memory; the message says what was there.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(plan) from error


def run_identity(plan: Plan) -> dict[str, object]:
    """Return what makes two runs the same one: student, teacher, prompts, states and objective."""
    student = {f"student {name}": value for name, value in plan.config.to_dict().items() if name != "distillation"}
    return {
        **student,
        **describe_teacher(plan.wan_files, plan.settings),
        "prompts": prompts_digest(plan.trained_texts),
        "teacher_cache": plan.flags.states.teacher_cache is not None,
        "ema": plan.flags.optimization.ema_decay > 0,
        **plan.flags.recipe.compared(),
    }


def make_run(plan: Plan, folder: Path, caches: list[TeacherCache], command: list[str]) -> Run:
    """Return the run at the state that it resumes from, or at its start."""
    output = plan.flags.output
    checkpoints = Checkpoints(folder, run_identity(plan), plan.lanes.total, output.keep_checkpoints, plan.processes)
    resume_from = None if output.overwrite else checkpoints.newest()
    if resume_from is not None:  # else what is there is set aside
        check_replaceable(folder, STUDENT_NAMES)
    check_disk(checkpoints, plan)
    logger.info("headers of the teacher read, output folder taken")
    run = Run(
        **known_of(plan), folder=folder, checkpoints=checkpoints, resume_from=None, caches=caches, command=command
    )
    return run.going_on_from(resume_from)


def known_of(plan: Plan) -> dict[str, Any]:
    """Return the fields of a plan, for the run that is made of it."""
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def out_of_memory(plan: Plan) -> OutOfMemory:
    """Return what was in the memory of the device that ran out, and which flags to change."""
    workload = workload_of(plan)
    return OutOfMemory(out_of_memory_message(workload, has_checkpoints(plan.flags)))
