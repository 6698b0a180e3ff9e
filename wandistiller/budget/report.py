"""A budget in words: tables of memory, FLOPs and hours, whether the run fits, and what takes less memory if it does not."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from wandistiller.budget.cards import CARDS, GIB, Card
from wandistiller.budget.memory import (
    Component,
    block_bytes,
    certain_bytes,
    host_budget,
    memory_budget,
    peak_bytes,
    phase_bytes,
    training_peak_bytes,
)
from wandistiller.budget.workload import Workload, flops_per_sample, step_flops
from wandistiller.reports.progress import format_duration

WHEN = {
    "": "",
    "encoding": "while prompts are encoded (nothing else is there): ",
    "answering": "while the teacher answers: ",
    "learning": "while the student learns: ",
    "updating": "while its weights are updated: ",
}


SHARE_OF_DATA_SHEET = 0.33  # of a rate, that a whole step reaches: what others reached with Wan 14B (docs/training.md)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def si(value: float) -> str:
    """Return FLOPs with a prefix: 227.7 T."""
    for prefix, size in {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6}.items():
        if value >= size:
            return f"{value / size:.4g} {prefix}"
    return f"{value:.4g} "


# ---- what takes less memory ----


def hints(workload: Workload) -> list[str]:
    """Return the flags that take less memory and that the run has not taken yet."""
    is_alone = workload.num_processes == 1
    # A teacher that is kept otherwise is not sharded.
    stays = workload.teacher_dtype == "fp8" or workload.teacher_offload or workload.teacher_cache_batches
    ways = {
        "--gradient_checkpointing": not workload.gradient_checkpointing,
        "a smaller --batch_size with more --grad_accum_steps": workload.batch_size > 1,
        f"--shard {'student' if stays else 'both'}": not is_alone and not workload.shard_student,
        "--teacher_dtype fp8": is_alone and workload.teacher_dtype != "fp8",
        "--teacher_offload blocks": is_alone and workload.teacher_offload != "blocks",
    }
    return [way for way, helps in ways.items() if helps]


def advice(workload: Workload) -> str:
    """Return the hints, and what else would help."""
    ways = [*hints(workload), "a smaller student or image_size, or a GPU with more memory"]
    return f"What takes less (docs/memory.md has the prices): {'; '.join(ways)}"


# ---- whether it fits ----


def find_card(device: str, is_for_gpu: bool, assumed: Card | None = None) -> Card:
    """Find the GPU that a run is planned for, or this machine as one where it computes on the CPU.

    Args:
        device: the run's own.
        is_for_gpu: plan for a GPU, also where none is here.
        assumed: a GPU that is not here.
    """
    if assumed is not None:
        return replace(assumed, name=f"{assumed.name} (assumed)")
    if device.startswith("cuda"):
        about = torch.cuda.get_device_properties(device)
        like = next((found for name, found in CARDS.items() if name in about.name), Card(about.name, 0.0))
        return replace(like, name=about.name, gib=about.total_memory / GIB)
    if is_for_gpu:
        usual = CARDS["H100"]
        return replace(usual, name=f"an assumed GPU, {usual.name} (none is here, see --assume_gpu)")
    return Card("this machine", host_memory() / GIB)


def host_memory() -> int:
    """Return the bytes of memory of this machine, or of the container around this process."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total


class OutOfMemory(RuntimeError):
    """The device ran out of memory; the message says which flags to change."""

    exit_code = 1


class Verdict(NamedTuple):
    """Whether a run fits in one place, and the words that say so. Between `fits` and certainty lie the reserve and upper bounds."""

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
    return Verdict(False, least > memory, f"{needed} needed, {has}. {advice(workload)}.")


def host_verdict(workload: Workload, memory: int) -> Verdict:
    """Hold the run against the host's `memory` bytes."""
    phases = phase_bytes(host_budget(workload))
    highest = max(phases, key=phases.__getitem__)
    if phases[highest] <= memory:
        return Verdict(True, False, f"host memory, {gib(phases[highest])} of {gib(memory)}")
    ways = {
        "give a --prompt_cache that was filled on a larger machine": highest == "encoding",
        "--teacher_dtype fp8": workload.teacher_offload and workload.teacher_dtype != "fp8",
        "leave --teacher_offload out": workload.teacher_offload,
        "a smaller student, or --save_every 0": workload.keep_checkpoints and not workload.teacher_offload,
        "fewer processes on a machine": workload.processes_per_machine > 1,
    }
    helping = "; ".join(way for way, helps in ways.items() if helps) or "a machine with more"
    what = f"May not fit: host memory, {gib(phases[highest])} needed {WHEN[highest].removesuffix(': ')}".rstrip()
    return Verdict(False, False, f"{what}, this machine has {gib(memory)}. What helps: {helping}.")


# The flag that mends a disk without room, by what takes most of it
DISK_MENDS = {
    "student": "give another --output_dir",
    "checkpoints": "give a smaller --keep_checkpoints, --save_every 0, or another --output_dir",
    "prompt cache": "give fewer --num_prompts or another --prompt_cache, unless it holds them already",
    "teacher cache": "give fewer --teacher_calls or another --teacher_cache, unless it holds them already",
}


def disk_verdict(parts: Sequence[Component], free: int) -> Verdict:
    """Hold what is written to one disk against its `free` bytes."""
    needed, flags = sum(part.num_bytes for part in parts), ", ".join(dict.fromkeys(part.phase for part in parts))
    if needed <= free:
        return Verdict(True, False, f"disk of {flags}, {gib(needed)} of {gib(free)} free")
    mend = DISK_MENDS[max(parts, key=lambda part: part.num_bytes).name]
    return Verdict(False, False, f"May not fit: disk of {flags}, {gib(needed)} needed, {gib(free)} free; {mend}.")


def conclusion(device: Verdict, others: Sequence[Verdict]) -> str:
    """Return one line that says "Fits" if all places do, else a line for each that does not."""
    short = [each.sentence for each in (device, *others) if not each.fits]
    return "\n".join(short) or f"{device.sentence.removesuffix('.')}; {'; '.join(each.sentence for each in others)}."


# ---- tables ----


def table_line(name: str, num_bytes: float, what: str) -> str:
    return f"  {name:<24}{num_bytes / GIB:>9.2f}  {what}"


def memory_lines(budget: Sequence[Component]) -> list[str]:
    """Return a line for each component, the largest first, and the peak."""
    components = sorted(budget, key=lambda part: -part.num_bytes)
    lines = [table_line(part.name, part.num_bytes, WHEN[part.phase] + part.what) for part in components]
    phases = phase_bytes(components)
    highest = max(phases, key=phases.__getitem__)
    return [*lines, table_line("peak", phases[highest], WHEN[highest].removesuffix(": "))]


def step_seconds(workload: Workload, card: Card) -> tuple[float, float]:
    """Return how long an optimizer step computes, and how long it waits for copies of the teacher's blocks that no answer hides."""
    rate = SHARE_OF_DATA_SHEET * card.flops
    copies = workload.teacher.depth * block_bytes(workload) / card.link if workload.teacher_offload == "blocks" else 0
    shown = max(0.0, copies - workload.batch_size * flops_per_sample(workload)[0] / rate)
    return step_flops(workload).total / rate, workload.grad_accum_steps * workload.calls_per_step * shown


def compute_lines(workload: Workload, card: Card) -> list[str]:
    """Return lines with the FLOPs of a step and of the job, and how long it takes."""
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
    if card.flops is None or workload.dtype != "bf16":
        return [*lines, "  time: --assume_gpu NAME tells hours"]
    computing, waiting = step_seconds(workload, card)
    seconds = computing + waiting
    if waiting:
        lines.append(f"  {waiting:.3g} s of a step wait for the teacher's blocks; a larger --batch_size hides them")
    return [
        *lines,
        f"  time, an estimate: {seconds:.3g} s a step, {format_duration(seconds * num_steps)} for all, if {SHARE_OF_DATA_SHEET:.0%} of "
        f"the {card.flops / 1e12:.4g} TFLOP/s of {card.name}'s data sheet are reached",
    ]
