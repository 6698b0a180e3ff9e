"""What a run of the A14B teacher at 1024 px needs on 1, 8 and 64 GPUs: every table of docs/scaling.md and docs/memory.md.

    python benchmarks/scaling.py            # prints the tables
    python benchmarks/scaling.py --write    # puts them into the two pages

Nothing here is measured: shapes are exact, rates and shares of them are the assumptions that docs/scaling.md names with their source.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pages import print_or_write
from wandistiller.budget.memory import disk_budget, memory_budget, peak_bytes, phase_bytes, training_peak_bytes
from wandistiller.budget.workload import Workload, step_flops
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import count_parameters, weight_bytes
from wandistiller.walk.walk import SAMPLES_PER_SLOT, paths_per_slot

PAGES = (ROOT / "docs" / "scaling.md", ROOT / "docs" / "memory.md")
GIB, GB = 2**30, 1e9

# ---- inputs ----

NUM_PROMPTS = 1_000_000
IMAGE_SIZE = 1024
MEAN_TEXT_TOKENS, NEGATIVE_TEXT_TOKENS = 96, 120
BATCH_SIZE = 4  # prompts of a GPU in a step
GPU_COUNTS = (1, 8, 64)
MFUS = (0.18, 0.33, 0.40)
ASSUMED_MFU = 0.33


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense bf16 FLOP/s and bytes of memory."""

    name: str
    flops: float
    memory: float


H100 = Gpu("H100 80 GB", 989e12, 80 * GB)
H200 = Gpu("H200", 989e12, 141 * GB)
GPUS = (H100, H200)
NVLINK_BYTES_S = 450e9  # in each direction, within a node of 8
NETWORK_BYTES_S = 50e9  # 400 Gbit/s a GPU, between nodes
NODE = 8
HOST_BYTES_S = 55e9  # PCIe 5.0 x16 in one direction, in practice


def workload(num_gpus: int = 1, **changes) -> Workload:
    """Return the run of docs/scaling.md: the default student at 1024 px learns from the guided A14B with the default states."""
    student = StudentConfig.load(ROOT / "config" / "student_config.json").replace(image_size=IMAGE_SIZE)
    teacher = StudentConfig(
        block="wan", hidden_size=5120, depth=40, num_heads=40, ffn_dim=13824, num_channels=16, image_size=IMAGE_SIZE
    )
    base = Workload(
        teacher=teacher,
        student=student,
        latent_size=student.latent_size,
        num_experts=2,
        optimizer="muon",
        batch_size=BATCH_SIZE,
        num_processes=num_gpus,
        num_features=student.depth,
        latents_per_slot=paths_per_slot(BATCH_SIZE * num_gpus) + SAMPLES_PER_SLOT,
        num_steps=math.ceil(NUM_PROMPTS / (BATCH_SIZE * num_gpus)),
        num_prompts=NUM_PROMPTS,
        mean_text_tokens=MEAN_TEXT_TOKENS,
        negative_text_tokens=NEGATIVE_TEXT_TOKENS,
    )
    return replace(base, **changes)


# ---- tables ----


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def flops_table() -> str:
    flops = step_flops(workload(gradient_checkpointing=True))
    parts = {
        "teacher, guided (two passes)": flops.teacher,
        "student, forward": flops.student_forward,
        "student, backward": flops.student_backward,
        "student, recomputed with --gradient_checkpointing": flops.recompute,
        "Muon's orthogonalisation, shared by the prompts of a step": flops.orthogonalization,
    }
    rows = [[name, f"{value / BATCH_SIZE / 1e12:.1f}", f"{value / flops.total:.1%}"] for name, value in parts.items()]
    return markdown(["of one prompt", "TFLOP", "share"], rows)


def hours_table() -> str:
    """Tabulate an epoch: every prompt once with an answer each, and with every answer learnt from four times."""
    rows = []
    for replay in (1, 4):
        for mfu in MFUS:
            hours = [epoch_hours(num_gpus, mfu, replay) for num_gpus in GPU_COUNTS]
            rows.append(
                [str(replay), f"{mfu:.0%}", *(f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in hours)]
            )
    return markdown(["--replay", "MFU", *(f"hours on {count} GPU" for count in GPU_COUNTS)], rows)


def epoch_hours(num_gpus: int, mfu: float, replay: int = 1) -> float:
    run = workload(num_gpus, gradient_checkpointing=True, calls_per_step=1 / replay)
    return run.num_steps * step_seconds(run, mfu) / 3600


def step_seconds(run: Workload, mfu: float = ASSUMED_MFU) -> float:
    return step_flops(run).total / (mfu * H100.flops)


MEMORY_RUNS: dict[str, tuple[int, dict]] = {
    "no flags": (1, {}),
    "--gradient_checkpointing": (1, {"gradient_checkpointing": True}),
    "--gradient_checkpointing --teacher_offload": (1, {"gradient_checkpointing": True, "teacher_offload": True}),
    "--gradient_checkpointing --teacher_dtype fp8": (1, {"gradient_checkpointing": True, "teacher_dtype": "fp8"}),
    "--gradient_checkpointing --shard teacher, 8 GPUs": (8, {"gradient_checkpointing": True, "shard_teacher": True}),
    "--gradient_checkpointing --shard both, 8 GPUs": (
        8,
        {"gradient_checkpointing": True, "shard_teacher": True, "shard_student": True},
    ),
    "--gradient_checkpointing --shard both, 64 GPUs": (
        64,
        {"gradient_checkpointing": True, "shard_teacher": True, "shard_student": True},
    ),
}


def memory_table() -> str:
    rows = []
    for name, (num_gpus, changes) in MEMORY_RUNS.items():
        parts = memory_budget(workload(num_gpus, **changes))
        sizes = {part.name: part.num_bytes for part in parts}
        trained = sum(
            sizes[part] for part in ("student weights", "gradients", "optimizer moments", "average of weights")
        )
        phases, peak = phase_bytes(parts), training_peak_bytes(parts)
        fits = ["yes" if peak <= gpu.memory else "no" for gpu in GPUS]
        shown = [
            sizes["teacher weights"],
            trained,
            sizes["student activations"],
            sizes["feature targets"] + sizes["whole features"],
            phases["answering"],
            max(phases["learning"], phases["updating"]),
        ]
        rows.append([name, *(f"{value / GB:.1f}" for value in shown), *fits])
    header = [
        "flags",
        "teacher",
        "student, trained",
        "its activations",
        "hidden states",
        "all, teacher answering",
        "all, student learning",
    ]
    return markdown([*header, *(f"fits {gpu.name}" for gpu in GPUS)], rows)


def storage_table() -> str:
    run = workload(teacher_cache_batches=NUM_PROMPTS // BATCH_SIZE)
    disk = {part.name: part.num_bytes for part in disk_budget(run)}
    states = {part.name: part.num_bytes for part in memory_budget(run)}["training states"]
    latents = run.latent_bytes
    rows = [
        ["one latent in float32", f"{latents / 1e6:.2f} MB"],
        ["pool and finished samples of a GPU, default states", f"{states / GB:.2f} GB"],
        ["the same with --replay 4", f"{(states + 2 * 16 * BATCH_SIZE * latents) / GB:.2f} GB"],
        [f"prompt cache of {NUM_PROMPTS:,} prompts", f"{disk['prompt cache'] / GB:,.0f} GB"],
        [f"teacher cache of {NUM_PROMPTS:,} answers", f"{disk['teacher cache'] / GB:,.0f} GB"],
        ["checkpoints, two and one being written", f"{disk['checkpoints'] / GB:.0f} GB"],
    ]
    return markdown(["what", "bytes"], rows)


def traffic_table() -> str:
    """Tabulate the bytes that each GPU sends in a step, and how long that takes beside the step's computing."""
    rows = []
    for num_gpus in GPU_COUNTS[1:]:
        run = workload(num_gpus, gradient_checkpointing=True)
        step = step_seconds(run)
        rate, link = (NVLINK_BYTES_S, "NVLink") if num_gpus <= NODE else (NETWORK_BYTES_S, "network")
        for name, sent in traffic(run).items():
            seconds = sent / rate
            rows.append([str(num_gpus), name, f"{sent / GB:.1f}", link, f"{seconds:.2f}", f"{seconds / step:.0%}"])
    return markdown(["GPUs", "what", "GB a GPU a step", "over", "s", "of a step's computing"], rows)


def traffic(run: Workload) -> dict[str, float]:
    """Return the bytes sent by a ring: (n - 1) / n of what it gathers or scatters; an all-reduce is one of each."""
    share = (run.num_processes - 1) / run.num_processes
    student = count_parameters(run.student).total
    expert = weight_bytes(run.teacher, run.teacher_dtype)
    return {
        "student, DDP: all-reduce of fp32 gradients": 2 * share * 4 * student,
        "student, sharded: two fp32 all-gathers and a reduce-scatter": share * (2 * 4 + 4) * student,
        "teacher, sharded: all-gather of both experts in bf16": share * run.num_experts * expert,
    }


def offload_table() -> str:
    """Tabulate what bringing an expert from host memory costs, against how many calls it then answers."""
    run = workload(gradient_checkpointing=True, teacher_offload=True)
    seconds = weight_bytes(run.teacher, "bf16") / HOST_BYTES_S
    step = step_seconds(run)
    rows = [[str(calls), f"{seconds / calls:.2f}", f"{seconds / calls / step:.1%}"] for calls in (1, 4, 16, 64)]
    return markdown(
        ["steps for one expert in a row (--calls_per_expert)", "s of copying a step", "of a step's computing"], rows
    )


def separation_table() -> str:
    """Tabulate how 64 GPUs divide in balance into ranks for the teacher alone and for the student alone."""
    rows = []
    for replay in (1, 4, 16):
        flops = step_flops(workload(gradient_checkpointing=True, calls_per_step=1 / replay))
        student = flops.total - flops.teacher
        student_ranks = max(1, round(64 * student / flops.total))
        latents = 2 * workload().latent_bytes
        step = flops.total / BATCH_SIZE / (64 * ASSUMED_MFU * H100.flops)
        rows.append([str(replay), f"{64 - student_ranks} : {student_ranks}", f"{latents / step / replay / GB:.2f}"])
    return markdown(["--replay", "teacher : student ranks of 64", "GB/s of answers sent, all together"], rows)


# name: hidden_size, heads, ffn_dim, depth, channels, VAE factor, experts; the student's config file
RUNS = {
    "Wan2.1 1.3B": ((1536, 12, 8960, 30, 16, 8, 1), "student_config_0.5B.json"),
    "Wan2.2 TI2V-5B": ((3072, 24, 14336, 30, 48, 16, 1), "student_config_5B.json"),
    "Wan2.1 14B": ((5120, 40, 13824, 40, 16, 8, 1), "student_config.json"),
    "Wan2.2 A14B": ((5120, 40, 13824, 40, 16, 8, 2), "student_config.json"),
}
SMALL = {"teacher_dtype": "fp8", "gradient_checkpointing": True}


def run_of(name: str, pixels: int | None = None) -> Workload:
    """Return a run of a released teacher with its ready student, at the student's own image size unless another is given."""
    (width, heads, ffn_dim, depth, channels, factor, experts), file = RUNS[name]
    student = StudentConfig.load(ROOT / "config" / file)
    pixels = pixels or student.image_size
    shape = {"hidden_size": width, "num_heads": heads, "ffn_dim": ffn_dim, "depth": depth}
    return workload(
        teacher=StudentConfig(block="wan", num_channels=channels, image_size=pixels, **shape),
        student=student.replace(image_size=pixels),
        latent_size=pixels // factor,
        num_experts=experts,
        num_features=student.depth,
    )


def peaks_gib(run: Workload) -> tuple[float, float]:
    """Return the memory of a GPU: plain, and with the flags that save it."""
    saving = replace(run, **SMALL, teacher_offload=run.num_experts > 1)
    return tuple(peak_bytes(memory_budget(one)) / GIB for one in (run, saving))


def runs_table() -> str:
    """Tabulate what one GPU needs for each released teacher, at a batch of 4: plain, and with the flags that save memory."""
    rows = []
    for name in RUNS:
        for pixels in (512, 1024):
            run = run_of(name, pixels)
            student, (plain, saving), flops = run.student, peaks_gib(run), step_flops(run)
            hours = 1e6 * flops.total / BATCH_SIZE / (ASSUMED_MFU * H100.flops) / 3600
            rows.append(
                [name, f"{count_parameters(student).total / 1e9:.2f}B", str(pixels), f"{plain:.0f}", f"{saving:.0f}",
                 f"{flops.teacher / BATCH_SIZE / 1e12:.1f}", f"{hours:.0f}"]
            )  # fmt: skip
    header = ["teacher", "student", "pixels", "GiB", "GiB, saving", "TFLOP of a teacher's answer", "H100 hours a million answers"]  # fmt: skip
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
    "runs": runs_table,
    "flops": flops_table,
    "hours": hours_table,
    "memory": memory_table,
    "storage": storage_table,
    "traffic": traffic_table,
    "offload": offload_table,
    "separation": separation_table,
}


if __name__ == "__main__":
    print_or_write(__doc__, PAGES, TABLES)
