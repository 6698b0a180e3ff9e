"""The student that a run saves, with the record of how it was distilled; whoever draws with it takes its defaults from there."""

from dataclasses import asdict

from wandistiller import __version__
from wandistiller.files.hub import hub_id
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import full_tensor
from wandistiller.projection.project import ProjectionReport
from wandistiller.run.folder import Folder
from wandistiller.run.settings import Settings
from wandistiller.run.stages import Stages
from wandistiller.students.parts import recorded_path
from wandistiller.students.record import StudentRecord
from wandistiller.students.trained_prompts import write_trained_prompts
from wandistiller.training.loop import TrainingResult
from wandistiller.walk.grids import segment_sigmas

# Recorded as paths that are found from any folder
PATHS = ("teacher_path", "teacher_path_low", "text_encoder_path", "data_path")


def distillation_record(
    settings: Settings, projection: ProjectionReport, result: TrainingResult, stages: Stages, commands: list[dict]
) -> dict[str, object]:
    """Return everything that another run or a sampler needs to know of a student, as JSON values.

    Args:
        commands: the commands that made the student.
    """
    paths = {name: recorded_path(getattr(settings, name)) for name in PATHS}
    own = {
        "base_model": hub_id(settings.teacher_path),
        "caption_column": settings.caption_column,
        "teacher_dtype": settings.teacher_dtype,
        "image_sizes": None if settings.has_one_square_size else [str(size) for size in settings.image_sizes],
        "init_from": recorded_path(settings.init_from) if settings.source else settings.init_from,
        "student_steps": None,  # until the second stage has begun
    }
    known = {name: value for name, value in (paths | settings.recipe | own).items() if value is not None}
    return {
        "num_processes": settings.processes.count,
        "commands": commands,
        **known,
        **teachers_world(settings),
        **teacher_loras(settings),
        **segments(settings, stages.student_steps),
        **settings.teacher.recorded(),
        "layers": projection.layers,
        "num_prompts": len(settings.prompts),
        "num_teacher_batches": stages.state.teacher_calls,
        "num_train_steps": result.num_steps,
        "batch_size": settings.num_samples_per_step,
        **asdict(settings.optimization),
        "final_loss": result.losses[-1],
        "wandistiller_version": __version__,
    }


def teachers_world(settings: Settings) -> dict[str, object]:
    """Return the world of a toy teacher, whose prompts are of it."""
    world = settings.wan_files.record.get("world")
    return {"world": world} if isinstance(world, str) else {}


def teacher_loras(settings: Settings) -> dict[str, object]:
    """Return the record of the LoRAs that were merged into the teacher, if there are any."""
    loras = settings.wan_files.loras
    records = [lora.record() | {"path": recorded_path(str(lora.path))} for lora in loras]
    return {"teacher_loras": records} if loras else {}


def segments(settings: Settings, steps: int | None) -> dict[str, object]:
    """Return the steps of a student of few steps, and the noise levels between which it draws."""
    if steps is None:
        return {}
    teacher = settings.teacher
    sampler = StudentRecord(teacher_sampler=teacher.teacher_sampler, student_steps=steps).sampler
    return {"student_steps": steps, "segment_sigmas": segment_sigmas(teacher.shift, steps, sampler).tolist()}


def save_trained_student(
    settings: Settings,
    folder: Folder,
    student: WanLiteStudent,
    projection: ProjectionReport,
    result: TrainingResult,
    stages: Stages,
) -> None:
    """Save the student with its record; sharded weights are put together first."""
    record = distillation_record(settings, projection, result, stages, folder.checkpoints.commands)
    student.config = student.config.replace(distillation=record)
    weights = {name: full_tensor(tensor) for name, tensor in student.state_dict().items()}
    if settings.processes.is_first:
        student.save_pretrained(folder.path, weights)
        projection.save(folder.path)
        write_trained_prompts(folder.path, settings.prompts)
