"""The settings of a run: every value that it needs, decided once (resolve.py) before anything is written or a weight is read."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from wandistiller.device import DTYPES
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize, square
from wandistiller.processes import Processes
from wandistiller.run.flags import (
    NEUTRAL,
    DataFlags,
    ObjectiveFlags,
    OutputFlags,
    PerformanceFlags,
    StatesFlags,
    StudentFlags,
)
from wandistiller.run.headers import Source
from wandistiller.sampling.sampler import SamplingOptions
from wandistiller.students.record import StudentRecord
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import TrainingOptions
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.text_encoder_files import TextEncoderFiles
from wandistiller.wan.wan_files import WanFiles


@dataclass(frozen=True, kw_only=True)
class Settings(DataFlags, StudentFlags, StatesFlags, ObjectiveFlags, PerformanceFlags, OutputFlags):
    """Everything that a run needs to know. What is declared as a flag has the value that counts, typed or not.

    None means that there is none, never that it is to be decided.
    """

    flags_text: str  # run.yaml, which repeats the run
    wan_files: WanFiles  # the teacher by its headers
    teacher: TeacherSettings  # how it is sampled; shift, guidance and latents are here
    teacher_levels: tuple[float, ...]  # the only noise levels it knows, from 1 down to 0; () where it knows all
    encoder: TextEncoderFiles | None  # None: the mock's stand-in embeddings
    vae_location: Path | None  # of the sample pictures; None: none are drawn
    prompts: list[str]
    held_out_prompts: list[str]  # to measure on; [] where nothing is measured
    sample_prompts: list[str]
    config: StudentConfig
    source: Source | None  # what the student is cut from; None where that is the teacher, or nothing
    image_sizes: tuple[ImageSize, ...]  # one or more, in turn
    sigma_range: tuple[float, float]
    calls_per_expert: int
    replay: int
    feature_loss_weight: float
    num_calls: int  # teacher batches of the whole run, of `num_samples_per_step` samples each
    num_steps: int  # optimizer steps of the whole run
    first_stage_steps: (
        int  # of these, those that learn the velocity; a stage for `student_steps` follows, unless they are None
    )
    batch_size: int
    grad_accum_steps: int
    optimization: OptimizationOptions
    processes: Processes
    device: str
    dtype: str
    teacher_dtype: str
    is_for_gpu: bool  # it runs on a GPU or (--dry_run) is planned for one
    shard_teacher: bool
    shard_student: bool
    eval_every: int
    draws_held_out: bool  # the teacher also draws, so that a measurement has a point of the frontier

    @property
    def compute_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_samples_per_step(self) -> int:
        """The global batch: samples of an optimizer step over all processes."""
        return self.batch_size * self.grad_accum_steps * self.processes.count

    @property
    def has_one_square_size(self) -> bool:
        return self.image_sizes == (square(self.config.image_size),)

    @property
    def gathers_segments(self) -> bool:
        """Whether the teacher's paths are walked in the run, so that the second stage can learn from segments of theirs."""
        return self.student_steps is not None and self.teacher_cache is None and not self.is_lora

    @property
    def is_lora(self) -> bool:
        return self.train == "lora"

    @property
    def walks_segments(self) -> bool:
        """Whether the teacher's answers are whole segments: a LoRA of a few-step student learns nothing else."""
        return self.is_lora and self.student_steps is not None

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of the latents of each image size."""
        return [self.teacher.latent_shape(self.config, size) for size in self.image_sizes]

    @property
    def largest_latent_size(self) -> tuple[int, int]:
        """(H, W) of the image size that takes most memory and time."""
        return max((shape[1:] for shape in self.latent_shapes), key=math.prod)

    @property
    def teacher_sampling(self) -> SamplingOptions:
        """How the teacher draws in this run."""
        return SamplingOptions(
            shift=self.teacher.shift,
            num_inference_steps=self.teacher.num_inference_steps,
            sampler=self.teacher.teacher_sampler,
            levels=self.teacher.teacher_levels,
            compute_dtype=self.compute_dtype,
            device=self.device,
        )

    @property
    def student_sampling(self) -> SamplingOptions:
        """How the student draws once it is saved."""
        recorded = StudentRecord(
            num_inference_steps=self.teacher.num_inference_steps,
            student_steps=self.student_steps,
            teacher_sampler=self.teacher.teacher_sampler,
        )
        return replace(self.teacher_sampling, num_inference_steps=recorded.steps, sampler=recorded.sampler)

    def training_options(self, num_steps: int, stage: int) -> TrainingOptions:
        """Return what the loop is told of a stage that ends at `num_steps`."""
        return TrainingOptions(**of_fields(TrainingOptions, self) | {"num_steps": num_steps, "stage": stage})

    @property
    def recipe(self) -> dict[str, object]:
        """Settings that decide the student, by their names."""
        return {name: getattr(self, name) for name in NEUTRAL}

    @property
    def about(self) -> dict[str, str]:
        """What the digests of a run's description are of, by their names, for messages."""
        encoder = f" with {self.text_encoder_path}" if self.text_encoder_path else ""
        return {
            "prompts": f"{len(self.prompts):,} of {self.data_path}",
            "teacher": f"{self.teacher_path}{encoder}",
            "init_from": self.init_from,
        }

    def as_dict(self) -> dict[str, object]:
        """Return the values that are numbers or text by their names, for a tracker."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, (str, int, float, tuple))}
        return plain | vars(self.optimization)


def of_fields(kind: Any, source: object) -> dict[str, Any]:
    """Return those attributes of an object that a dataclass has fields for, by name."""
    return {known.name: getattr(source, known.name) for known in fields(kind) if hasattr(source, known.name)}
