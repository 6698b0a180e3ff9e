"""A budget in words: tables of memory, disk, FLOPs and time, whether the run fits, and what takes less memory if it does not."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from wandistiller.budget.machine import GIB
from wandistiller.budget.memory import certain_bytes, memory_budget, peak_bytes, phase_bytes, training_peak_bytes
from wandistiller.budget.step_time import ASSUMED_UTILISATION, StepTime
from wandistiller.budget.workload import Workload, held_out_flops, step_flops
from wandistiller.model.sizes import weight_bytes
from wandistiller.reports.progress import format_duration

# Pinned memory comes in powers of two of bytes, so the weights of A14B take half as much again there.
PINNED_OVERHEAD = 1.5


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def si(value: float) -> str:
    """Return FLOPs with a prefix: 227.7 T."""
    for exponent, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:.4g} {prefix}"
    return f"{value:.4g} "


# ---- verdict ----


class Hint(NamedTuple):
    """Flags that take less memory, what they cost, and what they change of a workload."""

    flags: str
    cost: str
    changes: dict[str, Any]


def hints(workload: Workload) -> list[Hint]:
    """Return at most three ways to take less memory, in a fixed order; those that the run already goes are left out."""
    found = []
    batch_size = workload.batch_size // 4 if workload.batch_size % 4 == 0 else 1
    grad_accum_steps = workload.grad_accum_steps * workload.batch_size // batch_size
    step = {"gradient_checkpointing": True, "batch_size": batch_size, "grad_accum_steps": grad_accum_steps}
    if changes := {name: value for name, value in step.items() if getattr(workload, name) != value}:
        flags = " ".join(f"--{name}" + (f" {value}" if value is not True else "") for name, value in changes.items())
        found.append(Hint(flags, "the same student, slower", changes))
    is_rounded, is_offloaded = workload.teacher_dtype == "fp8", workload.teacher_offload
    if workload.num_processes > 1 and not workload.shard_student and workload.optimizer != "adamw8bit":
        both = not (is_rounded or is_offloaded or workload.teacher_cache_batches)  # such a teacher cannot be sharded
        changes = {"shard_teacher": both, "shard_student": True}
        found.append(Hint(f"--shard {'both' if both else 'student'}", "weights travel between GPUs", changes))
    if workload.num_processes == 1 and not is_rounded:
        found.append(Hint("--teacher_dtype fp8", "the teacher is off by about 4 %", {"teacher_dtype": "fp8"}))
    if workload.num_processes == 1 and not is_offloaded and workload.num_experts > 1:
        cost = "one expert at a time, no renoised samples"
        found.append(Hint("--teacher_offload", cost, {"teacher_offload": True}))
    return found


def advice(workload: Workload, memory: int | None = None) -> str:
    """Return each hint with the peak that it leads to, and all together; beyond `memory` bytes, what else would help."""

    def peak(chosen: Iterable[Hint]) -> int:
        changes = {name: value for hint in chosen for name, value in hint.changes.items()}
        return peak_bytes(memory_budget(replace(workload, **changes)))

    found = hints(workload)
    ways = [f"{hint.flags}: {gib(peak([hint]))} ({hint.cost})" for hint in found]
    if len(found) > 1:
        ways.append(f"all of these: {gib(peak(found))}")
    if not ways or (memory is not None and peak(found) > memory):
        ways.append("a smaller student, a smaller image_size, or a GPU with more memory")
    return "; ".join(ways)


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
        start = (
            f"May not fit: the text encoder alone takes {gib(phase_bytes(parts)['encoding'])}, {has}; the rest fits."
        )
        return Verdict(False, False, f"{start} Give a --prompt_cache that was filled on a larger GPU.")
    needed = f"Does not fit: at least {gib(least)}" if least > memory else f"May not fit: up to {gib(peak)}"
    return Verdict(False, least > memory, f"{needed} needed, {has}. What takes less: {advice(workload, memory)}.")


class OutOfMemory(RuntimeError):
    """The device ran out of memory; the message says what was there and which flags to change."""

    exit_code = 1


def out_of_memory_message(workload: Workload, has_checkpoints: bool = False) -> str:
    """Return what was in memory at the peak, the largest first, and what takes less. The text encoder has gone by then."""
    workload = replace(workload, text_encoder_parameters=0)
    components = memory_budget(workload)
    phases = phase_bytes(components)
    there = [part for part in components if part.phase in ("", max(phases, key=phases.__getitem__))]
    there.sort(key=lambda part: -part.num_bytes)
    resident = ", ".join(f"{part.name} {part.num_bytes / GIB:.1f}" for part in there)
    text = f"the device is out of memory; in GiB, by the arithmetic of --dry_run: {resident}. What takes less: {advice(workload)}"
    if not has_checkpoints:
        return text
    return (
        f"{text}. The run resumes with another --batch_size, --grad_accum_steps, --shard or --gradient_checkpointing; any other flag "
        "makes another run of it (--overwrite, or another --output_dir)"
    )


# ---- tables ----

WHEN = {
    "": "",
    "encoding": "while prompts are encoded (nothing else is there): ",
    "answering": "while the teacher answers: ",
    "learning": "while the student learns: ",
    "updating": "while its weights are updated: ",
}


def memory_lines(workload: Workload) -> list[str]:
    """Return a line for each component, the largest first, and the peak."""
    components = sorted(memory_budget(workload), key=lambda part: -part.num_bytes)
    lines = [table_line(part.name, part.num_bytes, WHEN[part.phase] + part.what) for part in components]
    if workload.teacher_offload:
        host = PINNED_OVERHEAD * workload.num_experts * weight_bytes(workload.teacher, workload.teacher_dtype)
        lines.append(table_line("host memory", host, "both experts, pinned (each tensor in a power of two of bytes)"))
    phases = phase_bytes(components)
    highest = max(phases, key=phases.__getitem__)
    return [*lines, table_line("peak", phases[highest], WHEN[highest].removesuffix(": "))]


def table_line(name: str, num_bytes: float, what: str) -> str:
    return f"  {name:<24}{num_bytes / GIB:>9.2f}  {what}"


def compute_lines(workload: Workload) -> list[str]:
    """Return lines with the FLOPs of a step, and how many steps and teacher calls the job takes."""
    flops, held_out = step_flops(workload), workload.held_out
    per_call = workload.batch_size * workload.grad_accum_steps
    calls = workload.calls_per_step * workload.num_steps + held_out.teacher / per_call
    total = flops.total * workload.num_steps + held_out_flops(workload)
    extra = f" + {si(flops.recompute)} recomputed" if flops.recompute else ""
    extra += f" + {si(flops.orthogonalization)} orthogonalising" if flops.orthogonalization else ""
    lines = [
        f"  a step: teacher {si(flops.teacher)}, student {si(flops.student_forward)} forward + "
        f"{si(flops.student_backward)} backward{extra} = {si(flops.total)}FLOP a GPU",
        f"  the job: {workload.num_steps:,} steps of {workload.global_batch_size:,} prompts, about {calls:,.0f} teacher calls of as "
        f"many, {si(total)}FLOP a GPU",
    ]
    if 0 < workload.guided_fraction < 1:
        fraction = f"{workload.guided_fraction:.0%}"
        lines.append(f"  guidance, a second pass of the teacher, at about {fraction} of its answers")
    if held_out.student:
        lines.append(
            f"  of these for the held-out error: {held_out.teacher / per_call:,.1f} calls, {si(held_out_flops(workload))}FLOP a GPU; "
            f"the student answers {held_out.student:,} states"
        )
    return lines


def time_lines(workload: Workload, step: StepTime | None, rate: float) -> list[str]:
    """Return lines with the time of the loop, from a measured step or, without one, from FLOPs.

    Args:
        rate: FLOP/s of plain matrix products on the device.
    """
    flops = step_flops(workload).total
    seconds = flops / (ASSUMED_UTILISATION * rate) if step is None else step.total_s
    job = (
        f"{seconds:.3g} s a step, {format_duration(seconds * workload.num_steps)} for all {workload.num_steps:,} steps"
    )
    of_rate = f"{flops / seconds / rate:.0%} of the {rate / 1e12:.4g} TFLOP/s of plain {workload.dtype} products here"
    if step is None:
        return [f"  time, an estimate: {job}, if {of_rate} are reached (assumed)"]
    left_out = ["what the processes send each other"] if workload.num_processes > 1 else []
    left_out += ["moving experts"] if workload.teacher_offload else []
    return [
        f"  time, measured with random weights in a few blocks: {step.answer_s:.3g} s a teacher's answer, {step.learn_s:.3g} s to "
        f"learn from one, {step.update_s:.3g} s an update",
        f"  so {job} ({of_rate})" + (f", without {' and '.join(left_out)}" if left_out else ""),
    ]
