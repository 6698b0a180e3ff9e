"""The student that a run saves, with the record of how it was distilled; whoever draws with it takes its defaults from there."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from wandistiller import __version__
from wandistiller.files.output_folder import LORA_NAMES
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import full_tensor
from wandistiller.projection.lora import StudentLora, write_lora
from wandistiller.projection.project import ProjectionReport
from wandistiller.run.settings import Settings
from wandistiller.students.parts import recorded_path, recorded_teacher
from wandistiller.students.record import StudentRecord
from wandistiller.students.trained_prompts import write_trained_prompts
from wandistiller.training.lora import lora_changes, merged_state
from wandistiller.walk.grids import segment_sigmas
from wandistiller.wan.transformer_files import teacher_tensor_shapes

# Recorded as paths that are found from any folder
PATHS = ("teacher_path_low", "text_encoder_path", "data_path")


def distillation_record(
    settings: Settings, projection: ProjectionReport, made: Mapping[str, object], student_steps: int | None
) -> dict[str, object]:
    """Return everything that another run or a sampler needs to know of a student, as JSON values.

    Args:
        made: how its training went: steps and teacher batches, the last loss.
        student_steps: steps that it has learnt to draw in; None for those of its teacher.
    """
    paths = {name: recorded_path(getattr(settings, name)) for name in PATHS}
    own = {
        "caption_column": settings.caption_column,
        "teacher_dtype": settings.teacher_dtype,
        "image_sizes": None if settings.has_one_square_size else [str(size) for size in settings.image_sizes],
        "init_from": recorded_path(settings.init_from) if settings.source else settings.init_from,
        "student_steps": None,  # until the second stage has begun
    }
    known = {name: value for name, value in (paths | settings.recipe | own).items() if value is not None}
    return {
        "num_processes": settings.processes.count,
        **known,
        **segments(settings, student_steps),
        **recorded_teacher(settings.wan_files, settings.teacher),
        "layers": projection.layers,
        "num_prompts": len(settings.prompts),
        "batch_size": settings.num_samples_per_step,
        **asdict(settings.optimization),
        **made,
        "wandistiller_version": __version__,
    }


def segments(settings: Settings, steps: int | None) -> dict[str, object]:
    """Return the steps of a student of few steps, and the noise levels between which it draws."""
    if steps is None:
        return {}
    teacher = settings.teacher
    sampler = StudentRecord(teacher_sampler=teacher.teacher_sampler, student_steps=steps).sampler
    return {"student_steps": steps, "segment_sigmas": segment_sigmas(teacher.shift, steps, sampler).tolist()}


def save_student(
    settings: Settings,
    folder: Path,
    student: WanLiteStudent,
    projection: ProjectionReport,
    made: Mapping[str, object],
    student_steps: int | None,
) -> None:
    """Save the student with its record (`distillation_record`); sharded weights are put together first.

    A LoRA is merged into the student, and saved by itself for diffusers and for ComfyUI.
    """
    student.config = student.config.replace(distillation=distillation_record(settings, projection, made, student_steps))
    weights = {name: full_tensor(tensor) for name, tensor in student.state_dict().items()}
    if settings.processes.is_first:
        student.save_pretrained(folder, merged_state(student, weights))
        if settings.is_lora:
            lora = StudentLora(teacher_tensor_shapes(student.config), lora_changes(student, weights))
            for file_format, name in LORA_NAMES.items():
                write_lora(lora, folder / name, file_format)
        projection.save(folder)
        write_trained_prompts(folder, settings.prompts)
