"""A run by its shapes, `Workload(teacher=..., student=..., latent_size=64)`, and the FLOPs of its steps. No weight is read."""

import math
from collections import Counter
from dataclasses import dataclass

from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import BACKWARD_PASSES, count_parameters, num_image_tokens, sides, transformer_flops
from wandistiller.training.optimizer import NEWTON_SCHULZ_STEPS
from wandistiller.walk.walk import FEW_PATHS

UMT5_XXL_PARAMETERS = 5_680_910_336  # the text encoder of all released Wans, whose files are not always here
FP32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Shapes and settings that decide where the bytes and the FLOPs of a run go."""

    teacher: StudentConfig
    student: StudentConfig
    latent_size: int | tuple[int, int]  # side, or height and width, of the latents of the largest image size
    num_experts: int = 1
    is_guided: bool = True  # the teacher's answers take a second pass, for the negative prompt
    batch_size: int = 1  # prompts of one process in one forward pass
    grad_accum_steps: int = 1
    num_processes: int = 1
    processes_per_machine: int = 1
    dtype: str = "bf16"  # of matrix products: "fp32" or "bf16"
    teacher_dtype: str = "bf16"  # of its weights: "fp32", "bf16", or "fp8" (the Linear weights of its blocks)
    teacher_offload: str | None = None  # "blocks": two of them are on the GPU; "experts": as many as one expert has
    offline_teacher: bool = False  # all answers come from a cache; the teacher is gone before the student comes
    shard_teacher: bool = False
    shard_student: bool = False  # with gradients, moments and EMA
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    ema: bool = True
    num_features: int = 0  # teacher layers whose hidden states are compared
    stored_batches: int = 0  # batches of answers in memory to learn from again
    stored_segments: int = 0  # of each slot, whose states and velocities lie beside the answers
    latents_per_slot: int = FEW_PATHS  # of paths, over all image sizes
    calls_per_step: float = 1.0  # batches that the teacher answers per forward and backward pass of the student
    segment_passes: float = 0.0  # of the frozen student of a second stage, for each sample of a step, on average
    num_steps: int = 1
    num_prompts: int = 1  # that are encoded
    mean_text_tokens: float = 64.0
    negative_text_tokens: int = 0
    text_encoder_parameters: int = UMT5_XXL_PARAMETERS
    keep_checkpoints: int = 2  # 0: none is written
    teacher_cache_batches: int = 0  # batches of answers on disk
    is_gpu: bool = True

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.grad_accum_steps * self.num_processes

    @property
    def num_shards(self) -> int:
        """Processes that a sharded model is split over; of several machines each has a copy (`Processes.shard`)."""
        total, own = self.num_processes, self.processes_per_machine
        return own if 1 < own < total and total % own == 0 else total

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients persist through the step (accumulation, DDP); else they come as activations go."""
        return self.grad_accum_steps > 1 or self.num_processes > 1

    @property
    def latent_bytes(self) -> int:
        """Size of one sample's latents in float32."""
        return FP32 * self.student.num_channels * math.prod(sides(self.latent_size))

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt that cross-attention sees, with the one that stands for the padding."""
        return math.ceil(self.mean_text_tokens) + 1

    @property
    def student_tokens(self) -> int:
        return num_image_tokens(self.student, self.latent_size)

    @property
    def teacher_tokens(self) -> int:
        return num_image_tokens(self.teacher, self.latent_size)


# ---- FLOPs ----


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one GPU in one optimizer step, on average."""

    teacher: float
    student_forward: float
    student_backward: float
    segments: float  # walked by the frozen student of a second stage
    recompute: float  # of gradient checkpointing
    orthogonalization: float  # of Muon, whose matrices are shared out over the processes

    @property
    def total(self) -> float:
        student = self.student_forward + self.student_backward + self.segments + self.recompute
        return self.teacher + student + self.orthogonalization


def step_flops(workload: Workload) -> StepFlops:
    """Count the FLOPs of a step; an answer that comes from a cache or is replayed costs none."""
    samples = workload.grad_accum_steps * workload.batch_size
    teacher, forward = flops_per_sample(workload)
    return StepFlops(
        teacher=samples * workload.calls_per_step * teacher,
        student_forward=samples * forward,
        student_backward=BACKWARD_PASSES * samples * forward,
        segments=workload.segment_passes * samples * forward,
        recompute=samples * forward if workload.gradient_checkpointing else 0,
        orthogonalization=_orthogonalization_flops(workload) if workload.optimizer == "muon" else 0,
    )


def flops_per_sample(workload: Workload) -> tuple[int, int]:
    """Return the FLOPs of the teacher's answer to one prompt, two passes with guidance, and of the student's."""
    asked = workload.teacher, workload.teacher_tokens, workload.text_tokens
    teacher = transformer_flops(*asked, workload.negative_text_tokens + 1 if workload.is_guided else None)
    return teacher, transformer_flops(workload.student, workload.student_tokens, workload.text_tokens)


def _orthogonalization_flops(workload: Workload) -> int:
    """Count the products of Newton and Schulz's iteration in one process: the Gram matrix of the shorter side, its square, and back."""
    shapes = Counter(tuple(sorted(shape)) for shape in count_parameters(workload.student).matrix_shapes)
    rounds = {shape: math.ceil(workload.student.depth * n / workload.num_processes) for shape, n in shapes.items()}
    return NEWTON_SCHULZ_STEPS * sum(
        n * 2 * (2 * short * short * long + short**3) for (short, long), n in rounds.items()
    )
