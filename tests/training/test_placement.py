"""Everything that a run does without gradients, on a GPU that computes nothing (support/fake_gpu.py).

A tensor on the wrong device ends a run with torch's own error. A step may make the host wait once; the message names any other line.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from support.fake_gpu import FakeGpu, fake_gpu
from support.true_size import filled
from wandistiller.device import to_device
from wandistiller.evaluation.held_out import PathErrors, draw_path_states
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.sizes import unfilled_model
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.sampler import SamplingOptions, StudentField, sample_in_batches
from wandistiller.sampling.streaming import StreamedBlocks
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.loop import Observer, train
from wandistiller.training.objective import FeatureLoss, Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.training.state import RunState, TrainingOptions
from wandistiller.walk.batches import Batches, Schedule
from wandistiller.walk.grids import segment_grids
from wandistiller.walk.segments import SegmentTeacher
from wandistiller.walk.store import Store
from wandistiller.walk.walk import Walk, WalkOptions
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.settings import TeacherSettings, resolve_settings
from wandistiller.wan.wan_files import mock_wan_files

GPU = "cuda:0"  # a GPU without a number would be asked for it
TEXT_DIM = 16
BOUNDARY = 0.875
SHAPE = {"block": "wan", "num_channels": 16, "image_size": 64, "text_encoder_output_dim": TEXT_DIM, "freq_dim": 32}
TEACHER = StudentConfig(hidden_size=48, depth=3, num_heads=2, ffn_dim=64, **SHAPE)
STUDENT = StudentConfig(hidden_size=24, depth=1, num_heads=1, ffn_dim=32, **SHAPE)
LITE = StudentConfig(**SHAPE | {"block": "lite", "hidden_size": 24, "depth": 1, "num_heads": 2})
LATENTS = (16, 8, 8)
EMBEDS = mock_prompt_embeds(["a red cube", "a dog", "two cats on a mat", "rain", "a blue ball"], TEXT_DIM)
NUM_SLOTS, NUM_STEPS = 4, 6  # every path jumps first, then they end one after another


def settings(num_experts: int, num_steps: int = 6) -> TeacherSettings:
    about = resolve_settings(mock_wan_files(STUDENT), shift=5.0, guidance_scale=5.0)
    about = replace(about, num_inference_steps=num_steps)
    return about if num_experts == 1 else replace(about, guidance_scale_2=3.0, boundary_ratio=BOUNDARY)


def make_teacher(gpu: FakeGpu, num_experts: int = 1, rooms: int = 0, is_fp8: bool = False) -> Teacher:
    place = "cpu" if rooms else GPU
    models = [unfilled_model(TEACHER, torch.float32) for _ in range(num_experts)]
    experts = [filled(to_fp8(model) if is_fp8 else model, gpu.mode, place) for model in models]
    named = dict(zip(("high", "low"), experts, strict=False))
    negative = torch.randn(5, TEXT_DIM)
    teacher = Teacher(named, settings(num_experts), negative)
    if rooms:
        StreamedBlocks(teacher.experts, GPU, rooms)
    return teacher


def make_student(gpu: FakeGpu, config: StudentConfig = STUDENT) -> WanLiteStudent:
    return filled(unfilled_model(config, torch.float32), gpu.mode, GPU)


class Steps(Observer):
    """Notes the waits of every step; what is waited for between steps it leaves out."""

    def __init__(self, gpu: FakeGpu):
        self.gpu, self.waits = gpu, []

    def step(self, metrics) -> None:
        self.waits.append(list(self.gpu.waits))
        self.gpu.waits.clear()


@contextlib.contextmanager
def gradients_of_nothing(model: torch.nn.Module):
    """Give every weight a gradient at the backward pass, which these tensors cannot have."""

    def backward(loss: Tensor) -> None:
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)

    with mock.patch.object(Tensor, "backward", backward):
        yield


def waits_of_steps(
    gpu: FakeGpu, student: WanLiteStudent, batches: Batches, has_features: bool = False
) -> list[list[str]]:
    """Train, and return the waits of each step but the first two, in which there is what is made at first use."""
    feature_loss = None
    if has_features:
        feature_loss = filled(FeatureLoss(24, 1).to("meta"), gpu.mode, GPU)
    objective = Objective(feature_loss=feature_loss, feature_weight=1.0, device=GPU)
    optimization = OptimizationOptions(lr=1e-3, optimizer="muon", ema_decay=0.9)
    steps, trained = Steps(gpu), TrainedStudent(student, objective)
    with gradients_of_nothing(trained):
        train(RunState(trained, batches, TrainingOptions(num_steps=NUM_STEPS, optimization=optimization)), steps)
    assert len(steps.waits) == NUM_STEPS
    return steps.waits[2:]


# ---- training ----


def make_batches(
    teacher: Teacher,
    student: WanLiteStudent,
    slots: range = range(NUM_SLOTS),
    replay: int = 1,
    micro_batch: int = 0,
    kept_on: str | None = None,
    **changes,
) -> Batches:
    """Batches of a walk whose paths are so short that they end within the steps of a test."""
    values = {
        "key": (0, 0), "latent_shape": LATENTS, "num_prompts": len(EMBEDS), "num_slots": slots.stop, "batch_size": slots.stop,
        "shift": 5.0, "num_steps": 3, "boundary": BOUNDARY if "low" in getattr(teacher, "experts", ()) else None, "device": GPU,
    }  # fmt: skip
    walk = Walk(teacher, EMBEDS, WalkOptions(**values | changes), slots)
    schedule = Schedule(NUM_STEPS, replay)
    store = Store(schedule.capacity, slots, slots.stop, (0, 0), GPU, kept_on=kept_on)
    segments = [Store(NUM_STEPS, slots, slots.stop, (0, 1), GPU, kept_on=kept_on)]
    return Batches([(walk, store)], [schedule], EMBEDS, micro_batch or len(slots), GPU, segments)


RUNS: dict[str, tuple[dict, dict]] = {
    "one expert": ({}, {}),
    "a lite student": ({}, {"config": LITE, "replay": 2}),
    "two experts in turns": ({"num_experts": 2, "rooms": 3}, {"calls_per_expert": 1}),
    "blocks, answers on the host": ({"rooms": 2, "is_fp8": True}, {"kept_on": "cpu"}),
    "two experts in parts": ({"num_experts": 2}, {"micro_batch": 2}),
    "blocks of two experts": ({"num_experts": 2, "rooms": 2}, {}),
    "segments of its paths": ({}, {"segment_ends": (1.0, 0.8, 0.0)}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_stays_on_the_gpu_and_waits_for_it_once(name):
    of_teacher, of_states = RUNS[name][0], dict(RUNS[name][1])
    config = of_states.pop("config", STUDENT)
    has_features = config is STUDENT  # a lite student's tokens are not the teacher's
    with fake_gpu() as gpu:
        teacher, student = make_teacher(gpu, **of_teacher), make_student(gpu, config)
        batches = make_batches(
            teacher, student, **of_states, **({"layers": (0,), "channels": range(24)} if has_features else {})
        )
        for waits in waits_of_steps(gpu, student, batches, has_features):
            # The loss goes to the log, and nothing may be applied that is not finite. Answers kept on the host are waited for.
            others = [wait for wait in waits if not (of_states.get("kept_on") and wait.startswith("walk/store.py"))]
            assert len(others) == 1 and others[0].startswith("training/loop.py"), waits
    if "low" in teacher.experts and name != "two experts in turns":
        assert teacher.num_swaps > 0
    if rooms := of_teacher.get("rooms"):
        blocks = [block for expert in teacher.experts.values() for block in expert.blocks]
        assert sum(next(block.parameters()).device.type == "cuda" for block in blocks) == rooms


def test_a_step_of_the_second_stage_too():
    with fake_gpu() as gpu:
        grids, student = segment_grids(4, 2, 5.0), make_student(gpu)
        teacher = SegmentTeacher(StudentField(make_student(gpu)), grids)
        batches = make_batches(teacher, student, levels=(*grids[:, 0].tolist(), 0.0), num_steps=2)
        for waits in waits_of_steps(gpu, student, batches):
            assert len(waits) == 1 and waits[0].startswith("training/loop.py"), waits


# ---- sampling and measuring ----


OPTIONS = SamplingOptions(shift=5.0, num_inference_steps=4, device=GPU)


def test_sampling_and_measuring_stay_on_the_gpu():
    with fake_gpu() as gpu:
        teacher, student = make_teacher(gpu, num_experts=2), make_student(gpu)
        for who in (teacher, StudentField(student)):
            sample_in_batches(who, torch.randn(4, *LATENTS), EMBEDS, range(4), OPTIONS, 2)
        errors = PathErrors(draw_path_states(teacher, EMBEDS, LATENTS, OPTIONS), EMBEDS, OPTIONS, 2)
        errors(student)
        gpu.waits.clear()
        errors(student)
    assert len(gpu.waits) == 1, gpu.waits  # the error goes to the log


# ---- the GPU itself ----


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda there: float(there.sum()),
    "a truth": lambda there: bool((there > 0).all()),
    "values": lambda there: there.cpu(),
    "a mask": lambda there: there[there > 0],
    "an index on the host": lambda there: there[torch.tensor([0, 1])],
    "a copy that is not pinned": lambda there: torch.zeros(3).to(GPU, non_blocking=True),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fake_gpu_notices_what_makes_the_host_wait(name):
    with fake_gpu() as gpu:
        there = torch.empty(2, 3, device=GPU)
        assert there[to_device(torch.tensor([0, 1]), there.device)].shape == (2, 3) and gpu.waits == []
        with contextlib.suppress(DynamicOutputShapeException):
            FAULTS[name](there)
        assert len(gpu.waits) == 1
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.zeros(3)
        with pytest.raises(TypeError, match="float64"):
            there.double()
