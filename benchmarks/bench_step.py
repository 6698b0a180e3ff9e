"""What a training step costs beside its arithmetic: the loop of a real run against its parts, measured alone.

    python benchmarks/bench_step.py                                        # the demo with the trainer's defaults, on a CPU
    python benchmarks/bench_step.py --steps 40 --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt --batch_size 4

Flags that are not its own go to train_distillation.py. The parts (the teacher's answer, forward and backward pass, update) are
those that `--dry_run` measures on random weights; they and the run's own steps are measured in turns. "overhead" is the time of a
step over the sum of its parts: hidden states, training states, replay, metrics. Pictures, measurements and checkpoints are off.
The last line is one JSON document.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import quartiles

WARM_UP = 10
PARTS = {
    "teacher's answer": r"(\S+) s a teacher's answer",
    "forward and backward": r"(\S+) s to learn from one",
    "update": r"(\S+) s an update",
    "sum": r"  so (\S+) s a step",
}


def train(flags: list[str], folder: str, *more: object) -> str:
    """Run the trainer and return what it printed."""
    quiet = ["--num_samples", 0, "--save_every", 0, "--eval_every", 0, "--overwrite", "--output_dir", folder]
    words = [sys.executable, "train_distillation.py", *flags, *quiet, *more]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def seconds_of_steps(folder: str) -> tuple[float, float]:
    """Return seconds a step after the warm-up, and teacher calls a step, from the run's metrics."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    seconds = statistics.fmean(after["elapsed_s"] - before["elapsed_s"] for before, after in pairwise(lines))
    return seconds, (lines[-1]["teacher_calls"] - lines[0]["teacher_calls"]) / (len(lines) - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help=f"of a round, after {WARM_UP} to warm up (default: 60)")
    parser.add_argument("--rounds", type=int, default=3)
    args, flags = parser.parse_known_args()
    if not any(flag.replace("-", "_") == "__device" for flag in flags):
        import torch

        flags += ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    steps, rows = ["--max_steps", WARM_UP + args.steps], []
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        for _ in range(args.rounds):
            said = train(flags, folder, *steps, "--dry_run")
            row = {
                name: float(found[1]) if (found := re.search(words, said)) else None for name, words in PARTS.items()
            }
            if None in row.values():
                raise SystemExit(
                    "bench_step.py: a step of this size takes too long here for --dry_run to measure its parts"
                )
            train(flags, folder, *steps)
            row["step"], row["teacher calls a step"] = seconds_of_steps(folder)
            parts = row["forward and backward"] + row["update"] + row["teacher calls a step"] * row["teacher's answer"]
            rows.append(row | {"overhead": row["step"] / parts})
    for name in rows[0]:
        low, middle, high = quartiles([row[name] for row in rows])
        print(f"{name:<24}{middle:>9.4f}  ({low:.4f} to {high:.4f})")
    print(json.dumps({"flags": flags, "steps": args.steps, "rounds": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
