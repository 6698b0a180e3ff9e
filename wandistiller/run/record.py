"""How a student was distilled: written into its student_config.json, and the defaults of whatever samples it later."""

from dataclasses import asdict
from pathlib import Path

from wandistiller import __version__
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes, full_tensor
from wandistiller.training.loop import TrainingOptions, TrainingResult
from wandistiller.wan.settings import TeacherSettings


def distillation_record(
    settings: TeacherSettings,
    options: TrainingOptions,
    result: TrainingResult,
    *,
    layers: list[int],
    num_prompts: int,
    num_teacher_batches: int,
    **recipe: object,
) -> dict:
    """Everything another run or a sampler needs to know, as JSON values; of `recipe` what is not None is added as it is."""
    return {
        **{name: value for name, value in recipe.items() if value is not None},
        **asdict(settings),
        "layers": layers,
        "num_prompts": num_prompts,
        "num_teacher_batches": num_teacher_batches,
        "num_train_steps": result.num_steps,
        "batch_size": options.batch_size,
        **asdict(options.optimization),
        "seed": options.seed,
        "final_loss": result.losses[-1],
        "wandistiller_version": __version__,
    }


def commands_so_far(before: list[dict], first_step: int, command: str, lr: float) -> list[dict]:
    """The commands that make a student, each with the steps before it; `before` are those that led to `first_step`.

    One that came to no step is left out, and one that only goes on with the same is not told twice.
    """
    made = [entry for entry in before if entry["from_step"] < first_step]
    if made and (made[-1]["command"], made[-1]["lr"]) == (command, lr):
        return made
    return [*made, {"from_step": first_step, "lr": lr, "command": command}]


def save_student(student: WanLiteStudent, record: dict, folder: Path, processes: Processes | None = None) -> None:
    """Save the student with its record in student_config.json; put together where its weights are spread over processes."""
    student.config = student.config.replace(distillation=record)
    weights = {name: full_tensor(tensor) for name, tensor in student.state_dict().items()}
    if processes is None or processes.is_first:
        student.save_pretrained(folder, weights)
