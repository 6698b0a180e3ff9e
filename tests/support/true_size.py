"""A training step at the true size of a released Wan, on tensors that have shapes and no memory.

`step_memory(workload)` lets the trainer's own parts take two steps: the teacher's guided answer, the student's forward and
backward pass, clipping, the optimiser, the average. torch's MemTracker counts the bytes that would have been there at once.

Weights and all that is computed with them are fake CPU tensors, since autograd and autocast work with these; the bookkeeping of
noise levels, slots and prompts is real. Kernels are the CPU's but for RMSNorm, which `gpu_norms` makes the GPU's.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from wandistiller.budget.workload import Workload
from wandistiller.device import DTYPES
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.sizes import sides, unfilled_model
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes
from wandistiller.projection.selection import spread_layers
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.feature_loss import FeatureLoss, span_ends
from wandistiller.training.loop import Observer, Saving, TrainingOptions, _Loop
from wandistiller.training.objective import Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import RunState
from wandistiller.training.stop import StopRequest
from wandistiller.walk.batches import Batches, Schedule
from wandistiller.walk.store import Store
from wandistiller.walk.walk import States, Walk, WalkOptions
from wandistiller.wan.mock import mock_wan_files
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import resolve_settings

NUM_PROMPTS = 64


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


@contextlib.contextmanager
def numbers_of_nothing() -> Iterator[None]:
    """Let fake tensors be read by the host: every number is 1."""
    with mock.patch.object(FakeTensor, "tolist", lambda tensor: np.ones(tensor.shape).tolist()):
        yield


# ---- counting ----


class StepMemory(MemTracker):
    """torch's tracker without its table of modules, which takes ten times as long, and with the peak of each phase."""

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self.mode = mode
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

    def _pre_fw_hook(self, *args) -> None:
        """Note nothing."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

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


def build_batches(workload: Workload, mode: FakeTensorMode, student: WanLiteStudent) -> tuple[Batches, Teacher]:
    """Build the batches of the default states, with the hidden states that the workload compares."""
    names = ("high", "low")[: workload.num_experts]
    experts = {name: filled(_unfilled_teacher(workload), mode) for name in names}
    text_dim = workload.teacher.text_encoder_output_dim
    settings = resolve_settings(mock_wan_files(workload.student), shift=5.0, guidance_scale=5.0)
    if workload.num_experts > 1:
        settings = replace(settings, guidance_scale_2=4.0, boundary_ratio=0.875)
    teacher = Teacher(
        experts,
        settings,
        torch.zeros(workload.negative_text_tokens, text_dim),
        "cpu" if workload.teacher_offload else None,
    )
    text = torch.zeros(math.ceil(workload.mean_text_tokens), text_dim)
    embeds = PromptEmbeds(NUM_PROMPTS, text_dim, lambda index: text)
    depth = workload.teacher.depth
    is_compared = workload.num_features > 0
    options = WalkOptions(
        key=(0, 0),
        latent_shape=(workload.student.num_channels, *sides(workload.latent_size)),
        num_prompts=NUM_PROMPTS,
        num_slots=workload.global_batch_size,
        batch_size=workload.global_batch_size,
        shift=settings.shift,
        num_steps=settings.num_inference_steps,
        renoise_fraction=0.25,
        layers=span_ends(spread_layers(depth, workload.student.depth), depth) if is_compared else (),
        channels=range(workload.student.hidden_size) if is_compared and not workload.maps_features else None,
        compute_dtype=DTYPES[workload.dtype],
    )
    slots = range(workload.batch_size * workload.grad_accum_steps)
    schedule = Schedule(2, replay=1)
    store = Store(schedule.capacity, slots, workload.global_batch_size, options.key)
    store.keeps_features = lambda *shape: False  # a run has room for few of them, and the budget counts those
    walk = Walk(teacher, student, embeds, options, slots)
    return Batches([(walk, store)], [schedule], embeds, workload.batch_size), teacher


def _unfilled_teacher(workload: Workload) -> WanLiteStudent:
    is_fp8 = workload.teacher_dtype == "fp8"
    model = unfilled_model(workload.teacher, DTYPES[workload.dtype if is_fp8 else workload.teacher_dtype])
    return (to_fp8(model) if is_fp8 else model).requires_grad_(False)


def build_trained(workload: Workload, mode: FakeTensorMode) -> TrainedStudent:
    """Build what is trained: the student, with the maps of its hidden states where it has none of the teacher's channels."""
    student = filled(unfilled_model(workload.student, torch.float32), mode).train()
    student.gradient_checkpointing = workload.gradient_checkpointing
    feature_loss = None
    if workload.num_features:
        with torch.device("meta"):
            widths = workload.student.hidden_size, workload.teacher.hidden_size
            feature_loss = FeatureLoss(*widths, workload.num_features, workload.maps_features)
        feature_loss = filled(feature_loss, mode)
    dtype = DTYPES[workload.dtype]
    objective = Objective(feature_loss=feature_loss, feature_weight=1.0, compute_dtype=dtype)
    return TrainedStudent(student, objective)


def step_memory(workload: Workload) -> dict[str, dict[str, int]]:
    """Return the bytes by kind at the peak of each phase of a step: "answering", "learning" and "updating".

    Kinds are torch's; "Other" is the average of weights and the training states. Where processes are many, this is the first one.
    """
    mode = fake_mode()
    memory = StepMemory(mode)
    with process_group(workload.num_processes) as processes:
        trained = build_trained(workload, mode)
        batches, teacher = build_batches(workload, mode, trained.student)
        if workload.shard_teacher:
            for expert in teacher.experts.values():
                processes.shard(expert)
        if workload.shard_student:
            processes.shard(trained.student)
            processes.shard(trained.feature_loss)
        options = OptimizationOptions(lr=1e-6, optimizer=workload.optimizer, ema_decay=0.999 if workload.ema else 0.0)
        # Without sharding DistributedDataParallel would average gradients, and keep them all the time: they are its buckets.
        learning = processes if workload.shard_student else Processes("cpu")
        run = RunState(trained, batches, options, 2, learning)
        training = TrainingOptions(batch_size=workload.batch_size, num_steps=2, optimization=options)
        loop = _Loop(trained, batches, training, Observer(), Saving(None, run), learning)
        with mode:
            _take_an_update(run)
        _track_what_is_there(memory, run, teacher, workload)
        _mark_phases(memory, batches, run)
        _keep_bookkeeping_real(mode, batches, teacher)
        with mode, memory, numbers_of_nothing(), gpu_norms() if workload.is_gpu else contextlib.nullcontext():
            loop._take_step(1, StopRequest())
    return memory.peaks


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


def _take_an_update(run: RunState) -> None:
    """Make the optimiser's state, as a first step would."""
    for weight in run.trained.parameters():
        weight.grad = torch.zeros_like(weight)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def _track_what_is_there(memory: StepMemory, run: RunState, teacher: Teacher, workload: Workload) -> None:
    experts = list(teacher.experts.values())[: 1 if workload.teacher_offload else None]
    walk, _ = run.batches.sources[0]
    stored = [value for value in vars(walk).values() if isinstance(value, Tensor)]
    averages = list(run.average.weights.values()) if run.average else []
    memory.track_external(run.trained, *experts, run.optimizer, *stored, *averages)
    if workload.keeps_gradients and not workload.shard_student:
        for weight in run.trained.parameters():
            weight.grad = torch.zeros_like(weight)
        memory.track_external(run.trained)
        run.optimizer.zero_grad = lambda set_to_none: None


def _mark_phases(memory: StepMemory, batches: Batches, run: RunState) -> None:
    walk, _ = batches.sources[0]
    walk.ask = _between(lambda: memory.begin("answering"), walk.ask, lambda: memory.begin("learning"))
    run.update = _between(lambda: memory.begin("updating"), run.update, lambda: memory.begin(None))


def _between(before: Callable[[], None], work: Callable, after: Callable[[], None]) -> Callable:
    def wrapped(*args):
        before()
        result = work(*args)
        after()
        return result

    return wrapped


def _keep_bookkeeping_real(mode: FakeTensorMode, batches: Batches, teacher: Teacher) -> None:
    """Let what decides by values have values: which states are drawn, and which expert answers them."""
    (walk, store), text = batches.sources[0], batches.prompt_embeds
    if "low" in teacher.experts and teacher.offloaded is None and walk.options.layers:
        # Hidden states of two experts are most where the second one answers all states but one.
        walk._states = _with_levels(walk._states)
    for owner, name in ((walk, "ask"), (store, "add"), (store, "sample"), (text, "batch")):
        setattr(owner, name, unset_fake_temporarily()(getattr(owner, name)))
    teacher._guided = _inside(mode, teacher._guided)


def _with_levels(states_of: Callable[..., States]) -> Callable[..., States]:
    def changed(*args) -> States:
        states = states_of(*args)
        sigma = torch.full_like(states.sigma, 0.5)
        sigma[0] = 1.0
        return replace(states, sigma=sigma)

    return changed


def _inside(mode: FakeTensorMode, work: Callable) -> Callable:
    def wrapped(*args):
        with mode:
            return work(*args)

    return wrapped
