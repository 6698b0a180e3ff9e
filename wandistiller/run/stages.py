"""A run: its parts, and the stages that train the student: the velocity, learnt from the teacher's answers, and then few steps.

run = open_run(teacher_path="data/demo_teacher", max_steps=50, output_dir="outputs/mine")
run.train()   # or a loop of your own over run.batches
run.save()
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from wandistiller import __version__
from wandistiller.files.output_folder import LORA_NAMES, prepare_output_folder, set_aside_previous_student
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import full_tensor
from wandistiller.projection.lora import StudentLora, write_lora
from wandistiller.projection.project import ProjectionReport
from wandistiller.run import build
from wandistiller.run.flags import flags_of
from wandistiller.run.inputs import read_inputs
from wandistiller.run.learning import build_batches, build_few_step_batches
from wandistiller.run.resolve import resolve
from wandistiller.run.settings import Settings
from wandistiller.sampling.sampler import StudentField
from wandistiller.sampling.teacher import Teacher
from wandistiller.students.parts import recorded_path, recorded_teacher
from wandistiller.training.checkpoints import Checkpoint, Checkpoints
from wandistiller.training.loop import Observer, TrainingResult, train
from wandistiller.training.lora import lora_changes, merged_state
from wandistiller.training.objective import Objective, TrainedStudent
from wandistiller.training.state import RunState
from wandistiller.walk.batches import Batches
from wandistiller.walk.cache import TeacherCache
from wandistiller.walk.grids import segment_sigmas
from wandistiller.wan.prompt_embeds import Embeds
from wandistiller.wan.transformer_files import teacher_tensor_shapes


@dataclass
class Run:
    """The parts of a run; whoever changes one changes what is trained. B samples, C H W latents, S text tokens.

    Attributes:
        settings: every value that counts, typed or not; frozen.
        embeds: prompt embeddings: `trained`, `held_out` and `samples`, and the `negative` prompt's.
        teacher: its `velocity(latents (B, C, H, W), sigma (B,), prompt_embeds (B, S, text_dim), prompt_lengths (B,))` is the guided
            one, (B, C, H, W); None where all of its answers come from a cache.
        student: cut from the teacher, or what --init_from says; trained in place.
        projection: what of the teacher it has.
        objective: `objective(student, batch, progress)` returns a `Loss`, whose `total` has the gradient.
        batches: `batches.of_step(step)`, for step 0, 1, 2 and so on, asks the teacher where that is due, walks its sampling paths
            on, and yields the micro-batches of a step: `latents`, `sigma`, `prompt_embeds`, `prompt_lengths`, and the target
            `velocity`. The walk and the store behind them are `batches.sources[0]`.
        state: of the stage that is trained; None before.
    """

    settings: Settings
    embeds: Embeds
    teacher: Teacher | None
    student: WanLiteStudent
    projection: ProjectionReport
    objective: Objective
    batches: Batches
    state: RunState | None = field(default=None, init=False)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Load the state of this run, of either stage; without a checkpoint it begins."""
        first_step = 0 if checkpoint is None else checkpoint.first_step
        self._enter(self._second(first_step) if first_step else self._first())
        if checkpoint is not None:
            self.state.load(checkpoint)

    def train(self, observer: Observer | None = None, checkpoints: Checkpoints | None = None) -> TrainingResult:
        """Train the student in place, through both stages; it ends as the average of its weights. See `training.loop.train`.

        The second stage begins with the first one's averaged weights. The student learns to take a segment of a sampling path in
        one step, from segments that the teacher's paths have passed in the first stage and, in equal parts, from those that a
        frozen copy of it walks. The teacher is asked nothing more.

        Args:
            checkpoints: where the run is saved; without them none is written.
        """
        settings, state = self.settings, self.state or self._first()
        self._enter(state)
        if state.frozen is None:
            result = train(state, observer, checkpoints)
            if result.interrupted or settings.student_steps is None or result.num_steps >= settings.num_steps:
                return result
            second = self._second(result.num_steps)
            second.follow(state)
            state = second  # the first one's optimizer and stored answers leave memory
            self._enter(state)
        if state.step < settings.num_steps:
            what = f"Learning to draw in {settings.student_steps} steps"
            print(f"{what}, from segments of the teacher's and its own paths", flush=True)
        return train(state, observer, checkpoints)

    def save(self, num_steps: int | None = None, student_steps: int | None = None, folder: Path | None = None) -> Path:
        """Save the student with its record, so that every command takes its folder; sharded weights are put together first.

        Args:
            num_steps: optimizer steps of a loop of your own.
            student_steps: steps that the student has learnt to draw in, if your loop taught it that.
            folder: one that is prepared; by default --output_dir, where an earlier student is moved aside.
        """
        if folder is None:
            folder = prepare_output_folder(self.settings.output_dir)
            set_aside_previous_student(folder)
        made: dict[str, object] = {"num_train_steps": num_steps or 0, "num_teacher_batches": self.batches.num_calls}
        if (state := self.state) is not None:
            made = {
                "num_train_steps": state.step,
                "num_teacher_batches": state.teacher_calls,
                "final_loss": state.losses[-1],
            }
            student_steps = self.settings.student_steps if state.options.stage == 2 else None
        record = distillation_record(self.settings, self.projection) | made
        if student_steps is not None:
            sigmas = segment_sigmas(self.settings.teacher.shift, student_steps).tolist()
            record |= {"student_steps": student_steps, "segment_sigmas": sigmas}
        self.student.config = self.student.config.replace(distillation=record)
        weights = {name: full_tensor(tensor) for name, tensor in self.student.state_dict().items()}
        if self.settings.processes.is_first:
            self.student.save_pretrained(folder, merged_state(self.student, weights))
            if self.settings.is_lora:  # merged into the student, and by itself for diffusers and for ComfyUI
                lora = StudentLora(teacher_tensor_shapes(self.student.config), lora_changes(self.student, weights))
                for file_format, name in LORA_NAMES.items():
                    write_lora(lora, folder / name, file_format)
            self.projection.save(folder)
        return folder

    def _enter(self, state: RunState) -> None:
        self.state, self.batches = state, state.batches

    def _first(self) -> RunState:
        settings, trained = self.settings, TrainedStudent(self.student, self.objective)
        stage = 2 if settings.walks_segments else 1
        options = settings.training_options(settings.first_stage_steps, stage)
        return RunState(trained, self.batches, options, settings.processes)

    def _second(self, first_step: int) -> RunState:
        settings = self.settings
        frozen = self._frozen()
        num_steps = settings.num_steps - first_step
        batches = build_few_step_batches(settings, self.embeds.trained, StudentField(frozen), max(1, num_steps))
        objective = replace(self.objective, feature_loss=None, feature_weight=0.0)  # segments have no hidden states
        trained = TrainedStudent(self.student, objective)
        options = settings.training_options(settings.num_steps, stage=2)
        return RunState(trained, batches, options, settings.processes, first_step=first_step, frozen=frozen)

    def _frozen(self) -> WanLiteStudent:
        """Return a model of the student's shape, whose weights are yet to come."""
        settings = self.settings
        with torch.random.fork_rng(devices=[]):
            frozen = WanLiteStudent(self.student.config).to(settings.device, settings.compute_dtype)
        frozen.eval().requires_grad_(False)
        if settings.compile:
            build.compile_blocks([frozen])
        if settings.shard_student:
            settings.processes.shard(frozen)
        return frozen


def distillation_record(settings: Settings, projection: ProjectionReport) -> dict[str, object]:
    """Return what another run or a sampler needs to know of a student, as JSON values; paths are found from any folder."""
    paths = {
        name: recorded_path(getattr(settings, name)) for name in ("teacher_path_low", "text_encoder_path", "data_path")
    }
    own = {
        "caption_column": settings.caption_column,
        "teacher_dtype": settings.teacher_dtype,
        "image_sizes": None if settings.has_one_square_size else [str(size) for size in settings.image_sizes],
        "init_from": recorded_path(settings.init_from) if settings.source else settings.init_from,
        "student_steps": None,  # until the second stage has begun
    }
    return {
        "num_processes": settings.processes.count,
        **{name: value for name, value in (paths | settings.recipe | own).items() if value is not None},
        **recorded_teacher(settings.wan_files, settings.teacher),
        "layers": projection.layers,
        "num_prompts": len(settings.prompts),
        "batch_size": settings.num_samples_per_step,
        **asdict(settings.optimization),
        "wandistiller_version": __version__,
    }


def build_run(settings: Settings, caches: Sequence[TeacherCache] = ()) -> Run:
    """Build the parts of a run. The text encoder leaves memory before the teacher comes, and an offline teacher before the student does."""
    embeds = build.embed_prompts(settings)
    teacher = build.load_teacher(settings, embeds, caches)
    student, projection = build.make_student(settings)
    objective = build.build_objective(settings)
    build.compile_and_shard(settings, student, teacher, objective)
    batches = build_batches(settings, caches, embeds.trained, teacher, projection)
    return Run(settings, embeds, teacher, student, projection, objective, batches)


def open_run(**flags: object) -> Run:
    """Read prompts, teacher and student by the flags of train_distillation.py, given as keywords; no folder is written to."""
    typed = flags_of(**flags)
    return build_run(resolve(typed, read_inputs(typed)))
