"""What a million prompts cost: seconds from the command to its first step, peak memory, and disk, beside two thousand.

    python benchmarks/bench_prompts.py
    python benchmarks/bench_prompts.py --num_prompts 100000 --kinds text parquet

Each run is a process of its own that distils the demo teacher for a few steps, with an empty prompt cache. The first step is the
first line of metrics.jsonl. "cached" is the same command once more: its prompts are encoded already. "all" is no run: it asks
a cache that holds every prompt for the few that a run needs, to see what a full cache costs. Peak memory is that of the process
as the system counts it.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS = ["few", "text", "csv", "parquet", "templates", "cached", "all"]
TEXT_DIM, NUM_TOKENS = 128, 20  # of the demo's text encoder
NUM_NEEDED = 2000


def prompts(count: int) -> Iterator[str]:
    colours, shapes = ["red", "green", "blue", "yellow", "white"], ["circle", "square", "triangle", "ring"]
    for index in range(count):
        yield f"a {colours[index % 5]} {shapes[index // 5 % 4]} on a dark background, number {index} of a long list of prompts"


def write(folder: Path, kind: str, count: int) -> Path:
    """Write a file of prompts and return it."""
    if kind == "templates":
        return ROOT / "data" / "prompt_templates"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        file = folder / "prompts.parquet"
        with parquet.ParquetWriter(
            file, pyarrow.schema({"caption": pyarrow.string(), "id": pyarrow.int64()})
        ) as writer:
            captions = prompts(count)
            for start in range(0, count, 10_000):  # so that this process stays small
                part = list(itertools.islice(captions, 10_000))
                writer.write(pyarrow.table({"caption": part, "id": list(range(start, start + len(part)))}))
        return file
    file = folder / f"{kind}.{'csv' if kind == 'csv' else 'txt'}"
    with open(file, "w", encoding="utf-8") as stream:
        if kind == "csv":
            stream.write("id,caption\n")
        stream.writelines(
            f'{index},"{prompt}"\n' if kind == "csv" else f"{prompt}\n" for index, prompt in enumerate(prompts(count))
        )
    return file


def measure(command: list[str], metrics: Path | None = None) -> dict[str, float]:
    """Run a command; return its seconds until the first line of `metrics`, or until its end, and its peak memory in MiB."""
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    first = None
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if first is None and metrics is not None and metrics.exists() and metrics.stat().st_size:
            first = time.monotonic() - start
        if pid:
            break
        time.sleep(0.05)
    if status:
        raise SystemExit(f"{command} failed: {process.stderr.read().decode() if process.stderr else ''}")
    return {
        "seconds": round(first or time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }


def bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def run_once(folder: Path, kind: str, data: Path, steps: int) -> dict[str, object]:
    cache, output = folder / f"cache_{kind}", folder / f"run_{kind}"
    command = [
        sys.executable, "train_distillation.py", "--data_path", data, "--prompt_cache", cache, "--output_dir", output, "--max_steps",
        steps, "--batch_size", 8, "--num_samples", 0, "--save_every", steps, "--eval_every", 0, "--device", "cpu",
    ]  # fmt: skip
    found: dict[str, object] = dict(measure(list(map(str, command)), output / "metrics.jsonl"))
    if kind == "cached":
        (output / "metrics.jsonl").unlink()
        found = dict(measure([*map(str, command), "--overwrite"], output / "metrics.jsonl"))
    found["prompts_bytes"] = bytes_below(data) if data.is_dir() else data.stat().st_size
    return found | {"cache_bytes": bytes_below(cache), "checkpoints_bytes": bytes_below(output / "checkpoints")}


READ = """
import sys, torch
from pathlib import Path
from wandistiller.wan.prompt_cache import PromptCache
keys = Path(sys.argv[2]).read_text().split()
cache = PromptCache(Path(sys.argv[1]), int(sys.argv[3]), torch.bfloat16, frozenset(keys))
assert all(len(cache.read(key)) for key in keys)
"""


def fill(folder: Path, count: int) -> None:
    """Write a cache of as many embeddings, and the keys of NUM_NEEDED of them."""
    import torch

    from wandistiller.wan.prompt_cache import PromptCache

    keys = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts(count)]
    row = torch.zeros(NUM_TOKENS, TEXT_DIM, dtype=torch.bfloat16)
    cache = PromptCache(folder / "full", TEXT_DIM, torch.bfloat16, frozenset())
    cache.fill(((key, row.clone(), False) for key in keys), lambda done: None)
    (folder / "needed.txt").write_text("\n".join(keys[:: max(1, count // NUM_NEEDED)]))


def open_full(folder: Path, count: int) -> dict[str, object]:
    """Read NUM_NEEDED embeddings from a cache of as many as there are prompts; processes of their own fill it and read it.

    What starts a process hands its peak memory on to it, so that this one must stay small.
    """
    subprocess.run([sys.executable, __file__, "--num_prompts", str(count), "--fill", folder], check=True)
    words = [sys.executable, "-c", READ, folder / "full", folder / "needed.txt", TEXT_DIM]
    return measure(list(map(str, words))) | {"cache_bytes": bytes_below(folder / "full")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_prompts", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fill:
        fill(args.fill, args.num_prompts)
        return
    import_torch = measure([sys.executable, "-c", "import torch, transformers"])
    rows: dict[str, dict[str, object]] = {"import": dict(import_torch)}
    with tempfile.TemporaryDirectory(prefix="bench_prompts-") as name:
        for kind in args.kinds:
            folder = Path(name)
            if kind == "all":
                rows[kind] = open_full(folder, args.num_prompts)
            else:
                data = write(folder, "text" if kind == "cached" else kind, 2000 if kind == "few" else args.num_prompts)
                rows[kind] = run_once(folder, kind, data, args.steps)
            print(f"{kind:<10} {rows[kind]}", flush=True)
    print(json.dumps({"num_prompts": args.num_prompts, "steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
