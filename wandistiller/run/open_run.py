"""A run from Python: the parts that train_distillation.py puts together, to be looked at, changed, and saved as that saves them.

run = open_run(teacher_path="data/demo_teacher", max_steps=50, output_dir="outputs/mine")
run.train()   # or a loop of your own over run.batches
run.save()
"""

from dataclasses import dataclass, field
from pathlib import Path

from wandistiller.files.output_folder import prepare_output_folder, set_aside_previous_student
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.project import ProjectionReport
from wandistiller.run import build
from wandistiller.run.flags import flags_of
from wandistiller.run.folder import Folder
from wandistiller.run.inputs import read_inputs
from wandistiller.run.learning import build_batches
from wandistiller.run.record import save_student
from wandistiller.run.resolve import resolve
from wandistiller.run.settings import Settings
from wandistiller.run.stages import Stages
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.loop import Observer, TrainingResult
from wandistiller.training.objective import Objective
from wandistiller.walk.batches import Batches
from wandistiller.wan.prompt_embeds import Embeds


@dataclass
class Run:
    """The parts of a run; whoever changes one changes what is trained. B samples, C H W latents, S text tokens.

    Attributes:
        settings: every value that counts, typed or not; frozen.
        embeds: prompt embeddings: `trained`, `held_out` and `samples`, and the `negative` prompt's.
        teacher: its `velocity(latents (B, C, H, W), sigma (B,), prompt_embeds (B, S, text_dim), prompt_lengths (B,))` is the guided
            one, (B, C, H, W).
        student: cut from the teacher, or what --init_from says; trained in place.
        projection: what of the teacher it has.
        objective: `objective(student, batch, progress)` returns a `Loss`, whose `total` has the gradient.
        batches: `batches.of_step(step)`, for step 0, 1, 2 and so on, asks the teacher where that is due, walks its sampling paths
            on, and yields the micro-batches of a step: `latents`, `sigma`, `prompt_embeds`, `prompt_lengths`, and the target
            `velocity`. The walk and the store behind them are `batches.sources[0]`.
        num_steps: steps that `train` has taken.
    """

    settings: Settings
    embeds: Embeds
    teacher: Teacher
    student: WanLiteStudent
    projection: ProjectionReport
    objective: Objective
    batches: Batches
    num_steps: int = field(default=0, init=False)
    student_steps: int | None = field(default=None, init=False)

    def train(self, observer: Observer | None = None) -> TrainingResult:
        """Train the student as the command does, through both stages, without checkpoints; it ends as the average of its weights."""
        stages = Stages(self.settings, self.student, self.objective, self.batches, self.embeds.trained)
        result = stages.train(observer or Observer(), Folder(Path(self.settings.output_dir), None, None))
        self.num_steps, self.student_steps = result.num_steps, stages.student_steps
        return result

    def save(self, num_steps: int | None = None, student_steps: int | None = None) -> Path:
        """Save the student with its record, so that every command takes its folder; an earlier student there is moved aside.

        Args:
            num_steps: optimizer steps of a loop of your own.
            student_steps: steps that the student has learnt to draw in, if your loop taught it that.
        """
        folder = prepare_output_folder(self.settings.output_dir)
        set_aside_previous_student(folder)
        steps = self.num_steps if num_steps is None else num_steps
        made = {"num_train_steps": steps, "num_teacher_batches": self.batches.num_calls}
        save_student(self.settings, folder, self.student, self.projection, made, student_steps or self.student_steps)
        return folder


def open_run(**flags: object) -> Run:
    """Read prompts, teacher and student by the flags of train_distillation.py, given as keywords; no folder is written to.

    Raises:
        UserError: what the command would refuse.
    """
    typed = flags_of(**flags)
    settings = resolve(typed, read_inputs(typed))
    embeds = build.embed_prompts(settings)
    teacher = build.build_teacher(settings, embeds.negative)
    student, projection = build.make_student(settings)
    objective = build.build_objective(settings)
    batches = build_batches(settings, [], embeds.trained, teacher, projection)
    return Run(settings, embeds, teacher, student, projection, objective, batches)
