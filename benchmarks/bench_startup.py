"""How long commands take to start: `--help` of every script, and the demo's second start until its first step.

    python benchmarks/bench_startup.py --rounds 9

Every command runs as a person runs it, in a process of its own; the demo with a first start before, that fills the prompt cache.
A busy machine stretches all of that, so each demo start is preceded by a process that imports torch and nothing else. Times of
parts are those that --verbose prints. The last line is one JSON document.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import quartiles

POLL_S = 0.005


def seconds_of(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def start_demo(folder: str) -> tuple[float, dict[str, float]]:
    """Time the demo until its first step, with the times of --verbose by part, and end it then."""
    metrics = Path(folder) / "demo" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    flags = ["--verbose", "--overwrite", "--output_dir", f"{folder}/demo", "--prompt_cache", f"{folder}/cache"]
    start = time.perf_counter()
    words = [sys.executable, "train_distillation.py", *flags]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(POLL_S)
    elapsed_s, code = time.perf_counter() - start, run.poll()
    run.terminate()
    said = run.communicate()[0]
    if code is not None:
        raise SystemExit(f"the demo did not start: {said}")
    return elapsed_s, {name: float(s) for s, name in re.findall(r"^ *(\d+\.\d\d) s  (\S.*)$", said, re.MULTILINE)}


def show(name: str, seconds: list[float]) -> dict[str, float]:
    low, middle, high = quartiles(seconds)
    spread = f"({low:.2f} to {high:.2f})"
    print(f"{name:<46}{middle:8.2f}  {spread:<18}{min(seconds):6.2f}", flush=True)
    return {"median_s": middle, "low_s": low, "high_s": high, "least_s": min(seconds)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    args, rows = parser.parse_args(), {}
    print("command                                       median, s  (quartiles)      least")
    for script in sorted(path.name for path in ROOT.glob("*.py")):
        rows[script] = show(f"{script} --help", [seconds_of(script, "--help") for _ in range(args.rounds)])
    with tempfile.TemporaryDirectory() as folder:
        first_start_s, _ = start_demo(folder)
        rounds = [(seconds_of("-c", "import torch"), *start_demo(folder)) for _ in range(args.rounds)]
    print(f"demo until its first step, first start        {first_start_s:8.2f}")
    rows["second start"] = show("demo until its first step, prompts encoded", [taken[1] for taken in rounds])
    rows["import torch"] = show("python -c 'import torch'", [taken[0] for taken in rounds])
    for name in rounds[0][2]:
        rows[name] = show(f"  {name}", [parts.get(name, 0.0) for *_, parts in rounds])
    print(json.dumps({"rounds": args.rounds, "first_start_s": first_start_s, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
