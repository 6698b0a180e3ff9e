"""The settings of a run: every value that it needs, decided once (resolve.py) before anything is written or a weight is read."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from wandistiller.budget.cards import Card
from wandistiller.device import DTYPES
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize, square
from wandistiller.processes import Processes
from wandistiller.run.headers import Source
from wandistiller.sampling.sampler import SamplingOptions
from wandistiller.students.record import StudentRecord
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import TrainingOptions
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.text_encoder_files import TextEncoderFiles
from wandistiller.wan.wan_files import WanFiles


def compared(neutral: object) -> Any:
    """Declare a setting that decides the student: it is recorded, and compared where a run resumes.

    Args:
        neutral: the value that counts where a checkpoint was written before the setting existed.
    """
    return field(metadata={"neutral": neutral})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a run needs to know. A field that is named as a flag has the value that counts, typed or not.

    None means that there is none, never that it is to be decided.

    Attributes:
        flags_text: run.yaml, which repeats the run.
        wan_files: the teacher by its headers.
        teacher: how it is sampled; shift, guidance and latents are here.
        teacher_levels: the only noise levels it knows, from 1 down; () where it knows all.
        encoder: the text encoder and its tokenizer on disk; None: the mock's stand-in embeddings.
        vae_location: the VAE of the sample pictures; None: none are drawn.
        sample_prompts: the prompts of the sample pictures.
        held_out_prompts: the prompts to measure on; [] where nothing is measured.
        config: shape of the student.
        source: what it is cut from; None where that is the teacher, or nothing.
        train: "student", or "lora": a LoRA of it, of `lora_rank`, and the student itself stays as it is.
        image_sizes: in pixels; one or more, in turn.
        student_steps: steps that the student draws in, after a second stage; None: those of the teacher, in one stage.
        num_steps: optimizer steps of the whole run.
        first_stage_steps: of these, those that learn the velocity.
        num_calls: teacher batches of the whole run, of `num_samples_per_step` samples each.
        is_for_gpu: whether it runs on a GPU or (--dry_run) is planned for one.
        held_out_steps: of the teacher on a measured path (held_out.py).
        draws_held_out: whether it also draws, so that a measurement has a point of the frontier.
    """

    flags_text: str
    # Data
    teacher_path: str
    teacher_path_low: str | None
    text_encoder_path: str | None
    vae_path: str | None
    data_path: str
    caption_column: str | None
    eval_prompts: str | None
    wan_files: WanFiles
    teacher: TeacherSettings
    teacher_levels: tuple[float, ...]
    encoder: TextEncoderFiles | None
    vae_location: Path | None
    prompts: list[str]
    held_out_prompts: list[str]
    prompts_digest: str
    prompt_cache: str
    # Student
    config: StudentConfig
    init_from: str = compared("teacher")
    source: Source | None
    init_expert: str = compared("high")
    train: str = compared("student")
    lora_rank: int | None = compared(None)
    lora_alpha: float | None = compared(None)
    layers: list[int] | None = compared(None)
    image_sizes: tuple[ImageSize, ...]
    # States
    states: str = compared("trajectory")
    sigma_range: tuple[float, float] = compared((0.0, 1.0))
    calls_per_expert: int = compared(0)
    replay: int = compared(1)
    student_steps: int | None = compared(None)
    teacher_cache: str | None
    offline_teacher: bool
    cache_part: tuple[int, int] | None
    num_calls: int
    # Optimization
    num_steps: int
    first_stage_steps: int
    batch_size: int
    grad_accum_steps: int
    feature_loss_weight: float = compared(0.0)
    optimization: OptimizationOptions
    seed: int = compared(0)
    # Performance
    processes: Processes
    dtype: str
    teacher_dtype: str
    is_for_gpu: bool
    teacher_offload: str | None
    shard_teacher: bool
    shard_student: bool
    gradient_checkpointing: bool
    compile: bool
    # Output
    output_dir: str
    save_every: int
    keep_checkpoints: int
    overwrite: bool
    eval_every: int
    held_out_steps: int
    draws_held_out: bool
    sample_prompts: list[str]
    sample_seed: int
    sample_every: int
    report: str
    assume_gpu: Card | None

    @property
    def device(self) -> str:
        return self.processes.device

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
        has_paths = self.teacher_cache is None and self.states == "trajectory" and not self.is_lora
        return self.student_steps is not None and has_paths

    @property
    def is_lora(self) -> bool:
        return self.train == "lora"

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
        return TrainingOptions(
            num_steps=num_steps,
            optimization=self.optimization,
            eval_every=self.eval_every,
            sample_every=self.sample_every,
            save_every=self.save_every,
            stage=stage,
        )

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


NEUTRAL = {known.name: known.metadata["neutral"] for known in fields(Settings) if known.metadata}
