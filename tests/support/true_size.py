"""A training step at the true size of a released Wan, on tensors that have shapes and no memory.

`step_memory(workload)` takes a step with the trainer's own parts: the teacher's guided answer, the student's forward and backward pass,
clipping, the optimiser, the average. torch's MemTracker counts the bytes that would have been there at once.

Weights and all that is computed with them are fake CPU tensors, since autograd and autocast work with these; noise levels are real.
Kernels are the CPU's but for RMSNorm, which `gpu_norms` makes the GPU's.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed._tools.mod_tracker import ModTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from wandistiller.budget.workload import Workload
from wandistiller.device import DTYPES, autocast
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.sizes import sides, unfilled_model
from wandistiller.processes import Processes
from wandistiller.projection.selection import spread_layers
from wandistiller.sampling.streaming import StreamedBlocks, num_rooms
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.objective import FeatureLoss, Objective, TrainedStudent, span_ends
from wandistiller.training.optimizer import OptimizationOptions, WeightAverage, make_optimizers
from wandistiller.walk.batches import Batch
from wandistiller.wan.settings import resolve_settings
from wandistiller.wan.wan_files import mock_wan_files

# ---- tensors without memory ----


def fake_mode() -> FakeTensorMode:
    """Fake tensors that meet real ones, such as tables of positions, which are small."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def filled(model: nn.Module, mode: FakeTensorMode, device: str = "cpu") -> nn.Module:
    """Give a model on the meta device fake memory; `to_empty` cannot."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = FakeTensor(mode, torch.empty_like(parameter, device="meta"), torch.device(device))
                module._parameters[name] = nn.Parameter(there, parameter.requires_grad)
    return model


class _GpuRmsNorm(torch.autograd.Function):
    """RMSNorm as a GPU has it: one kernel, which keeps its input and a number for each token."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextlib.contextmanager
def gpu_norms() -> Iterator[None]:
    """Let RMSNorm take the memory that it takes on a GPU; the CPU has it in parts."""
    with mock.patch.object(F, "rms_norm", lambda x, shape, weight, eps: _GpuRmsNorm.apply(x, weight)):
        yield


# ---- counting ----


class NoModules(ModTracker):
    """Tells of backward passes alone: a table of modules takes ten times as long, and its hooks hold on to gradients.

    A block's gradient would stay until those of the inputs that all blocks share are there.
    """

    def __enter__(self) -> "NoModules":
        return self

    def __exit__(self, *args) -> None:
        """Take no hook away."""


class StepMemory(MemTracker):
    """torch's tracker with the peak of each phase."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode, self._mod_tracker = mode, NoModules()
        self.peaks: dict[str, dict[str, int]] = {}
        self._phase: str | None = None

    @property
    def _fake_mode_on_entry(self) -> FakeTensorMode | None:
        """The tracker leaves out what runs in another mode than this, as DTensor's propagation of shapes does."""
        current = active_fake_mode()
        return current if current is None else self.mode

    @_fake_mode_on_entry.setter
    def _fake_mode_on_entry(self, mode: FakeTensorMode | None) -> None:
        """Bookkeeping that is real runs without the mode, and counts too."""

    def begin(self, phase: str | None) -> None:
        """End the phase before, of which the bytes by kind are kept at the moment when they were most, and begin another."""
        if self._phase is not None:
            (snapshot,) = self.get_tracker_snapshot("peak").values()
            found = {getattr(kind, "value", kind): num_bytes for kind, num_bytes in snapshot.items()}
            if found["Total"] >= self.peaks.get(self._phase, {"Total": 0})["Total"]:
                self.peaks[self._phase] = found
        self._phase = phase
        self._peak_mem_snap = self.get_tracker_snapshot()
        self._peak_mem = {device: snapshot["Total"] for device, snapshot in self._peak_mem_snap.items()}


# ---- a step ----


def build_teacher(workload: Workload, mode: FakeTensorMode) -> Teacher:
    is_fp8 = workload.teacher_dtype == "fp8"
    experts = {}
    for name in ("high", "low")[: workload.num_experts]:
        model = unfilled_model(workload.teacher, DTYPES[workload.dtype if is_fp8 else workload.teacher_dtype])
        experts[name] = filled((to_fp8(model) if is_fp8 else model).requires_grad_(False), mode)
    settings = resolve_settings(mock_wan_files(workload.student), shift=5.0, guidance_scale=5.0)
    if workload.num_experts > 1:
        settings = replace(settings, guidance_scale_2=4.0, boundary_ratio=0.875)
    negative = torch.zeros(workload.negative_text_tokens, workload.teacher.text_encoder_output_dim)
    teacher = Teacher(experts, settings, negative)
    teacher.streamed = None
    if workload.teacher_offload:
        with mode:
            rooms = num_rooms(workload.teacher_offload, workload.teacher.depth)
            teacher.streamed = StreamedBlocks(experts, "cpu", rooms)
    guided = teacher._guided

    def within(*args):
        with mode:  # which expert answers is decided by values, outside
            return autocast(guided, "cpu", DTYPES[workload.dtype])(*args)

    teacher._guided = within
    return teacher


def build_trained(workload: Workload, mode: FakeTensorMode) -> TrainedStudent:
    """Build what is trained: the student, with the maps of its hidden states."""
    student = filled(unfilled_model(workload.student, torch.float32), mode).train()
    student.gradient_checkpointing = workload.gradient_checkpointing
    feature_loss = None
    if workload.num_features:
        with torch.device("meta"):
            feature_loss = FeatureLoss(workload.student.hidden_size, workload.num_features)
        feature_loss = filled(feature_loss, mode)
    objective = Objective(feature_loss=feature_loss, feature_weight=1.0, compute_dtype=DTYPES[workload.dtype])
    return TrainedStudent(student, objective)


def answer(workload: Workload, teacher: Teacher) -> Batch:
    """Let the teacher answer a micro-batch, of two experts the second one all states but one: hidden states are most then."""
    config, count, depth = workload.student, workload.batch_size, workload.teacher.depth
    num_tokens = math.ceil(workload.mean_text_tokens)
    sigma = torch.full((count,), 1.0 if workload.num_experts > 1 and workload.teacher_offload else 0.5)
    sigma[0] = 1.0
    inputs = {
        "latents": torch.zeros(count, config.num_channels, *sides(workload.latent_size)),
        "sigma": sigma,
        "prompt_embeds": torch.zeros(count, num_tokens, config.text_encoder_output_dim),
        "prompt_lengths": torch.full((count,), num_tokens),
    }
    layers = span_ends(spread_layers(depth, config.depth), depth) if workload.num_features else ()
    velocity, features = teacher.velocity_and_features(*inputs.values(), layers)
    features = tuple(state[..., : config.hidden_size].contiguous() for state in features)
    return Batch(**inputs, velocity=velocity, features=features)


def step_memory(workload: Workload) -> dict[str, dict[str, int]]:
    """Return the bytes by kind at the peak of each phase of a step: "answering", "learning" and "updating".

    Kinds are torch's; "Other" is the average of weights. Where processes are many, this is the first one.
    """
    mode, count = fake_mode(), workload.grad_accum_steps
    memory, options = StepMemory(mode), OptimizationOptions(lr=1e-6, optimizer=workload.optimizer)
    with process_group(workload.num_processes) as processes:
        trained, teacher = build_trained(workload, mode), build_teacher(workload, mode)
        for expert in teacher.experts.values() if workload.shard_teacher else ():
            processes.shard(expert)
        if workload.shard_student:
            processes.shard(trained.student)
            processes.shard(trained.feature_loss)
        optimizers = make_optimizers(trained, options, "cpu", DTYPES[workload.dtype])
        average = WeightAverage(trained.student, 0.999) if workload.ema else None
        stays = workload.keeps_gradients and not workload.shard_student
        with mode:  # makes the optimiser's state, as a first step would
            set_gradients(trained)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        memory.track_external(
            trained, *resident_parts(teacher), *optimizers, *(average.weights.values() if average else ())
        )
        if stays:  # averaging among processes, or over micro-batches, keeps them all the time
            set_gradients(trained)
            memory.track_external(trained)
        with mode, memory, gpu_norms() if workload.is_gpu else contextlib.nullcontext():
            for _ in range(count):
                memory.begin("answering")
                batch = unset_fake_temporarily()(answer)(workload, teacher)
                memory.begin("learning")
                loss = trained(batch, 0.0)
                (loss.total / count).backward()
                del batch, loss
            memory.begin("updating")
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if not stays:
                optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update()
            memory.begin(None)
    return memory.peaks


def resident_parts(teacher: Teacher) -> list[nn.Module]:
    """Return what is on the device of a teacher: all of it, or the rooms for its blocks with what is in none."""
    if teacher.streamed is None:
        return list(teacher.experts.values())
    weights = [named for expert in teacher.experts.values() for named in expert.named_parameters()]
    rest = [weight for name, weight in weights if not name.startswith("blocks.")]
    return [nn.ParameterList([*rest, *(nn.Parameter(room, requires_grad=False) for room, _ in teacher.streamed.rooms)])]


def set_gradients(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)


@contextlib.contextmanager
def process_group(count: int) -> Iterator[Processes]:
    """Join a group of so many processes of which there is only the first, and whose collectives send nothing."""
    if count == 1:
        yield Processes("cpu")
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield Processes("cpu", 0, count)
    finally:
        dist.destroy_process_group()
