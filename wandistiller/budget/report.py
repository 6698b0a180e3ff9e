"""A budget in words: tables of memory, FLOPs and hours, whether the run fits, and what takes less memory if it does not."""

from dataclasses import replace
from typing import Any, NamedTuple

from wandistiller.budget.machine import GIB
from wandistiller.budget.memory import (
    certain_bytes,
    memory_budget,
    peak_bytes,
    phase_bytes,
    streamed_bytes,
    training_peak_bytes,
)
from wandistiller.budget.workload import Workload, step_flops
from wandistiller.reports.progress import format_duration

ASSUMED_UTILISATION = 0.4  # of the rate of plain matrix products, over a whole step
WHEN = {
    "": "",
    "encoding": "while prompts are encoded (nothing else is there): ",
    "answering": "while the teacher answers: ",
    "learning": "while the student learns: ",
    "updating": "while its weights are updated: ",
}


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def si(value: float) -> str:
    """Return FLOPs with a prefix: 227.7 T."""
    for prefix, size in {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}.items():
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g} "


# ---- what takes less memory ----


def hints(workload: Workload) -> dict[str, dict[str, Any]]:
    """Return at most three ways to take less memory: flags, and what they change. Those that the run already goes are left out."""
    found: dict[str, dict[str, Any]] = {}
    batch_size = workload.batch_size // 4 if workload.batch_size % 4 == 0 else 1
    grad_accum_steps = workload.grad_accum_steps * workload.batch_size // batch_size
    step = {"gradient_checkpointing": True, "batch_size": batch_size, "grad_accum_steps": grad_accum_steps}
    if changes := {name: value for name, value in step.items() if getattr(workload, name) != value}:
        flags = (f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items())
        found[" ".join(flags)] = changes
    is_rounded, is_offloaded = workload.teacher_dtype == "fp8", workload.teacher_offload
    if workload.num_processes > 1:
        if not workload.shard_student and workload.optimizer != "adamw8bit":
            both = not (is_rounded or is_offloaded or workload.teacher_cache_batches)  # such a teacher is not sharded
            found[f"--shard {'both' if both else 'student'}"] = {"shard_teacher": both, "shard_student": True}
        return found
    if not is_rounded:
        found["--teacher_dtype fp8"] = {"teacher_dtype": "fp8"}
    if workload.teacher_offload != "blocks":
        found["--teacher_offload blocks"] = {"teacher_offload": "blocks"}
    return found


def advice(workload: Workload, memory: int | None = None) -> str:
    """Return each hint with the peak that it leads to, and all together; beyond `memory` bytes, what else would help."""

    def peak(changes: dict[str, Any]) -> int:
        return peak_bytes(memory_budget(replace(workload, **changes)))

    found = hints(workload)
    together = peak({name: value for changes in found.values() for name, value in changes.items()})
    ways = [f"{flags}: {gib(peak(changes))}" for flags, changes in found.items()]
    if len(found) > 1:
        ways.append(f"all of these: {gib(together)}")
    if not found or (memory is not None and together > memory):
        ways.append("a smaller student, a smaller image_size, or a GPU with more memory")
    return f"What takes less (docs/memory.md has the prices): {'; '.join(ways)}"


class OutOfMemory(RuntimeError):
    """The device ran out of memory; the message says which flags to change."""

    exit_code = 1

    def __init__(self, workload: Workload):
        without_encoder = replace(workload, text_encoder_parameters=0)  # which has gone by then
        super().__init__(f"the device is out of memory. {advice(without_encoder)}")


class Verdict(NamedTuple):
    """Whether a run fits, and the sentence that says so. Between `fits` and certainty lie the reserve and upper bounds."""

    fits: bool
    is_certain_not_to_fit: bool
    sentence: str


def verdict(workload: Workload, memory: int, device: str = "the GPU") -> Verdict:
    """Hold the run against `memory` bytes of a GPU."""
    parts, least = memory_budget(workload), certain_bytes(workload)
    peak, has = peak_bytes(parts), f"{device} has {gib(memory)}"
    if peak <= memory:
        return Verdict(True, False, f"Fits: about {gib(peak)} at the peak, {has}.")
    if training_peak_bytes(parts) <= memory:
        encoder = f"May not fit: the text encoder alone takes {gib(phase_bytes(parts)['encoding'])}, {has}"
        return Verdict(
            False, False, f"{encoder}; the rest fits. Give a --prompt_cache that was filled on a larger GPU."
        )
    needed = f"Does not fit: at least {gib(least)}" if least > memory else f"May not fit: up to {gib(peak)}"
    return Verdict(False, least > memory, f"{needed} needed, {has}. {advice(workload, memory)}.")


# ---- tables ----


def table_line(name: str, num_bytes: float, what: str) -> str:
    return f"  {name:<24}{num_bytes / GIB:>9.2f}  {what}"


def memory_lines(workload: Workload) -> list[str]:
    """Return a line for each component, the largest first, and the peak."""
    components = sorted(memory_budget(workload), key=lambda part: -part.num_bytes)
    lines = [table_line(part.name, part.num_bytes, WHEN[part.phase] + part.what) for part in components]
    if workload.teacher_offload:
        lines.append(table_line("host memory", streamed_bytes(workload), "the teacher's blocks, pinned"))
    phases = phase_bytes(components)
    highest = max(phases, key=phases.__getitem__)
    return [*lines, table_line("peak", phases[highest], WHEN[highest].removesuffix(": "))]


def compute_lines(workload: Workload, rate: float | None) -> list[str]:
    """Return lines with the FLOPs of a step and of the job, and how long it takes.

    Args:
        rate: FLOP/s of plain matrix products on the device; None where it is not here.
    """
    flops, num_steps = step_flops(workload), workload.num_steps
    extra = f" + {si(flops.segments)} of its frozen copy" if flops.segments else ""
    extra += f" + {si(flops.recompute)} recomputed" if flops.recompute else ""
    extra += f" + {si(flops.orthogonalization)} orthogonalising" if flops.orthogonalization else ""
    lines = [
        f"  a step: teacher {si(flops.teacher)}, student {si(flops.student_forward)} forward + "
        f"{si(flops.student_backward)} backward{extra} = {si(flops.total)}FLOP a GPU",
        f"  the job: {num_steps:,} steps of {workload.global_batch_size:,} prompts, about "
        f"{workload.calls_per_step * num_steps:,.0f} teacher calls of as many, {si(flops.total * num_steps)}FLOP a GPU",
    ]
    if rate is None:
        return [*lines, "  time: the device is not here (--device cpu plans for this machine)"]
    seconds = flops.total / (ASSUMED_UTILISATION * rate)
    return [
        *lines,
        f"  time, an estimate: {seconds:.3g} s a step, {format_duration(seconds * num_steps)} for all, if "
        f"{ASSUMED_UTILISATION:.0%} of the {rate / 1e12:.4g} TFLOP/s of plain {workload.dtype} products here are reached",
    ]
