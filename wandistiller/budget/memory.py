"""Bytes of one GPU, of the host and of the disk, by component: arithmetic on shapes.

    components = memory_budget(workload)
    print(peak_bytes(components))

tests/budget holds it against torch's MemTracker, benchmarks/bench_memory.py against a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wandistiller.budget.activations import block_input_bytes, inference_bytes, training_bytes
from wandistiller.budget.workload import FP32, Workload
from wandistiller.model.sizes import BYTES, count_parameters, weight_bytes
from wandistiller.processes import FILE_BYTES
from wandistiller.sampling.streaming import num_rooms, pinned_bytes
from wandistiller.walk.store import feature_bytes

# The CUDA context with its libraries, and what the allocator cannot use between tensors, are assumed, not measured.
CONTEXT_BYTES, FRAGMENTATION = 2**30, 0.05
# Of the host, assumed too: libraries alone, and with what CUDA maps
LIBRARY_BYTES, PROCESS_BYTES = 2**30, 4 * 2**30
# The text encoder is in memory alone. Then the teacher answers, then the student's activations are there; at the end of its
# backward pass, when they have gone, all gradients are there.
PHASES = ("encoding", "answering", "learning", "updating")


@dataclass(frozen=True)
class Component:
    """Some bytes of a GPU or host in one `phase` ("": in all but encoding), or of the disk in the folder of one flag."""

    name: str
    num_bytes: int
    what: str
    phase: str = ""


def memory_budget(workload: Workload) -> list[Component]:
    """Return the bytes of one GPU by component; those of one phase and those of no phase are there together."""
    encoder = workload.text_encoder_parameters * embeds_bytes(workload)
    parts = [
        *_teacher_components(workload),
        *_feature_components(workload),
        *_student_components(workload),
        _states(workload),
        Component("frozen student", _frozen_bytes(workload), f"{workload.dtype}, walks the segments of few steps"),
        Component("text encoder", encoder, "not at all if the prompt cache has every prompt", "encoding"),
    ]
    parts = [part for part in parts if part.num_bytes]
    if workload.is_gpu:
        reserve = CONTEXT_BYTES + round(FRAGMENTATION * peak_bytes(parts))
        return [
            *parts,
            Component("reserve", reserve, f"assumed: CUDA context, and {FRAGMENTATION:.0%} for fragmentation"),
        ]
    libraries = [Component("reserve", LIBRARY_BYTES, "assumed: Python and torch", phase) for phase in ("", "encoding")]
    return [*parts, *libraries, *_streamed(workload, 1), *_written(workload, 1)]


def host_budget(workload: Workload) -> list[Component]:
    """Return the bytes of host memory that the processes of one machine take beside their GPUs."""
    count = workload.processes_per_machine
    encoder = count * workload.text_encoder_parameters * embeds_bytes(workload)
    parts = [
        *(Component("processes", count * PROCESS_BYTES, f"{count}, assumed", phase) for phase in ("", "encoding")),
        Component("text encoder", encoder, "on its way to the GPU", "encoding"),
        *_streamed(workload, count),
        Component(
            "stored answers", count * _stored_bytes(workload) if _keeps_on_host(workload) else 0, "and their states"
        ),
        *_written(workload, count),
    ]
    return [part for part in parts if part.num_bytes]


def _streamed(workload: Workload, num_processes: int) -> list[Component]:
    """Return the pinned host memory of the teacher's blocks."""
    if not workload.teacher_offload:
        return []
    pinned = workload.num_experts * pinned_bytes(workload.teacher.depth, block_bytes(workload))
    phase = "answering" if workload.offline_teacher else ""
    return [Component("teacher blocks", num_processes * pinned, "of the teacher in host memory, pinned", phase)]


def _written(workload: Workload, num_processes: int) -> list[Component]:
    """Return the host memory of a checkpoint that is written: a file for each process, and a copy of all where training goes on."""
    if not workload.keep_checkpoints:
        return []
    size = checkpoint_bytes(workload)
    in_hand = min(size, num_processes * FILE_BYTES)
    if workload.teacher_offload:  # training waits
        return [Component("checkpoints", in_hand, "a file of one", "updating")]
    return [Component("checkpoints", in_hand + size, "a copy of one, and a file of it")]


def embeds_bytes(workload: Workload) -> int:
    """Return the bytes of a number of the text encoder and of its embeddings, whatever --dtype is."""
    return 2 if workload.is_gpu else FP32


def phase_bytes(components: Sequence[Component]) -> dict[str, int]:
    """Return the bytes that are there at once in each phase; the text encoder is alone."""
    always = sum(part.num_bytes for part in components if not part.phase)
    own = {phase: sum(part.num_bytes for part in components if part.phase == phase) for phase in PHASES}
    return {phase: own[phase] + (0 if phase == "encoding" else always) for phase in PHASES}


def peak_bytes(components: Sequence[Component]) -> int:
    return max(phase_bytes(components).values())


def training_peak_bytes(components: Sequence[Component]) -> int:
    """Return the peak after the text encoder has gone."""
    return max(num_bytes for phase, num_bytes in phase_bytes(components).items() if phase != "encoding")


def certain_bytes(workload: Workload) -> int:
    """Return the least bytes that the run can do with: what is there all the time, without the reserve and a second stage."""
    left_out = ("reserve", "frozen student")
    return sum(part.num_bytes for part in memory_budget(workload) if not part.phase and part.name not in left_out)


# ---- teacher ----


def _teacher_components(workload: Workload) -> list[Component]:
    config, dtype, experts = workload.teacher, workload.teacher_dtype, workload.num_experts
    one, block = weight_bytes(config, dtype), block_bytes(workload)
    total, gathered = experts * one, 0
    what = f"{experts} experts" if experts > 1 else "one transformer"
    what += f" of {count_parameters(config).total:,} parameters, {dtype} (norms, modulation, time: fp32)"
    if workload.teacher_offload:
        rooms = num_rooms(workload.teacher_offload, config.depth)
        total = experts * (one - config.depth * block) + rooms * block
        what += f"; room for {rooms} blocks, what is in none is there for good"
    if workload.shard_teacher:
        # FSDP2 leaves what is in no block gathered. A gathered block lies in the buffer that it came in, and in its weights.
        total = math.ceil(total / workload.num_shards) + experts * (one - config.depth * block)
        gathered = 2 * block
        what += f", split over {workload.num_shards}; outside of blocks whole"
    inside = f"the inside of one block, {_teacher_samples(workload)} samples of {workload.teacher_tokens} tokens"
    return [
        Component("teacher weights", total, what, "answering" if workload.offline_teacher else ""),
        Component("gathered blocks", gathered, "of the teacher, two", "answering"),
        Component("teacher activations", _teacher_activations(workload), inside, "answering"),
    ]


def block_bytes(workload: Workload) -> int:
    config, dtype = workload.teacher, workload.teacher_dtype
    return weight_bytes(config.replace(depth=2), dtype) - weight_bytes(config.replace(depth=1), dtype)


def _teacher_samples(workload: Workload) -> int:
    """Return the samples of one call: guidance asks with the prompt and with the negative prompt at once."""
    return workload.batch_size * (2 if workload.is_guided else 1)


def _teacher_activations(workload: Workload) -> int:
    config, compute = workload.teacher, BYTES[workload.dtype]
    text = max(workload.text_tokens, workload.negative_text_tokens + 1 if workload.is_guided else 0)
    activations = _teacher_samples(workload) * inference_bytes(config, workload.teacher_tokens, text, compute)
    if workload.teacher_dtype == "fp8":
        return activations + compute * config.hidden_size * max(
            config.hidden_size, config.ffn_dim
        )  # one layer, widened
    if BYTES[workload.teacher_dtype] > compute:
        return activations + compute * count_parameters(config).total  # autocast's copies, until the call is over
    return activations


def _feature_components(workload: Workload) -> list[Component]:
    """Return the hidden states that are compared, in float32, what the teacher has of them, and what their loss keeps."""
    if not workload.num_features:
        return []
    activations = _teacher_activations(workload)
    tokens = workload.num_features * workload.batch_size * workload.teacher_tokens
    width, whole = workload.student.hidden_size, FP32 * tokens * workload.teacher.hidden_size
    targets = FP32 * tokens * width
    # At the end of the forward pass: the difference and the mask of a byte. With checkpointing the most is there while a block is
    # recomputed, and then gradients alone have stayed of them. The maps' products are float32 whatever --dtype is.
    errors = tokens * width * (FP32 if workload.gradient_checkpointing else FP32 + 1)
    # The teacher's are whole until it has answered. Those of two experts are copied together: at
    # most while the second one answers all states but one.
    moments = [activations + whole, whole + targets]
    if workload.num_experts > 1:
        moments.append(whole + round((1 - 1 / workload.batch_size) * (activations + whole)))
    layers = f"of {workload.num_features} layers"
    stored = 0 if _keeps_on_host(workload) else _stored_feature_bytes(workload)
    return [
        Component("stored features", stored, f"{layers}, bf16, to learn from again"),
        Component("feature targets", targets, f"hidden states {layers}, fp32"),
        Component("whole features", max(moments) - activations - targets, "all channels of the teacher's", "answering"),
        Component("feature errors", errors, f"differences and masks {layers}", "learning"),
    ]


def _stored_feature_bytes(workload: Workload) -> int:
    if workload.stored_batches <= 1:
        return 0  # each answer is learnt from once, while it is fresh
    num_answers = workload.stored_batches * workload.global_batch_size
    shape = workload.teacher_tokens, workload.student.hidden_size
    return feature_bytes(num_answers, workload.num_features, shape) // workload.num_processes


# ---- student ----


def _student_components(workload: Workload) -> list[Component]:
    count, is_checkpointed = count_parameters(workload.student), workload.gradient_checkpointing
    parts = workload.num_shards if workload.shard_student else 1
    own, maps = FP32 * math.ceil(count.total / parts), math.ceil(_map_parameters(workload) / parts)
    split = f", split over {parts}" if parts > 1 else ""
    phase = "learning" if workload.offline_teacher else ""
    activations, last = _student_activations(workload), _student_activations(workload, depth=1)
    update = _orthogonalization_bytes(workload)
    samples = f"{workload.batch_size} samples of {workload.student_tokens} tokens"
    kept = ("one block's, and every block's input" if is_checkpointed else "all blocks'") + f", {samples}"
    moments = "muon's one of matrices in blocks, adamw's two of the rest"
    moments = moments if workload.optimizer == "muon" else f"{workload.optimizer}'s two"
    what = f"{count.total:,} parameters" + (" and maps of hidden states" if maps else "") + f", fp32{split}"
    return [
        Component("student weights", own + FP32 * maps, what, phase),
        Component("gradients", own + FP32 * maps, f"fp32{split}", phase if workload.keeps_gradients else "updating"),
        Component("optimizer moments", math.ceil(moment_bytes(workload) / parts), moments + split, phase),
        Component("average of weights", own if workload.ema else 0, f"EMA, fp32{split}", phase),
        Component("weights to compute with", _compute_copies(workload, activations), workload.dtype, "learning"),
        Component("student activations", activations, kept, "learning"),
        Component("orthogonalisation", update, "of the largest matrix", "updating"),
        # These have gone when the update begins:
        Component("last activations", max(0, last - update), "more, of the backward pass's last block", "updating"),
    ]


def _student_activations(workload: Workload, depth: int | None = None) -> int:
    config = workload.student.replace(depth=depth or workload.student.depth)
    checkpointing = workload.gradient_checkpointing and depth is None
    shape = workload.student_tokens, workload.text_tokens, BYTES[workload.dtype]
    return workload.batch_size * training_bytes(config, *shape, checkpointing, workload.is_gpu)


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
    inputs = config.depth * block_input_bytes(config, workload.student_tokens)
    in_forward = inputs + inference_bytes(config, workload.student_tokens, workload.text_tokens, compute)
    return gathered + max(compute * count.block, copies - (activations - workload.batch_size * in_forward))


def moment_bytes(workload: Workload) -> int:
    """Return the bytes of the optimizer's moments, over all processes that share them: AdamW has two, Muon one of its matrices."""
    count = count_parameters(workload.student)
    matrices = workload.student.depth * count.block_matrices if workload.optimizer == "muon" else 0
    return FP32 * (2 * (count.total + _map_parameters(workload)) - matrices)


def _map_parameters(workload: Workload) -> int:
    return workload.num_features * (workload.student.hidden_size + 1) * workload.student.hidden_size


def _frozen_bytes(workload: Workload) -> int:
    """Return the weights of the second stage's frozen student, which the first stage does not have yet."""
    if not workload.segment_passes:
        return 0
    whole = BYTES[workload.dtype] * count_parameters(workload.student).total
    return math.ceil(whole / workload.num_shards) if workload.shard_student else whole


def _orthogonalization_bytes(workload: Workload) -> int:
    """Return the bytes of Muon's update of the largest matrix: its mean, gathered where it is sharded, and what is multiplied.

    Several processes then have the updates of as many matrices.
    """
    if workload.optimizer != "muon":
        return 0
    rows, columns = max(count_parameters(workload.student).matrix_shapes, key=math.prod)
    size, compute, count = rows * columns, BYTES[workload.dtype], workload.num_processes
    updates = FP32 * size * (2 if count > 1 else 1)
    products = 2 * compute * (size + min(rows, columns) ** 2)
    return updates + max(products, compute * size * (count + 1) if count > 1 else 0)


def _states(workload: Workload) -> Component:
    stored = 0 if _keeps_on_host(workload) else workload.stored_batches + workload.stored_segments
    per_slot = workload.latents_per_slot + 2 * stored  # an answer has a state and a velocity
    num_latents = per_slot * workload.batch_size * workload.grad_accum_steps
    return Component("training states", num_latents * workload.latent_bytes, f"{num_latents} latents, fp32")


def _keeps_on_host(workload: Workload) -> bool:
    return workload.is_gpu and workload.teacher_offload == "blocks"


def _stored_bytes(workload: Workload) -> int:
    """Return the bytes of one process's answers in memory: states, velocities and hidden states."""
    stored = workload.stored_batches + workload.stored_segments
    num_latents = 2 * stored * workload.batch_size * workload.grad_accum_steps
    return num_latents * workload.latent_bytes + _stored_feature_bytes(workload)


# ---- disk ----


def checkpoint_bytes(workload: Workload) -> int:
    """Return the bytes of one checkpoint: weights, their average, the frozen student, moments, maps and the training states."""
    weights = (2 if workload.ema else 1) * FP32 * count_parameters(workload.student).total
    if workload.segment_passes:
        weights += BYTES[workload.dtype] * count_parameters(workload.student).total
    weights += FP32 * _map_parameters(workload)
    walked = workload.latents_per_slot * workload.batch_size * workload.grad_accum_steps * workload.latent_bytes
    return weights + moment_bytes(workload) + workload.num_processes * (walked + _stored_bytes(workload))


def disk_budget(workload: Workload) -> list[Component]:
    """Return the bytes that the run writes, whatever is there already; `phase` is the flag of the folder."""
    keep, total = workload.keep_checkpoints, count_parameters(workload.student).total
    checkpoints = (keep + 1) * checkpoint_bytes(workload) if keep else 0
    tokens = workload.num_prompts * workload.mean_text_tokens
    embeds = round(tokens * workload.teacher.text_encoder_output_dim * embeds_bytes(workload))
    prompts = f"{workload.num_prompts:,} prompts of about {workload.mean_text_tokens:.0f} tokens"
    answers = workload.teacher_cache_batches * workload.global_batch_size * workload.latent_bytes  # two in fp16
    batches = f"{workload.teacher_cache_batches:,} batches: latents and velocities, fp16"
    parts = [
        Component("student", total * FP32, f"{total:,} parameters, fp32", "--output_dir"),
        Component("checkpoints", checkpoints, f"{keep} and one being written", "--output_dir"),
        Component("prompt cache", embeds, prompts, "--prompt_cache"),
        Component("teacher cache", answers, batches, "--teacher_cache"),
    ]
    return [part for part in parts if part.num_bytes]
