"""The stages of a run: the velocity, learnt from the teacher's answers, and then few steps, learnt from segments of sampling paths."""

from dataclasses import replace

import torch

from wandistiller.model.transformer import WanLiteStudent
from wandistiller.run.build import compile_blocks
from wandistiller.run.folder import Folder
from wandistiller.run.learning import build_few_step_batches
from wandistiller.run.settings import Settings
from wandistiller.sampling.sampler import StudentField
from wandistiller.training.checkpoints import Checkpoint
from wandistiller.training.loop import Observer, TrainingResult, train
from wandistiller.training.objective import Objective, TrainedStudent
from wandistiller.training.state import RunState
from wandistiller.walk.batches import Batches
from wandistiller.wan.prompt_embeds import PromptEmbeds


class Stages:
    """Trains a student through the stages of its run, from the checkpoint that it resumes from.

    The second stage begins with the first one's averaged weights. The student learns to take a segment of a sampling path in one
    step, from segments that the teacher's paths have passed in the first stage and, in equal parts, from those that a frozen
    copy of it walks. The teacher is asked nothing more.
    """

    def __init__(
        self,
        settings: Settings,
        student: WanLiteStudent,
        objective: Objective,
        batches: Batches,
        prompt_embeds: PromptEmbeds,
    ):
        self.settings, self.student, self.prompt_embeds, self.objective = settings, student, prompt_embeds, objective
        trained, stage = TrainedStudent(student, objective), 2 if settings.is_lora and settings.student_steps else 1
        options = settings.training_options(settings.first_stage_steps, stage)
        self.state = RunState(trained, batches, options, settings.processes)

    @property
    def student_steps(self) -> int | None:
        """Steps that the student draws in; None while it learns the velocity."""
        return self.settings.student_steps if self.state.options.stage == 2 else None

    def resume(self, folder: Folder) -> Folder:
        """Load the newest checkpoint that holds the state of this run, of either stage; return the folder at it."""
        first = self.state

        def state_of(checkpoint: Checkpoint) -> RunState:
            first_step = checkpoint.first_step
            return self._second(first_step) if first_step else first

        loaded, folder = folder.load_newest(self.settings, state_of)
        self.state = loaded or first
        return folder

    def train(self, observer: Observer, folder: Folder) -> TrainingResult:
        """Train the student in place; it ends as the average of its weights. See `training.loop.train`."""
        settings = self.settings
        if self.state.frozen is None:
            result = train(self.state, observer, folder.checkpoints)
            if result.interrupted or settings.student_steps is None or result.num_steps >= settings.num_steps:
                return result
            second = self._second(result.num_steps)
            second.follow(self.state)
            self.state = second  # the first one's optimizer and stored answers leave memory
        print(
            f"Learning to draw in {settings.student_steps} steps, from segments of the teacher's and its own paths",
            flush=True,
        )
        return train(self.state, observer, folder.checkpoints)

    def made(self, result: TrainingResult) -> dict[str, object]:
        """Return how the training went, for the student's record."""
        return {
            "num_teacher_batches": self.state.teacher_calls,
            "num_train_steps": result.num_steps,
            "final_loss": result.losses[-1],
        }

    def _second(self, first_step: int) -> RunState:
        settings = self.settings
        frozen = self._frozen()
        num_steps = settings.num_steps - first_step
        batches = build_few_step_batches(settings, self.prompt_embeds, StudentField(frozen), max(1, num_steps))
        objective = replace(self.objective, feature_loss=None, feature_weight=0.0)  # segments have no hidden states
        return RunState(
            TrainedStudent(self.student, objective),
            batches,
            settings.training_options(settings.num_steps, stage=2),
            settings.processes,
            first_step=first_step,
            frozen=frozen,
        )

    def _frozen(self) -> WanLiteStudent:
        """Return a model of the student's shape, whose weights are yet to come."""
        settings = self.settings
        with torch.random.fork_rng(devices=[]):
            frozen = WanLiteStudent(self.student.config).to(settings.device, settings.compute_dtype)
        frozen.eval().requires_grad_(False)
        if settings.compile:
            compile_blocks([frozen])
        if settings.shard_student:
            settings.processes.shard(frozen)
        return frozen
