"""What a million prompts cost: seconds from the command to its first step, peak memory, and disk, beside two thousand.

    python benchmarks/bench_prompts.py
    python benchmarks/bench_prompts.py --num_prompts 100000 --kinds text parquet

Each run is a process of its own that distils the demo teacher for a few steps, with an empty prompt cache; "cached" is the run
from text once more, whose prompts are encoded already. The first step is the first line of metrics.jsonl, peak memory what the
system counts. The last line is one JSON document.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEW = 2000
KINDS = ["few", "text", "cached", "csv", "parquet", "templates"]


def prompts(count: int) -> list[str]:
    colours, shapes = ["red", "green", "blue", "yellow", "white"], ["circle", "square", "triangle", "ring"]
    return [f"a {colours[index % 5]} {shapes[index // 5 % 4]}, number {index} of a long list" for index in range(count)]


def write(folder: Path, kind: str, count: int) -> Path:
    """Write a file of prompts and return it."""
    if kind == "templates":
        return ROOT / "data" / "prompt_templates"
    file = folder / f"prompts.{kind if kind in ('csv', 'parquet') else 'txt'}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"caption": prompts(count), "id": list(range(count))}), file)
        return file
    lines = prompts(count)
    if kind == "csv":
        lines = ["id,caption", *(f'{index},"{line}"' for index, line in enumerate(lines))]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def measure(command: list[str], metrics: Path) -> dict[str, float]:
    """Run a command; return its seconds until the first line of `metrics`, and its peak memory in MiB."""
    start, first = time.monotonic(), None
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if first is None and metrics.exists() and metrics.stat().st_size:
            first = time.monotonic() - start
        if pid:
            break
        time.sleep(0.05)
    if status or first is None:
        raise SystemExit(f"{' '.join(command)} failed")
    cpu = round(usage.ru_utime + usage.ru_stime, 1)
    return {"first_step_s": round(first, 1), "cpu_s": cpu, "peak_mib": round(usage.ru_maxrss / 1024)}


def bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def run_once(folder: Path, data: Path, cache: Path, steps: int) -> dict[str, float]:
    flags = {
        "data_path": data, "prompt_cache": cache, "output_dir": folder / "run", "max_steps": steps, "save_every": steps,
        "batch_size": 8, "num_samples": 0, "eval_every": 0, "device": "cpu",
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    found = measure([sys.executable, "train_distillation.py", *words], folder / "run" / "metrics.jsonl")
    size = bytes_below(data) if data.is_dir() else data.stat().st_size
    checkpoints = bytes_below(folder / "run" / "checkpoints")
    return found | {"prompts_bytes": size, "cache_bytes": bytes_below(cache), "checkpoints_bytes": checkpoints}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_prompts", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=20)
    args, rows = parser.parse_args(), {}
    with tempfile.TemporaryDirectory(prefix="bench_prompts-") as scratch:
        for kind in args.kinds:
            folder = Path(scratch) / kind
            folder.mkdir()
            data = write(folder, kind, FEW if kind == "few" else args.num_prompts)
            cache = Path(scratch) / ("text" if kind == "cached" else kind) / "cache"
            rows[kind] = run_once(folder, data, cache, args.steps)
            print(f"{kind:<10} {rows[kind]}", flush=True)
    print(json.dumps({"num_prompts": args.num_prompts, "steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
