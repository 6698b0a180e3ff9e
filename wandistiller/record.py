"""How a student was distilled: written into its student_config.json, and the defaults of whatever samples it later."""

from dataclasses import asdict
from pathlib import Path

from wandistiller import __version__
from wandistiller.student import WanLiteStudent
from wandistiller.teacher import TeacherSettings
from wandistiller.training import TrainingOptions, TrainingResult


def distillation_record(
    teacher_path: str,
    settings: TeacherSettings,
    options: TrainingOptions,
    result: TrainingResult,
    *,
    states: str,
    replay: int,
    num_teacher_batches: int,
    sigma_range: tuple[float, float],
    init: str,
    init_expert: str,
    layers: list[int],
    num_prompts: int,
    **paths: str | None,
) -> dict:
    """Everything another run or a sampler needs to know, as JSON values; `paths` are added as they are."""
    return {
        "teacher_path": teacher_path,
        **{name: value for name, value in paths.items() if value is not None},
        "init": init,
        "init_expert": init_expert,
        "layers": layers,
        **asdict(settings),
        "states": states,
        "replay": replay,
        "num_teacher_batches": num_teacher_batches,
        "sigma_range": list(sigma_range),
        "num_train_steps": result.num_steps,
        "batch_size": options.batch_size,
        **asdict(options.optimization),
        "seed": options.seed,
        "num_prompts": num_prompts,
        "final_loss": result.losses[-1],
        "wandistiller_version": __version__,
    }


def save_student(student: WanLiteStudent, record: dict, folder: Path) -> None:
    """Save the student with its record in student_config.json."""
    student.config = student.config.replace(distillation=record)
    student.save_pretrained(folder)
