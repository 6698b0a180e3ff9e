"""A budget in words: the table, whether it fits, which flags to change and what each costs, and the message when it did not."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wandistiller.budget.step_time import ASSUMED_UTILISATION, StepTime
from wandistiller.budget.workload import (
    PHASES,
    Component,
    Workload,
    certain_bytes,
    disk_budget,
    held_out_flops,
    memory_budget,
    peak_bytes,
    phase_bytes,
    step_flops,
    training_peak_bytes,
)
from wandistiller.model.sizes import count_parameters, sides, weight_bytes
from wandistiller.reports.progress import format_duration

GIB = 2**30
# A change that takes a smaller share than this off the peak is not worth a flag.
WORTHWHILE_SHARE = 0.01
MAX_WAYS = 3
# Pinned memory comes in powers of two of bytes, so the weights of A14B take half as much again there.
PINNED_OVERHEAD = 1.5
# An A100 or H100 is planned for where no GPU is at hand.
ASSUMED_GPU_GIB = 80.0


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def si(value: float) -> str:
    """Return FLOPs with a prefix: 227.7 T."""
    for exponent, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:.4g} {prefix}"
    return f"{value:.4g} "


# ---- what could be changed ----


@dataclass(frozen=True)
class Change:
    """One change of flags, what it costs, and the run it makes.

    Attributes:
        cost: what is lost of the likeness to the teacher, of time or of disk, in words.
        price: the place of that loss among those of the other changes; what makes another student comes last.
    """

    advice: str
    cost: str
    price: int
    workload: Workload

    @property
    def flag(self) -> str:
        return self.advice.split()[0]


# The prices: the same student for more time, then a teacher or moments that are rounded, then parts of the recipe
# (docs/experiments.md has what each is worth), then the teacher's presence, then another student.
SLOWER, ROUNDED, TURNS, LESS_RECIPE, ALONE, ANOTHER = range(6)


def possible_changes(workload: Workload, flags: Collection[str]) -> Iterator[Change]:
    """Yield the changes that this run could make; `flags` are the names of those that may be changed."""
    yield from _single_flag_changes(workload, flags)
    yield from _shard_changes(workload, flags)
    if "offline_teacher" in flags and not workload.offline_teacher:
        changed = replace(workload, offline_teacher=True, num_features=0, replayed_batches=0)
        cost = "no rollouts, no hidden states"
        yield Change("--offline_teacher --teacher_cache FOLDER", cost, ALONE, changed)
    yield from _smaller_batches(workload, flags)
    height, width = sides(workload.latent_size)
    half, unit = height // 2, workload.student.patch_size
    if height == width and half >= 8 and half % unit == 0 and half % workload.teacher.patch_size == 0:
        factor = workload.student.image_size // height
        advice = f'and a smaller image_size, such as "image_size": {half * factor}'
        yield Change(advice, "another student", ANOTHER, replace(workload, latent_size=half))


def _single_flag_changes(w: Workload, flags: Collection[str]) -> Iterator[Change]:
    is_offloaded, is_fp8 = w.teacher_offload or w.num_experts == 1, w.teacher_dtype == "fp8"
    checkpointing = "a third more computing by the student"
    offload = "experts take turns, no renoised samples"
    fp8 = "the teacher's answers are off by some 4 %"
    single_flags: list[tuple[str, bool, str, int, dict[str, Any]]] = [
        ("gradient_checkpointing", w.gradient_checkpointing, checkpointing, SLOWER, {"gradient_checkpointing": True}),
        (
            "optimizer adamw8bit",
            w.optimizer == "adamw8bit" or w.shard_student,
            "without Muon, and AdamW's moments are rounded" if w.optimizer == "muon" else "its moments are rounded",
            LESS_RECIPE if w.optimizer == "muon" else ROUNDED,
            {"optimizer": "adamw8bit"},
        ),
        ("dtype bf16", w.dtype == "bf16", "products are rounded", ROUNDED, {"dtype": "bf16", "teacher_dtype": "bf16"}),
        ("teacher_offload", is_offloaded or w.shard_teacher, offload, TURNS, {"teacher_offload": True}),
        ("teacher_dtype fp8", is_fp8 or w.shard_teacher, fp8, TURNS, {"teacher_dtype": "fp8"}),
        ("ema_decay 0", not w.ema, "the last weights, not their average", LESS_RECIPE, {"ema": False}),
        ("feature_loss_weight 0", not w.num_features, "without hidden states", LESS_RECIPE, {"num_features": 0}),
    ]
    for words, is_done, cost, price, changes in single_flags:
        if words.split()[0] in flags and not is_done:
            yield Change(f"--{words}", cost, price, replace(w, **changes))


def _shard_changes(w: Workload, flags: Collection[str]) -> Iterator[Change]:
    # A sharded teacher is neither offloaded nor kept in 8 bits.
    shards_teacher = w.shard_teacher or not (w.teacher_offload or w.teacher_dtype == "fp8")
    is_done = w.shard_student and (w.shard_teacher or not shards_teacher)
    if w.num_processes > 1 and "shard" in flags and not is_done:
        which = "both" if shards_teacher else "student"
        changed = replace(w, shard_teacher=shards_teacher, shard_student=True)
        yield Change(f"--shard {which}", "weights travel between GPUs", SLOWER, changed)


def _smaller_batches(w: Workload, flags: Collection[str]) -> Iterator[Change]:
    if w.batch_size > 1:
        half, accum = w.batch_size // 2, 2 * w.grad_accum_steps
        if "grad_accum_steps" in flags:
            advice, cost, price = (
                f"--batch_size {half} --grad_accum_steps {accum}",
                "the same step in parts",
                SLOWER,
            )
        else:
            advice, cost, price, accum = f"--batch_size {half}", "fewer prompts a step", LESS_RECIPE, 1
        yield Change(advice, cost, price, replace(w, batch_size=half, grad_accum_steps=accum))


def by_price(workload: Workload, flags: Collection[str]) -> list[tuple[Change, int]]:
    """Return the changes worth making with the bytes that each alone takes off the peak, the least costly first.

    Of those that cost as much the one comes first that saves most.
    """
    before = peak_bytes(memory_budget(workload))
    saved = [
        (change, before - peak_bytes(memory_budget(change.workload))) for change in possible_changes(workload, flags)
    ]
    worth = [(change, num_bytes) for change, num_bytes in saved if num_bytes > WORTHWHILE_SHARE * before]
    return sorted(worth, key=lambda pair: (pair[0].price, -pair[1]))


def changes_that_fit(workload: Workload, memory: int, flags: Collection[str]) -> tuple[list[Change], int]:
    """Return the changes to make together until the run fits, none that it fits without; and its peak with them.

    The least costly are taken first; then those that the costlier ones made needless are taken back, the costliest first.
    """
    chosen: list[Change] = []
    current = workload
    while peak_bytes(memory_budget(current)) > memory and (found := by_price(current, flags)):
        chosen.append(found[0][0])
        current = chosen[-1].workload
    if chosen and peak_bytes(memory_budget(current)) <= memory:
        chosen = _without_needless(workload, chosen, memory, flags)
        current = chosen[-1].workload
    # A batch is halved again and again: the last word on it counts.
    return list({change.flag: change for change in chosen}.values()), peak_bytes(memory_budget(current))


def _without_needless(workload: Workload, chosen: list[Change], memory: int, flags: Collection[str]) -> list[Change]:
    kept = dict(enumerate(chosen))
    for index in sorted(kept, key=lambda index: -kept[index].price):
        fewer = {other: change for other, change in kept.items() if other != index}
        made = _made(workload, [change.flag for change in fewer.values()], flags)
        if made and peak_bytes(memory_budget(made[-1].workload)) <= memory:
            kept = dict(zip(fewer, made, strict=True))
    return list(kept.values())


def _made(workload: Workload, names: Sequence[str], flags: Collection[str]) -> list[Change]:
    """Return the changes of these flags one after another, each of the run that the one before made."""
    made: list[Change] = []
    for name in names:
        current = made[-1].workload if made else workload
        change = next((change for change in possible_changes(current, flags) if change.flag == name), None)
        if change is None:
            return []
        made.append(change)
    return made


# ---- verdict ----


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits, in a sentence too. `is_certain_not_to_fit` says more than `not fits`: the reserve and an upper bound lie between them."""

    fits: bool
    is_certain_not_to_fit: bool
    sentence: str


def verdict(workload: Workload, memory: int, flags: Collection[str] = (), device: str = "the GPU") -> Verdict:
    """Return whether the run fits into `memory` bytes of a GPU, and what to change if not."""
    peak, least = peak_bytes(memory_budget(workload)), certain_bytes(workload)
    of = f"{device} has {gib(memory)}"
    if peak <= memory:
        return Verdict(True, False, f"Fits: about {gib(peak)} at the peak, {of}.")
    parts = memory_budget(workload)
    if training_peak_bytes(parts) <= memory:
        return Verdict(
            False,
            False,
            f"May not fit: the text encoder alone takes {gib(phase_bytes(parts)['encoding'])}, {of}; the rest fits. Give a "
            "--prompt_cache that was filled on a larger GPU.",
        )
    is_certain = least > memory
    start = (
        f"Does not fit: at least {gib(least)} are needed"
        if is_certain
        else f"May not fit: up to {gib(peak)} are needed"
    )
    return Verdict(False, is_certain, f"{start}, {of}. {_advice(workload, memory, flags)}")


def _advice(workload: Workload, memory: int, flags: Collection[str]) -> str:
    """Return the ways to make a run fit, the least costly first, each with its peak and what it costs."""
    changes, after = changes_that_fit(workload, memory, flags)
    if not changes:
        return "Train a smaller student, or take a GPU with more memory."
    if after > memory:
        return (
            f"Even with {' '.join(change.advice for change in changes)} about {gib(after)} are needed; take also a smaller "
            "student or a GPU with more memory."
        )
    price = max(change.price for change in changes)
    ways = [
        ([change], peak) for change, peak in _enough_alone(workload, memory, flags) if change.price <= max(price, TURNS)
    ]
    if len(changes) > 1 and (not ways or price < ways[0][0][0].price):
        ways.insert(0, (changes, after))
    texts = [
        f"{' '.join(change.advice for change in way)} (about {gib(peak)}; {', '.join(change.cost for change in way)})"
        for way, peak in ways[:MAX_WAYS]
    ]
    return f"It fits, the least costly way first, with {', or with '.join(texts)}."


def _enough_alone(workload: Workload, memory: int, flags: Collection[str]) -> list[tuple[Change, int]]:
    """Return the changes each of which makes a run of the same student fit, the least costly first, with its peak."""
    peaks = [(change, peak_bytes(memory_budget(change.workload))) for change, _ in by_price(workload, flags)]
    return [(change, peak) for change, peak in peaks if peak <= memory and change.price < ANOTHER]


# ---- table ----


def memory_lines(workload: Workload) -> list[str]:
    """Return a line for each component, those of one phase together, and the peak."""
    components = memory_budget(workload)
    sums = phase_bytes(components)
    titles = {
        "": "all the time",
        "encoding": "while prompts are encoded (nothing else is there)",
        "answering": "while the teacher answers",
        "learning": "while the student learns",
        "updating": "while its weights are updated",
    }
    lines = []
    for phase in ("", *PHASES):
        parts = [part for part in components if part.phase == phase]
        if parts:
            lines.append(f"  {titles[phase]}")
            lines += [_line(part) for part in sorted(parts, key=lambda part: -part.num_bytes)]
    if workload.teacher_offload:
        host = PINNED_OVERHEAD * workload.num_experts * weight_bytes(workload.teacher, workload.teacher_dtype)
        lines.append(
            f"  {'host memory':<26}{host / GIB:>9.2f}  both experts, pinned (each tensor in a power of two of bytes)"
        )
    highest = max(sums, key=sums.__getitem__)
    return [*lines, f"  {'peak':<26}{sums[highest] / GIB:>9.2f}  {titles[highest]}"]


def disk_lines(workload: Workload) -> list[str]:
    return [_line(part) for part in disk_budget(workload)]


def _line(part: Component) -> str:
    return f"    {part.name:<24}{part.num_bytes / GIB:>9.2f}  {part.what}"


def parameter_lines(workload: Workload) -> list[str]:
    teacher, student = count_parameters(workload.teacher).total, count_parameters(workload.student).total
    many = f"{workload.num_experts} x " if workload.num_experts > 1 else ""
    return [f"  teacher {many}{teacher:,}, student {student:,} ({student / teacher:.1%} of one)"]


def compute_lines(workload: Workload) -> list[str]:
    """Return lines with the FLOPs of a step, and how many steps and calls the job takes."""
    flops = step_flops(workload)
    held_out, per_call = workload.held_out, workload.batch_size * workload.grad_accum_steps
    calls = workload.calls_per_step * workload.num_steps + held_out.teacher / per_call
    extra = f" + {si(flops.recompute)} recomputed" if flops.recompute else ""
    extra += f" + {si(flops.orthogonalization)} orthogonalising" if flops.orthogonalization else ""
    return [
        f"  a step: teacher {si(flops.teacher)}, student {si(flops.student_forward)} forward + "
        f"{si(flops.student_backward)} backward{extra} = {si(flops.total)}FLOP a GPU",
        *(
            [f"  guidance, a second pass of the teacher, at about {workload.guided_share:.0%} of its answers"]
            if workload.uses_guidance and workload.guided_share < 1
            else []
        ),
        f"  the job: {workload.num_steps:,} steps of {workload.global_batch_size:,} prompts, about {calls:,.0f} teacher calls of as many, "
        f"{si(flops.total * workload.num_steps + held_out_flops(workload))}FLOP a GPU",
        *(
            [
                f"  of these for the held-out error: {held_out.teacher / per_call:,.1f} calls, {si(held_out_flops(workload))}FLOP "
                f"a GPU; the student answers {held_out.student:,} states"
            ]
            if held_out.student
            else []
        ),
    ]


def time_lines(workload: Workload, step: StepTime | None, rate: float) -> list[str]:
    """Return lines with the loop's time, from a measured step or, where there is none, from FLOPs.

    Args:
        rate: FLOP/s of plain matrix products on the device.
    """
    if step is None:
        seconds = step_flops(workload).total / (ASSUMED_UTILISATION * rate)
        return [
            f"  time, an estimate: {seconds:.3g} s a step, {_hours(seconds, workload)}, if {ASSUMED_UTILISATION:.0%} (assumed) "
            f"of the {rate / 1e12:.4g} TFLOP/s of plain {workload.dtype} products here are reached"
        ]
    without = [
        *(["what the processes send each other"] if workload.num_processes > 1 else []),
        *(["moving experts"] if workload.teacher_offload else []),
    ]
    mfu = step_flops(workload).total / step.total_s / rate
    sizes = ((step.depths[0], workload.teacher.depth, "teacher"), (step.depths[1], workload.student.depth, "student"))
    blocks = " and ".join(f"{measured} of {depth} {whose} blocks" for measured, depth, whose in sizes)
    return [
        f"  time, measured with random weights in {blocks}: {step.answer_s:.3g} s a teacher's "
        f"answer, {step.learn_s:.3g} s to learn from one, {step.update_s:.3g} s an update",
        f"  so {step.total_s:.3g} s a step ({mfu:.0%} of the {rate / 1e12:.4g} TFLOP/s of plain {workload.dtype} products here), "
        f"{_hours(step.total_s, workload)}" + (f", without {' and '.join(without)}" if without else ""),
    ]


def _hours(step_s: float, workload: Workload) -> str:
    return f"{format_duration(step_s * workload.num_steps)} for all {workload.num_steps:,} steps"


# ---- after it happened ----


class OutOfMemory(RuntimeError):
    """The device ran out of memory; the message says what was there and which flags to change."""

    exit_code = 1


def out_of_memory_message(workload: Workload, flags: Collection[str] = (), has_checkpoints: bool = False) -> str:
    """Return a message with what was resident by this arithmetic, the largest first, and which flags to change, the least costly first.

    Where there are checkpoints it says which changes they can be resumed with. The text encoder is left out: it has left memory
    by the time a run grows large.
    """
    workload = replace(workload, text_encoder_parameters=0)
    components = memory_budget(workload)
    phases = phase_bytes(components)
    phase = max(phases, key=phases.__getitem__)
    there = [part for part in components if part.phase in ("", phase)]
    resident = ", ".join(
        f"{part.name} {part.num_bytes / GIB:.1f}" for part in sorted(there, key=lambda part: -part.num_bytes)
    )
    changes = [
        f"{change.advice} (-{saved / GIB:.1f} GiB, {change.cost})" for change, saved in by_price(workload, flags)
    ]
    advice = f"Change, the least costly first: {'; '.join(changes)}" if changes else "Train a smaller student"
    if has_checkpoints:
        advice += ". The run can be resumed with another --batch_size, --grad_accum_steps, --shard or --gradient_checkpointing; the "
        advice += "others make another run of it (--overwrite, or another --output_dir)"
    return f"the device is out of memory; in GiB, by the arithmetic of --dry_run: {resident}. {advice}"
