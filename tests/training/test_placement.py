"""Everything that a run does without gradients, on a GPU that computes nothing (support/fake_gpu.py).

A tensor on the wrong device ends a run with torch's own error. The host may wait for the GPU at the lines that are listed here,
each with its reason, and as often as is said; the message names any other.

pytest tests/training/test_placement.py
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from support.fake_gpu import FakeGpu, Wait, fake_gpu
from support.true_size import filled
from wandistiller.device import to_device
from wandistiller.evaluation.held_out import PathErrors, draw_path_states
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.sizes import unfilled_model
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.sampler import SamplingOptions, StudentField, sample_in_batches
from wandistiller.sampling.teacher import Teacher
from wandistiller.training.feature_loss import FeatureLoss
from wandistiller.training.loop import Observer, TrainingOptions, train
from wandistiller.training.objective import Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions
from wandistiller.walk.batches import Batches, Schedule
from wandistiller.walk.segments import SegmentOptions, SegmentWalk
from wandistiller.walk.store import Store
from wandistiller.walk.walk import Walk, WalkOptions
from wandistiller.wan.mock import mock_wan_files
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.settings import TeacherSettings, resolve_settings

GPU = "cuda:0"  # a GPU without a number would be asked for it
TEXT_DIM = 16
SHAPE = {"block": "wan", "num_channels": 16, "image_size": 64, "text_encoder_output_dim": TEXT_DIM, "freq_dim": 32}
TEACHER = StudentConfig(hidden_size=48, depth=1, num_heads=2, ffn_dim=64, **SHAPE)
STUDENT = StudentConfig(hidden_size=24, depth=1, num_heads=1, ffn_dim=32, **SHAPE)
LITE = StudentConfig(**SHAPE | {"block": "lite", "hidden_size": 24, "depth": 1, "num_heads": 2})
LATENTS = (16, 8, 8)
EMBEDS = mock_prompt_embeds(["a red cube", "a dog", "two cats on a mat", "rain", "a blue ball"], TEXT_DIM)
NUM_SLOTS, NUM_STEPS = 4, 8  # every path jumps first, then they end one after another
# Where the host is meant to wait: how often at most, and why.
Meant = dict[str, tuple[float, str]]
A_STEP: Meant = {
    "training/loop.py _measure": (1, "the loss goes to the log, and nothing may be applied that is not finite")
}
SAMPLING: Meant = {
    "sampling/sampler.py sample": (math.inf, "diffusers' UniPC brings a few numbers of its own there at each step")
}


def settings(num_experts: int, num_steps: int = 6) -> TeacherSettings:
    about = resolve_settings(mock_wan_files(STUDENT), shift=5.0, guidance_scale=5.0)
    about = replace(about, num_inference_steps=num_steps)
    return about if num_experts == 1 else replace(about, guidance_scale_2=3.0, boundary_ratio=0.875)


def make_teacher(
    gpu: FakeGpu,
    num_experts: int = 1,
    is_offloaded: bool = False,
    is_fp8: bool = False,
    guidance_range: tuple[float, float] | None = None,
) -> Teacher:
    place = "cpu" if is_offloaded else GPU
    models = [unfilled_model(TEACHER, torch.float32) for _ in range(num_experts)]
    experts = [filled(to_fp8(model) if is_fp8 else model, gpu.mode, place) for model in models]
    named = dict(zip(("high", "low"), experts, strict=False))
    negative = torch.randn(5, TEXT_DIM)
    about = replace(settings(num_experts), guidance_range=guidance_range)
    return Teacher(named, about, negative, GPU if is_offloaded else None)


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


def waits_of_steps(gpu: FakeGpu, student: WanLiteStudent, batches: Batches, has_maps: bool = False) -> list[list[Wait]]:
    """Train, and return the waits of each step but the first two, in which there is what is made at first use."""
    feature_loss = None
    if has_maps:
        feature_loss = filled(FeatureLoss(24, 48, 1, has_maps=True).to("meta"), gpu.mode, GPU)
    objective = Objective(feature_loss=feature_loss, feature_weight=1.0, device=GPU)
    options = TrainingOptions(
        batch_size=4,
        num_steps=NUM_STEPS,
        optimization=OptimizationOptions(lr=1e-3, optimizer="muon", ema_decay=0.9),
        device=GPU,
        boundary=0.875,
    )
    steps = Steps(gpu)
    with gradients_of_nothing(TrainedStudent(student, objective)):
        train(student, batches, objective, options, steps)
    assert len(steps.waits) == NUM_STEPS
    return steps.waits[2:]


def check(waits: list[Wait], meant: Meant) -> None:
    """Hold waits to the lines that are meant, and each of these to how often it may."""
    for place, count in Counter(wait.place for wait in waits).items():
        (first, *_) = [wait for wait in waits if wait.place == place]
        most, _ = meant.get(place, (0, ""))
        assert count <= most, f"{count} times, {most} of them meant: {first}"


# ---- training ----


def make_batches(
    teacher: Teacher,
    student: WanLiteStudent,
    slots: range = range(NUM_SLOTS),
    replay: int = 1,
    micro_batch: int = 0,
    **changes,
) -> Batches:
    """Batches of a walk whose paths are so short that they end within the steps of a test."""
    values = {
        "key": (0, 0), "latent_shape": LATENTS, "num_prompts": len(EMBEDS), "num_slots": slots.stop, "batch_size": slots.stop,
        "shift": 5.0, "num_steps": 4, "boundary": teacher.settings.boundary_ratio, "student_rollout": (0.5, 1.0), "device": GPU,
    }  # fmt: skip
    kind, made = (SegmentOptions, SegmentWalk) if "num_segments" in changes else (WalkOptions, Walk)
    walk = made(teacher, student, EMBEDS, kind(**values | changes), slots)
    schedule = Schedule(NUM_STEPS, replay, getattr(walk.options, "steps_per_segment", 1), walk.calls_before_first)
    store = Store(schedule.capacity, slots, slots.stop, (0, 0), GPU)
    return Batches([(walk, store)], [schedule], EMBEDS, micro_batch or len(slots), GPU)


RUNS: dict[str, tuple[dict, dict]] = {
    "one expert": ({}, {}),
    "two experts": ({"num_experts": 2}, {}),
    "two experts in turns": ({"num_experts": 2, "is_offloaded": True}, {"calls_per_expert": 1}),
    "fp8": ({"is_fp8": True}, {}),
    "renoised": ({}, {"renoise_fraction": 0.5, "num_steps": 2, "student_rollout": (0.0, 0.0)}),
    "two experts, renoised, in parts": ({"num_experts": 2}, {"renoise_fraction": 0.5, "micro_batch": 2}),
    "noise": ({"num_experts": 2}, {"kind": "noise"}),
    "guided at some noise levels": ({"guidance_range": (0.9, 1.0)}, {}),
    "one of two processes": ({}, {"slots": range(4, 8)}),
    "replayed": ({}, {"replay": 2}),
    "segments": ({}, {"num_segments": 2}),
    "segments, two experts": ({"num_experts": 2}, {"num_segments": 2}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_stays_on_the_gpu_and_waits_for_it_once(name):
    of_teacher, of_states = RUNS[name]
    has_maps = "num_segments" not in of_states
    with fake_gpu() as gpu:
        teacher, student = make_teacher(gpu, **of_teacher), make_student(gpu)
        batches = make_batches(teacher, student, **of_states, **({"layers": (0,)} if has_maps else {}))
        for waits in waits_of_steps(gpu, student, batches, has_maps):
            check(waits, A_STEP)
            assert len(waits) == 1
    walk, _ = batches.sources[0]
    if "low" in teacher.experts and name != "two experts in turns":
        assert teacher.num_swaps > 0
    if name == "renoised":
        assert walk.num_samples.sum() > 0
    if of_teacher.get("is_offloaded"):
        places = [{weight.device.type for weight in expert.parameters()} for expert in teacher.experts.values()]
        assert sorted(places, key=str) == [{"cpu"}, {"cuda"}]


def test_a_step_of_a_lite_student_too():
    with fake_gpu() as gpu:  # its tokens are not the teacher's
        student = make_student(gpu, LITE)
        batches = make_batches(make_teacher(gpu), student, replay=2)
        for waits in waits_of_steps(gpu, student, batches):
            check(waits, A_STEP)
            assert len(waits) == 1
    assert batches.num_calls == NUM_STEPS / 2


# ---- sampling and measuring ----


OPTIONS = SamplingOptions(shift=5.0, num_inference_steps=4, device=GPU)


def test_sampling_and_measuring_stay_on_the_gpu_and_wait_where_it_is_meant():
    with fake_gpu() as gpu:
        teacher, student = make_teacher(gpu, num_experts=2), make_student(gpu)

        def waits_of(work: Callable[[], object]) -> list[Wait]:
            work()  # once for what is made at first use
            gpu.waits.clear()
            work()
            return gpu.waits

        noise, field = torch.randn(4, *LATENTS), StudentField(student)
        in_parts: Meant = {"sampling/sampler.py sample_in_batches": (2, "each batch that is drawn goes to host memory")}
        for who in (teacher, field):
            drawn = partial(sample_in_batches, who, noise, EMBEDS, range(4), OPTIONS, 2)
            check(waits_of(drawn), SAMPLING | in_parts)
        states = draw_path_states(teacher, EMBEDS, LATENTS, OPTIONS)
        to_host: Meant = {
            "evaluation/held_out.py _Kept.velocity": (8, "states and answers of each step go to host memory"),
            "evaluation/held_out.py draw_path_states": (1, "so do the ends"),
        }
        check(waits_of(lambda: draw_path_states(teacher, EMBEDS, LATENTS, OPTIONS)), SAMPLING | to_host)
        errors = PathErrors(states, EMBEDS, OPTIONS, 8)
        to_log: Meant = {"evaluation/held_out.py PathErrors.__call__": (1, "the error goes to the log")}
        check(waits_of(lambda: errors(student)), to_log)


# ---- the GPU itself ----


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda there: there.sum().item(),
    "a float": lambda there: float(there.sum()),
    "a truth": lambda there: bool((there > 0).all()),
    "a list": lambda there: there.tolist(),
    "values": lambda there: there.cpu(),
    "places of what is not zero": lambda there: there.nonzero(),
    "a mask": lambda there: there[there > 0],
    "a mask to write to": lambda there: there.__setitem__(there > 0, 1.0),
    "an index on the host": lambda there: there[torch.tensor([0, 1])],
    "a copy that is not queued": lambda there: torch.zeros(3).to(GPU),
    "a copy that is not pinned": lambda there: torch.zeros(3).to(GPU, non_blocking=True),
    "values from the host": lambda there: there.copy_(torch.zeros(2, 3)),
    "a tensor of numbers": lambda there: torch.tensor([1.0, 2.0], device=GPU),
}
NO_FAULTS: dict[str, Callable[[Tensor], object]] = {
    "to_device": lambda there: there[to_device(torch.tensor([0, 1]), there.device)],
    "a number of the host": lambda there: there * torch.tensor(2.0),
    "what is made there": lambda there: torch.arange(3, device=there.device) + there[0, :1],
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fake_gpu_notices(name):
    with fake_gpu() as gpu:
        with contextlib.suppress(DynamicOutputShapeException):
            FAULTS[name](torch.empty(2, 3, device=GPU))
        assert len(gpu.waits) == 1


@pytest.mark.parametrize("name", NO_FAULTS)
def test_the_fake_gpu_lets_pass(name):
    with fake_gpu() as gpu:
        NO_FAULTS[name](torch.empty(2, 3, device=GPU))
        assert gpu.waits == []


def test_the_fake_gpu_refuses_tensors_of_two_devices():
    with fake_gpu(), pytest.raises(RuntimeError, match="same device"):
        torch.empty(2, 3, device=GPU) + torch.zeros(3)


def test_a_wait_names_its_line():
    with fake_gpu() as gpu:
        student = make_student(gpu)
        StudentField(student).velocity(torch.empty(2, *LATENTS, device=GPU), torch.ones(2), *EMBEDS.batch([0, 1], GPU))
        gpu.waits.clear()
        WanLiteStudent.forward(student, torch.empty(2, *LATENTS, device=GPU), torch.ones(2), *EMBEDS.batch([0, 1], GPU))
        (wait,) = gpu.waits
    assert str(wait).startswith("wandistiller/model/transformer.py:") and "torch.as_tensor(timestep" in str(wait)
