"""How long commands take to start: `--help` of every script, and the demo's second start until its first step.

    python benchmarks/bench_startup.py
    python benchmarks/bench_startup.py --rounds 9

Every command runs as a person runs it, in a process of its own; the demo with a first start before, that fills the prompt
cache. Measured are the seconds until a process ends, or until the first line of metrics.jsonl. On a busy machine all of that
stretches, so each demo start is preceded by a process that imports torch and nothing else. "Parts" are the
times at which --verbose says that a part of the start was done.
The last line is one JSON document.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.005
PATIENCE_S = 600.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def scripts() -> list[str]:
    """List the root scripts, all of which are commands."""
    return sorted(path.name for path in ROOT.glob("*.py"))


def seconds_of(words: list[str]) -> float:
    """Time a process that ends by itself."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def start_demo(folder: Path) -> tuple[float, dict[str, float]]:
    """Time the demo until its first step, with the times of --verbose by part, and end it then."""
    metrics = folder / "demo" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    flags = ["--verbose", "--overwrite", "--output_dir", str(folder / "demo"), "--prompt_cache", str(folder / "cache")]
    start = time.perf_counter()
    run = subprocess.Popen(
        [sys.executable, "train_distillation.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            if run.poll() is not None or time.perf_counter() - start > PATIENCE_S:
                raise RuntimeError(f"the demo did not start: {run.communicate()[0]}")
            time.sleep(POLL_S)
        elapsed_s = time.perf_counter() - start
    finally:
        run.terminate()
        said = run.communicate()[0]
    return elapsed_s, {name: float(s) for s, name in re.findall(r"^ *(\d+\.\d\d) s  (\S.*)$", said, re.MULTILINE)}


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median_s": middle, "low_s": low, "high_s": high, "least_s": min(values)}


def show(name: str, row: dict[str, float]) -> None:
    quartiles = f"({row['low_s']:.2f} to {row['high_s']:.2f})"
    print(f"{name:<46}{row['median_s']:8.2f}  {quartiles:<18}{row['least_s']:6.2f}", flush=True)


def main() -> int:
    args = parse_args()
    print("command                                       median, s  (quartiles)      least")
    helps = {}
    for script in scripts():
        helps[script] = spread([seconds_of([script, "--help"]) for _ in range(args.rounds)])
        show(f"{script} --help", helps[script])
    with tempfile.TemporaryDirectory() as folder:
        first_start_s, _ = start_demo(Path(folder))
        rounds = [(seconds_of(["-c", "import torch"]), *start_demo(Path(folder))) for _ in range(args.rounds)]
    imports, starts = (spread([taken[column] for taken in rounds]) for column in (0, 1))
    parts = {
        name: spread([taken[2].get(name, 0.0) for taken in rounds])
        for name in dict.fromkeys(n for taken in rounds for n in taken[2])
    }
    print(f"demo until its first step, first start        {first_start_s:8.2f}")
    show("demo until its first step, prompts encoded", starts)
    show("python -c 'import torch'", imports)
    for name, row in parts.items():
        show(f"  {name}", row)
    document = {"help": helps, "first_start_s": first_start_s, "second_start": starts, "import_torch": imports}
    print(json.dumps({**document, "parts": parts, "rounds": args.rounds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
