"""What a run will take before it is paid for: memory of a GPU by component, disk, FLOPs of a step. Shapes only, no weights.

    components = memory_budget(workload)
    print(peak_bytes(components))

Every figure is arithmetic on shapes. `benchmarks/bench_memory.py` holds it against a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wandistiller.budget.activations import FP32, block_input_bytes, inference_bytes, training_bytes
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import shares
from wandistiller.model.sizes import (
    BACKWARD_PASSES,
    BYTES,
    count_parameters,
    guided_flops,
    num_image_tokens,
    sides,
    transformer_flops,
    weight_bytes,
)
from wandistiller.targets.renoise import SAMPLES_PER_LANE
from wandistiller.targets.replay import feature_bytes
from wandistiller.targets.segments import ready_per_lane
from wandistiller.targets.trajectories import FEW_PATHS_PER_LANE, PATHS_PER_LANE
from wandistiller.training.optimizer import NEWTON_SCHULZ_STEPS

# The bytes that AdamW's two moments take for each parameter. Muon has one, in float32, of the matrices that it moves.
MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 8}
# All released Wans share this encoder, whose files are not always at hand.
UMT5_XXL_PARAMETERS = 5_680_910_336
# The CUDA context with its libraries, and the share that the allocator cannot use between tensors, are assumed, not measured.
CONTEXT_BYTES, FRAGMENTATION = 2**30, 0.05
# The tests that hold the formulas of activations.py against torch allow them this error.
ACTIVATION_TOLERANCE = 0.15
# The text encoder is in memory alone. Then the teacher answers, the student's activations are there, and at the end of its
# backward pass, when they have gone, all gradients are there.
PHASES = ("encoding", "answering", "learning", "updating")


@dataclass(frozen=True, kw_only=True)
class HeldOutWork:
    """What measuring the student at held-out states takes of one process over a whole run.

    Attributes:
        teacher, student: states that either is asked at.
        num_kept: states that are kept on disk.
    """

    teacher: int = 0
    student: int = 0
    num_kept: int = 0


NO_HELD_OUT_WORK = HeldOutWork()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run by its shapes and by what decides where bytes go.

    Attributes:
        latent_size: height and width of the latents behind the teacher's own VAE, or the side of square ones; of several image
            sizes, those of the largest.
        batch_size: prompts of one process in one forward pass; an optimiser step has
            batch_size x grad_accum_steps x num_processes.
        teacher_dtype: how its weights are kept: "fp32", "bf16", or "fp8" (the Linear weights of its blocks).
        teacher_offload: of two experts only the one in use is on the GPU.
        offline_teacher: all its answers come from a cache, and it has left memory before the student comes.
        shard_teacher, shard_student: weights (and gradients, moments, average) split over the processes.
        num_features: teacher layers whose hidden states are compared; 0 is none.
        maps_features: whether the student's hidden states pass a learnt map to the teacher's width first.
        replayed_batches: batches of answers that are kept to be learnt from again; 0 without replay, and where a cache has them.
        stored_latents: latents kept per sample of a batch for training states: paths in flight and finished samples.
        guided_share: share of the teacher's answers that guidance makes two passes of, where it is used.
        calls_per_step: batches that the teacher answers for one forward and backward pass of the student.
        mean_text_tokens: length of a prompt on average.
        negative_text_tokens: length of the negative prompt.
        keep_checkpoints: 0 where none is written.
        teacher_cache_batches: answers kept on disk; 0 without a cache.
        held_out: what measuring the student takes over the whole run.
    """

    teacher: StudentConfig
    student: StudentConfig
    latent_size: int | tuple[int, int]
    num_experts: int = 1
    uses_guidance: bool = True
    guided_share: float = 1.0
    batch_size: int = 1
    grad_accum_steps: int = 1
    num_processes: int = 1
    dtype: str = "bf16"
    teacher_dtype: str = "bf16"
    teacher_offload: bool = False
    offline_teacher: bool = False
    shard_teacher: bool = False
    shard_student: bool = False
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    ema: bool = True
    num_features: int = 0
    maps_features: bool = False
    replayed_batches: int = 0
    stored_latents: int = FEW_PATHS_PER_LANE
    calls_per_step: float = 1.0
    num_steps: int = 1
    num_prompts: int = 1
    mean_text_tokens: float = 64.0
    negative_text_tokens: int = 0
    text_encoder_parameters: int = UMT5_XXL_PARAMETERS
    keep_checkpoints: int = 2
    teacher_cache_batches: int = 0
    held_out: HeldOutWork = NO_HELD_OUT_WORK
    is_gpu: bool = True

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.grad_accum_steps * self.num_processes

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are there all the time, to be added to or to be sent; else they come as activations go."""
        return self.grad_accum_steps > 1 or self.num_processes > 1

    @property
    def latent_bytes(self) -> int:
        """Size of one sample's latents in float32."""
        return FP32 * self.student.num_channels * math.prod(sides(self.latent_size))

    @property
    def teacher_samples(self) -> int:
        """Samples of one call: guidance asks with the prompt and with the negative prompt at once."""
        return self.batch_size * (2 if self.uses_guidance else 1)

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt that the student's cross-attention sees, with the one that stands for the padding."""
        return math.ceil(self.mean_text_tokens) + 1

    @property
    def teacher_text_tokens(self) -> int:
        """Tokens that either half of a guided batch sees at most."""
        return max(self.text_tokens, self.negative_text_tokens + 1 if self.uses_guidance else 0)


def stored_latents(num_paths: int, *, renoised: bool = False, has_segments: bool = False, num_sizes: int = 1) -> int:
    """Return how many latents the training states keep on the device, per sample of a batch, over all image sizes.

    Args:
        num_paths: sampling paths of a lane; 0 where the states lie on none. Segments have a pool of their own.
    """
    if has_segments:
        # Starts, ends and velocities of the paths; states and velocities of the targets that are known
        return sum(3 * paths + 2 * ready_per_lane(paths) for paths in shares(PATHS_PER_LANE, num_sizes))
    # Every size has a path of its own:
    return 0 if not num_paths else max(num_paths, num_sizes) + (SAMPLES_PER_LANE if renoised else 0)


# ---- memory ----


@dataclass(frozen=True)
class Component:
    """Some bytes of one GPU, or of the disk; they are there in one `phase`, or with "" in all but encoding."""

    name: str
    num_bytes: int
    what: str
    phase: str = ""


def memory_budget(workload: Workload) -> list[Component]:
    """Return the bytes per GPU by component; those of the same phase and those of no phase are there together."""
    parts = [*_teacher_components(workload), *_student_components(workload), _states(workload)]
    parts.append(
        Component(
            "text encoder",
            workload.text_encoder_parameters * BYTES[workload.dtype],
            "before the teacher comes; not at all where the prompt cache has every prompt",
            "encoding",
        )
    )
    parts = [part for part in parts if part.num_bytes]
    if workload.is_gpu:
        reserve = CONTEXT_BYTES + round(FRAGMENTATION * peak_bytes(parts))
        parts.append(Component("reserve", reserve, f"assumed: CUDA context, and {FRAGMENTATION:.0%} for fragmentation"))
    return parts


def phase_bytes(components: Sequence[Component]) -> dict[str, int]:
    """Return the bytes that are there at once in each phase; the text encoder is alone."""
    always = sum(part.num_bytes for part in components if not part.phase)
    own = {phase: sum(part.num_bytes for part in components if part.phase == phase) for phase in PHASES}
    return {phase: own[phase] + (0 if phase == "encoding" else always) for phase in PHASES}


def peak_bytes(components: Sequence[Component]) -> int:
    return max(phase_bytes(components).values())


def training_peak_bytes(components: Sequence[Component]) -> int:
    """Return the peak of all phases but that of the text encoder, which the prompt cache may spare."""
    return max(num_bytes for phase, num_bytes in phase_bytes(components).items() if phase != "encoding")


def certain_bytes(workload: Workload) -> int:
    """Return the bytes that the run needs at the very least.

    That is without a reserve, with activations at the low end of their estimate, without a text encoder (its answers may be in
    the prompt cache), and without what Muon multiplies.
    """
    parts = [part for part in memory_budget(workload) if part.name != "reserve"]
    sizes, phases = {part.name: part.num_bytes for part in parts}, phase_bytes(parts)
    uncertain = {"answering": "teacher activations", "learning": "student activations", "updating": "last activations"}
    for phase, name in uncertain.items():
        phases[phase] -= round(ACTIVATION_TOLERANCE * sizes[name])
    phases["updating"] -= sizes.get("orthogonalisation", 0)
    return max(phases[phase] for phase in uncertain)


def _teacher_components(workload: Workload) -> list[Component]:
    """Return the experts' weights, and the inside of one block at a guided batch."""
    config, dtype = workload.teacher, workload.teacher_dtype
    one = weight_bytes(config, dtype)
    resident = 1 if workload.teacher_offload else workload.num_experts
    experts = f"{resident} of {workload.num_experts} experts" if workload.num_experts > 1 else "one transformer"
    total = resident * one
    what = f"{experts} of {count_parameters(config).total:,} parameters, {dtype} (norms, modulation, time: fp32)"
    gathered = 0
    if workload.shard_teacher:
        block = weight_bytes(config.replace(depth=2), dtype) - weight_bytes(config.replace(depth=1), dtype)
        # FSDP2 leaves what is in no block gathered. A gathered block lies in the buffer that it came in, and in its weights.
        ends, gathered = one - config.depth * block, 2 * block
        total = math.ceil(total / workload.num_processes) + resident * ends
        what += f", split over {workload.num_processes}; outside of blocks whole"
    phase = "answering" if workload.offline_teacher else ""
    image = num_image_tokens(config, workload.latent_size)
    compute = BYTES[workload.dtype]
    activations = workload.teacher_samples * inference_bytes(config, image, workload.teacher_text_tokens, compute)
    if dtype == "fp8":
        activations += compute * config.hidden_size * max(config.hidden_size, config.ffn_dim)  # one layer, widened
    elif BYTES[dtype] > compute:
        activations += compute * count_parameters(config).total  # autocast's copies, until the call is over
    return [
        Component("teacher weights", total, what, phase),
        Component("gathered blocks", gathered, "of the teacher, two", "answering"),
        Component(
            "teacher activations",
            activations,
            f"the inside of one block, {workload.teacher_samples} samples of {image} tokens",
            "answering",
        ),
        *_feature_components(workload, activations),
    ]


def _feature_components(workload: Workload, activations: int) -> list[Component]:
    """Return the hidden states that are compared, in float32, what the error of each layer keeps, and what the teacher has of them.

    Args:
        activations: bytes of the inside of one of the teacher's blocks.
    """
    if not workload.num_features:
        return []
    per_channel = workload.num_features * workload.batch_size * num_image_tokens(workload.teacher, workload.latent_size)
    width = workload.teacher.hidden_size if workload.maps_features else workload.student.hidden_size
    targets = per_channel * width * FP32
    whole = per_channel * workload.teacher.hidden_size * FP32
    copies = 3 if workload.maps_features else 1  # of the difference; mapped, also of what was mapped and its rounding
    errors = per_channel * width * (copies * FP32 + 1)  # and the mask, a byte each
    # The teacher's are whole until it has answered. Those of two experts, or with and without guidance, are copied together: at
    # most while the second one answers all states but one.
    moments = [activations + whole]
    if workload.num_experts > 1 or (workload.uses_guidance and workload.guided_share < 1):
        others = (workload.batch_size - 1) / workload.batch_size
        moments.append(whole + round(others * (activations + whole)))
    if not workload.maps_features:
        moments.append(whole + targets)
    layers = f"of {workload.num_features} layers"
    stored = _stored_feature_bytes(workload)
    return [
        Component("stored features", stored, f"hidden states {layers} to learn from again, bf16"),
        Component("feature targets", targets, f"hidden states {layers}, fp32"),
        Component("whole features", max(moments) - activations - targets, "all channels of the teacher's", "answering"),
        Component("feature errors", errors, f"differences and masks {layers}", "learning"),
    ]


def _stored_feature_bytes(workload: Workload) -> int:
    """Return the bytes of hidden states that are kept to be learnt from again."""
    num_answers = workload.replayed_batches * workload.global_batch_size
    width = workload.teacher.hidden_size if workload.maps_features else workload.student.hidden_size
    tokens = num_image_tokens(workload.teacher, workload.latent_size)
    return feature_bytes(num_answers, workload.num_features, (tokens, width)) // workload.num_processes


def _student_components(workload: Workload) -> list[Component]:
    """Return everything of the student that is trained, and its activations in one forward and backward pass."""
    config, count = workload.student, count_parameters(workload.student)
    parts = workload.num_processes if workload.shard_student else 1
    own = math.ceil(count.total / parts)
    split = f", split over {parts}" if parts > 1 else ""
    phase = "learning" if workload.offline_teacher else ""
    compute = BYTES[workload.dtype]
    image = num_image_tokens(config, workload.latent_size)
    activations = workload.batch_size * training_bytes(
        config, image, workload.text_tokens, compute, workload.gradient_checkpointing, workload.is_gpu
    )
    last = workload.batch_size * training_bytes(
        config.replace(depth=1), image, workload.text_tokens, compute, is_gpu=workload.is_gpu
    )
    kept = "one block's, and every block's input" if workload.gradient_checkpointing else "all blocks'"
    moments = (
        "muon's one of matrices in blocks, adamw's two of the rest"
        if workload.optimizer == "muon"
        else f"{workload.optimizer}'s two"
    )
    return [
        Component("student weights", own * FP32, f"{count.total:,} parameters, fp32{split}", phase),
        Component("gradients", own * FP32, f"fp32{split}", phase if workload.keeps_gradients else "updating"),
        Component("optimizer moments", math.ceil(moment_bytes(workload) / parts), moments + split, phase),
        Component("average of weights", own * FP32 if workload.ema else 0, f"fp32{split}", phase),
        Component("weights to compute with", _compute_copies(workload, activations), f"{workload.dtype}", "learning"),
        Component("orthogonalisation", _orthogonalization_bytes(workload), "of the largest matrix", "updating"),
        Component(
            "student activations",
            activations,
            f"{kept}, {workload.batch_size} samples of {image} tokens",
            "learning",
        ),
        Component("last activations", last, "of the last block of the backward pass", "updating"),
    ]


def _compute_copies(workload: Workload, activations: int) -> int:
    """Return the bytes of autocast's copies of the student's weights; sharded ones are gathered besides, in float32, two blocks at a time.

    Autograd keeps the copies with the activations. With checkpointing they are gone after the forward pass, where little but
    every block's input is there beside them; the backward pass makes those of one block at a time.
    """
    config, count, compute = workload.student, count_parameters(workload.student), BYTES[workload.dtype]
    gathered = FP32 * (count.total - (config.depth - 2) * count.block) if workload.shard_student else 0
    if compute == FP32:
        return gathered
    copies = compute * (count.total - count.float32)
    if not workload.gradient_checkpointing:
        return gathered + copies
    image = num_image_tokens(config, workload.latent_size)
    inputs = config.depth * block_input_bytes(config, image, compute)
    in_forward = inputs + inference_bytes(config, image, workload.text_tokens, compute)
    return gathered + max(compute * count.block, copies - (activations - workload.batch_size * in_forward))


def moment_bytes(workload: Workload) -> int:
    """Return the bytes of the optimiser's moments, over all processes that share them."""
    count = count_parameters(workload.student)
    matrices = workload.student.depth * count.block_matrices if workload.optimizer == "muon" else 0
    return MOMENT_BYTES[workload.optimizer] * count.total - FP32 * matrices


def _orthogonalization_bytes(workload: Workload) -> int:
    """Return the bytes of Muon's update of the largest matrix: the update, gathered where it is sharded, and what is multiplied."""
    if workload.optimizer != "muon":
        return 0
    rows, columns = max(count_parameters(workload.student).matrix_shapes, key=math.prod)
    updates = FP32 * rows * columns * (2 if workload.shard_student else 1)
    return updates + 2 * BYTES[workload.dtype] * (rows * columns + min(rows, columns) ** 2)


def _states(workload: Workload) -> Component:
    # A stored answer has a state and a velocity.
    per_sample = workload.stored_latents + 2 * workload.replayed_batches
    num_latents = per_sample * workload.batch_size * workload.grad_accum_steps
    return Component("training states", num_latents * workload.latent_bytes, f"{num_latents} latents, fp32")


# ---- disk ----


def checkpoint_bytes(workload: Workload) -> int:
    """Return the bytes of one checkpoint: weights, their average and the optimiser's moments, and the training states."""
    weights = (2 if workload.ema else 1) * FP32 * count_parameters(workload.student).total
    states = _states(workload).num_bytes + _stored_feature_bytes(workload)
    return weights + moment_bytes(workload) + workload.num_processes * states


def disk_budget(workload: Workload) -> list[Component]:
    """Return the bytes that the run writes, whatever is there already."""
    keep, num_prompts = workload.keep_checkpoints, workload.num_prompts
    total = count_parameters(workload.student).total
    cache = num_prompts * workload.mean_text_tokens * workload.teacher.text_encoder_output_dim * BYTES[workload.dtype]
    answers = 2 * workload.teacher_cache_batches * workload.global_batch_size * workload.latent_bytes // 2
    parts = [
        Component("student", total * FP32, f"{total:,} parameters, fp32"),
        Component(
            "checkpoints", (keep + 1) * checkpoint_bytes(workload) if keep else 0, f"{keep} and one being written"
        ),
        Component(
            "prompt cache", round(cache), f"{num_prompts:,} prompts of about {workload.mean_text_tokens:.0f} tokens"
        ),
        Component(
            "teacher cache", answers, f"{workload.teacher_cache_batches:,} batches: latents and velocities, fp16"
        ),
        Component(
            "held-out states",
            2 * workload.held_out.num_kept * workload.latent_bytes,
            f"{workload.held_out.num_kept}, that a resumed run measures at: latents and velocities, fp32",
        ),
    ]
    return [part for part in parts if part.num_bytes]


# ---- computing ----


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one GPU in one optimiser step, on average."""

    teacher: float
    student_forward: float
    student_backward: float
    recompute: float  # of gradient checkpointing
    orthogonalization: float  # of Muon, all of it in every process

    @property
    def total(self) -> float:
        student = self.student_forward + self.student_backward + self.recompute
        return self.teacher + student + self.orthogonalization


def step_flops(workload: Workload) -> StepFlops:
    """Count the FLOPs of a step: guidance is two forward passes of the teacher, a cached or replayed answer costs none."""
    passes = workload.grad_accum_steps
    teacher, student = _flops_of_an_answer(workload)
    forward = passes * workload.batch_size * student
    return StepFlops(
        teacher=passes * workload.calls_per_step * workload.batch_size * teacher,
        student_forward=forward,
        student_backward=BACKWARD_PASSES * forward,
        recompute=forward if workload.gradient_checkpointing else 0,
        orthogonalization=_orthogonalization_flops(workload.student) if workload.optimizer == "muon" else 0,
    )


def held_out_flops(workload: Workload) -> float:
    """Count the FLOPs that measuring the student takes of one GPU over the whole run."""
    teacher, student = _flops_of_an_answer(workload)
    return workload.held_out.teacher * teacher + workload.held_out.student * student


def _flops_of_an_answer(workload: Workload) -> tuple[float, float]:
    """Return the FLOPs of the teacher's answer to one prompt, which guidance makes two forward passes, and of the student's."""
    asked = workload.teacher, num_image_tokens(workload.teacher, workload.latent_size), workload.text_tokens
    share = workload.guided_share if workload.uses_guidance else 0.0
    guided = guided_flops(*asked, workload.negative_text_tokens + 1) if share else 0
    teacher = share * guided + (1 - share) * transformer_flops(*asked) if share < 1 else guided
    student = transformer_flops(
        workload.student, num_image_tokens(workload.student, workload.latent_size), workload.text_tokens
    )
    return teacher, student


def _orthogonalization_flops(config: StudentConfig) -> int:
    """Count the products of Newton and Schulz's iteration: the Gram matrix of the shorter side, its square, and back."""
    sides = [sorted(shape) for shape in count_parameters(config).matrix_shapes]
    one_step = sum(2 * (2 * short * short * long + short**3) for short, long in sides)
    return config.depth * NEWTON_SCHULZ_STEPS * one_step
