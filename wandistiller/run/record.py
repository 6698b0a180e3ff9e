"""A trained student is saved with the record of how it was distilled, from which whatever samples it takes its defaults."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wandistiller import __version__
from wandistiller.files.hub import hub_id
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, full_tensor
from wandistiller.projection.project import ProjectionReport
from wandistiller.run.reach import most_reached
from wandistiller.sampling.recorded import StudentRecord, recorded_path
from wandistiller.targets.segments import segment_sigmas
from wandistiller.training.loop import TrainingOptions, TrainingResult
from wandistiller.wan.settings import TeacherSettings

if TYPE_CHECKING:
    from wandistiller.run.run import Run

# These are recorded so that whoever samples the student finds them from any folder.
RECORDED_PATHS = ("teacher_path", "teacher_path_low", "text_encoder_path", "data_path", "extra_prompts")


def distillation_record(
    recipe: Mapping[str, object],
    settings: TeacherSettings,
    options: TrainingOptions,
    result: TrainingResult,
    made_of: Mapping[str, object],
) -> dict[str, object]:
    """Return everything another run or a sampler needs to know, as JSON values.

    Args:
        recipe: the flags that make a student what it is; those that are None are left out.
        made_of: layers, and the numbers of prompts and of the teacher's answers.
    """
    return {
        **{name: value for name, value in recipe.items() if value is not None},
        **settings.recorded(),
        **made_of,
        "num_train_steps": result.num_steps,
        "batch_size": options.batch_size,
        **asdict(options.optimization),
        "seed": options.seed,
        "final_loss": result.losses[-1],
        "wandistiller_version": __version__,
    }


def commands_so_far(before: list[dict], first_step: int, command: str, lr: float) -> list[dict]:
    """Return the commands that make a student, each with the steps before it; `before` are those that led to `first_step`.

    A command that came to no step is left out, and one that only resumes with the same flags is not listed twice.
    """
    made = [entry for entry in before if entry["from_step"] < first_step]
    if made and (made[-1]["command"], made[-1]["lr"]) == (command, lr):
        return made
    return [*made, {"from_step": first_step, "lr": lr, "command": command}]


def save_student(student: WanLiteStudent, record: dict, folder: Path, processes: Processes | None = None) -> None:
    """Save the student with its record in student_config.json; sharded weights are put together first."""
    student.config = student.config.replace(distillation=record)
    weights = {name: full_tensor(tensor) for name, tensor in student.state_dict().items()}
    if processes is None or processes.is_first:
        student.save_pretrained(folder, weights)


def save_trained_student(
    run: "Run", student: WanLiteStudent, projection: ProjectionReport, result: TrainingResult, num_teacher_batches: int
) -> None:
    """Save the trained student with everything that is recorded of the run that made it."""
    flags, settings = run.flags, run.settings
    made_by = {
        "num_processes": run.processes.count,
        "base_model": hub_id(flags.data.teacher_path),
        "commands": run.checkpoints.commands,
    }
    recipe: dict[str, Any] = made_by | flags.recipe.recorded()
    recipe |= {name: recorded_path(recipe[name]) for name in RECORDED_PATHS}
    if loras := run.wan_files.loras:
        recipe["teacher_loras"] = [lora.record() | {"path": recorded_path(lora.path)} for lora in loras]
    if flags.objective.student_steps:
        steps = flags.objective.student_steps
        sampler = StudentRecord(teacher_sampler=settings.teacher_sampler, student_steps=steps).sampler
        recipe["segment_sigmas"] = segment_sigmas(settings.shift, steps, sampler).tolist()
    made_of = {
        "layers": projection.layers,
        "num_prompts": most_reached(run) if run.texts.is_endless else len(run.texts.prompts),
        "num_teacher_batches": num_teacher_batches,
    }
    record = distillation_record(recipe, settings, run.training_options, result, made_of)
    save_student(student, record, run.folder, run.processes)
    if run.processes.is_first:
        projection.save(run.folder)
