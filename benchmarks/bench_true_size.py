"""A step of the trainer at the true shapes of the released Wans, beside what `--dry_run` says.

    python benchmarks/bench_true_size.py

It needs no GPU. The tensors have shapes and no memory; torch's MemTracker counts the bytes that would be there at once, in one
process of many where the weights are sharded (tests/support/true_size.py). The last line is one JSON document.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.pages import print_tables
from benchmarks.shapes import RUNS, markdown, run_of
from wandistiller.budget.memory import memory_budget, phase_bytes
from wandistiller.budget.workload import Workload

GIB = 2**30
CHECKPOINTING = {"gradient_checkpointing": True}


def step_runs() -> dict[tuple[str, ...], Workload]:
    """Return each released teacher with its ready student, plain and with gradient checkpointing, and A14B with other flags."""
    runs = {}
    for name in RUNS:
        for pixels in (512, 1024):
            run = run_of(name, pixels)
            runs[name, str(pixels), ""] = run
            runs[name, str(pixels), "`--gradient_checkpointing`"] = replace(run, **CHECKPOINTING)
    small = replace(run, **CHECKPOINTING)
    runs[name, "1024", "the same, `--teacher_dtype fp8`"] = replace(small, teacher_dtype="fp8")
    runs[name, "1024", "the same, `--teacher_offload`"] = replace(small, teacher_offload=True)
    return runs


def rank_runs() -> dict[tuple[str, ...], Workload]:
    """Return the run of A14B at 1024 pixels in 8 and 64 processes, of which one is looked at."""
    run, runs = replace(run_of("Wan2.2 A14B", 1024), **CHECKPOINTING), {}
    for count, which in ((8, "teacher"), (8, "student"), (8, "both"), (64, "both")):
        sharded = {"shard_teacher": which != "student", "shard_student": which != "teacher"}
        runs[str(count), f"`--shard {which}`"] = replace(run, num_processes=count, **sharded)
    return runs


TABLES = {
    "memory": (["teacher", "pixels", "flags"], step_runs),
    "ranks": (["GPUs", "flags"], rank_runs),
}


def compare(run: Workload) -> dict[str, float]:
    """Return the GiB of the phases of a step, and of the budget at its peak."""
    from support.true_size import step_memory

    start = time.perf_counter()
    found = {phase: kinds["Total"] / GIB for phase, kinds in step_memory(run).items()}
    seconds = time.perf_counter() - start
    parts = [part for part in memory_budget(run) if part.name not in ("reserve", "text encoder")]
    return found | {"budget": max(phase_bytes(parts).values()) / GIB, "peak": max(found.values()), "seconds": seconds}


def table(name: str) -> tuple[str, list[dict]]:
    """Return a table in Markdown, and its rows."""
    header, runs = TABLES[name]
    lines, rows = [], []
    for words, run in runs().items():
        row = compare(run)
        rows.append({"run": " ".join(words).strip()} | row)
        shown = [row["answering"], row["learning"], row["peak"], row["budget"]]
        lines.append([*words, *(f"{value:.1f}" for value in shown), f"{row['budget'] / row['peak'] - 1:+.1%}"])
        print(rows[-1], file=sys.stderr, flush=True)
    columns = ["teacher answers", "student learns", "peak of the step", "peak of `--dry_run`", "off by"]
    return markdown([*header, *columns], lines), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), help="which (default: all)")
    args = parser.parse_args()
    made = {name: table(name) for name in args.tables}
    tables = {name: lambda text=text: text for name, (text, _) in made.items()}
    print_tables("step", tables)
    print(json.dumps({name: rows for name, (_, rows) in made.items()}))


if __name__ == "__main__":
    main()
