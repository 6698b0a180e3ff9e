"""A budget is what a step of the trainer takes, at the true shapes of the released Wans and of their ready students.

The oracle is torch's own tracker of memory, in a step of the trainer's own parts on tensors that have shapes and no memory
(support/true_size.py). Training states are left out of both. Models of four blocks run here; the slow tests run all blocks of each, one process and up to 64.
"""

from dataclasses import replace

import pytest

from benchmarks import recipes, shapes
from support.true_size import step_memory
from wandistiller.budget.cards import CARDS
from wandistiller.budget.memory import memory_budget, phase_bytes
from wandistiller.budget.workload import Workload

TOLERANCE = 0.1
MOVING_TOLERANCE = 0.2  # of what comes and goes in a step, which is a small part of the whole in some runs
ALWAYS = ("teacher weights", "student weights", "optimizer moments", "average of weights")
LEFT_OUT = ("reserve", "text encoder", "training states", "checkpoints")
CHECKPOINTING = {"gradient_checkpointing": True}
SAVING = CHECKPOINTING | {"teacher_dtype": "fp8"}


def shallow(run: Workload, depth: int = 4) -> Workload:
    """The same run with so many blocks; all blocks are alike."""
    features = {"num_features": min(run.num_features, depth)}
    return replace(run, teacher=run.teacher.replace(depth=depth), student=run.student.replace(depth=depth), **features)


def check(run: Workload) -> None:
    """Hold the budget of a run to the step, the peak of each phase and what can be told apart."""
    step = step_memory(run)
    parts = [part for part in memory_budget(run) if part.name not in LEFT_OUT]
    size = {part.name: part.num_bytes for part in parts}
    budget = phase_bytes(parts)
    # The backward pass is in both: at its start activations are there, at its end gradients.
    expected = {"answering": budget["answering"], "learning": max(budget["learning"], budget["updating"])}
    for phase, num_bytes in expected.items():
        assert num_bytes == pytest.approx(step[phase]["Total"], rel=TOLERANCE), phase
    assert max(expected.values()) == pytest.approx(max(found["Total"] for found in step.values()), rel=TOLERANCE)
    learning, updating = step["learning"], step["updating"]
    exact = 0.05 if run.shard_student else 0.01  # the first process's part of a short vector is larger than others'
    assert updating["Total"] <= (1 + exact) * budget["updating"]
    if not run.shard_teacher:  # what FSDP2 leaves gathered is a parameter in the budget and an activation in the step
        always = sum(size[name] for name in ALWAYS if name in size)
        always += size["gradients"] if run.keeps_gradients and not run.shard_student else 0
        moved = size.get("orthogonalisation", 0) + (
            size["gradients"] if run.shard_student or not run.keeps_gradients else 0
        )
        if not run.shard_student:  # FSDP2 leaves gathered what is in no block
            assert updating["Total"] == pytest.approx(always + moved, rel=0.02)
        if run.num_experts > 1 and (run.teacher_offload or not run.num_features):
            del expected["answering"]  # the budget counts with a batch that one of the experts gets whole
        for phase, num_bytes in expected.items():
            moving = sum(step[phase].get(kind, 0) for kind in ("Activation", "Temp"))
            slack = max(MOVING_TOLERANCE * moving, 0.01 * num_bytes)
            assert num_bytes - always == pytest.approx(moving, abs=slack), phase
        assert learning["Parameter"] == pytest.approx(size["teacher weights"] + size["student weights"], rel=0.01)
    assert learning["Optstate"] == pytest.approx(size["optimizer moments"], rel=exact)
    assert learning["Other"] == pytest.approx(size.get("average of weights", 0), rel=exact)
    kind = "Gradient" if run.keeps_gradients and not run.shard_student else "Temp"
    assert updating[kind] == pytest.approx(size["gradients"], rel=exact)


FOUR_BLOCKS = {
    "1.3B": ("Wan2.1 1.3B", 1024, {}),
    "5B, checkpointing, accumulation": ("Wan2.2 TI2V-5B", 1024, CHECKPOINTING | {"grad_accum_steps": 2}),
    "A14B, fp8, one expert at a time": ("Wan2.2 A14B", 512, SAVING | {"teacher_offload": "experts"}),
    "5B, blocks": ("Wan2.2 TI2V-5B", 1024, CHECKPOINTING | {"teacher_offload": "blocks"}),
}


@pytest.mark.parametrize("name", FOUR_BLOCKS)
def test_a_step_takes_what_the_budget_says(name):
    teacher, pixels, changes = FOUR_BLOCKS[name]
    check(replace(shallow(shapes.run_of(teacher, pixels)), **changes))


def test_a_sharded_step_takes_what_the_budget_says():
    run = shallow(shapes.run_of("Wan2.2 A14B", 512))
    check(replace(run, num_processes=8, shard_teacher=True, shard_student=True, **CHECKPOINTING))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, CHECKPOINTING], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("pixels", [512, 1024])
@pytest.mark.parametrize("teacher", shapes.RUNS)
def test_a_step_of_a_released_teacher(teacher, pixels, changes):
    check(replace(shapes.run_of(teacher, pixels), **changes))


VARIANTS = {
    "fp8": SAVING,
    "fp8, one expert at a time": SAVING | {"teacher_offload": "experts"},
    "fp8, blocks": SAVING | {"teacher_offload": "blocks"},
    "accumulation": CHECKPOINTING | {"grad_accum_steps": 4, "batch_size": 1},
    "adamw, no average": {"optimizer": "adamw", "ema": False},
    "without hidden states": {"num_features": 0},
    "CPU": {"is_gpu": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_with_other_flags(name):
    check(replace(shapes.run_of("Wan2.2 A14B", 1024), **VARIANTS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["14B-1B-24GB", "A14B-1B-24GB"])
def test_a_step_of_a_preset_for_24_gb(name):
    run = recipes.planned(name)
    assert run.peak_gib <= CARDS["4090"].gib
    # Two micro-batches stand for all; no step of the tracker's has a second stage.
    check(replace(run.workload, grad_accum_steps=2, segment_passes=0))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [8, 64])
@pytest.mark.parametrize("which", ["teacher", "student", "both"])
def test_a_sharded_step(which, num_processes):
    sharded = {"shard_teacher": which != "student", "shard_student": which != "teacher"}
    check(replace(shapes.run_of("Wan2.2 A14B", 1024), num_processes=num_processes, **sharded, **CHECKPOINTING))
