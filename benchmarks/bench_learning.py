"""What the parts of the recipe are worth: students of the demo teacher at equal wall time, judged on held-out prompts.

    python benchmarks/bench_learning.py --minutes 5

Each arm first runs a few steps to learn its own speed, then trains for as many steps as fit into --minutes, from the same
flags but for those that name the arm. The table is printed as arms finish; the last line is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUDENT_CONFIG = ROOT / "config" / "demo_student_config.json"
PROBE_STEPS = 24
QUIET = ["--num_samples", 0, "--save_every", 0]
# A lite student of about the demo student's size. It has no patches, so it attends to four times as many tokens.
LITE = {"block": "lite", "hidden_size": 136, "ffn_dim": 544, "patch_size": 1}

ARMS = {
    "lite, noise": ["--states", "noise"],
    "wan from random, noise": ["--init", "random", "--states", "noise"],
    "wan from random, trajectory": ["--init", "random"],
    "wan from projection, noise": ["--states", "noise"],
    "wan from projection, trajectory": [],
}
DEFAULT_ARMS = ["lite, noise", "wan from random, trajectory", "wan from projection, trajectory"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each arm (default: 5)")
    parser.add_argument("--num_prompts", type=int, default=150, help="held-out prompts to draw (default: 150)")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=DEFAULT_ARMS, metavar="ARM", help=str(list(ARMS))
    )
    parser.add_argument("--output_dir", type=Path, help="folder that keeps the students (default: a temporary one)")
    return parser.parse_args()


def run(script: str, *flags: object) -> None:
    """Run a command of this repository, and show its output only where it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{script} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def elapsed_seconds(folder: Path) -> list[float]:
    """Return the seconds from the start of the loop to the end of each step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["elapsed_s"] for line in lines]


def train_for(minutes: float, flags: list, folder: Path) -> dict:
    """Train an arm for about `minutes`; return the steps and the minutes that it took."""
    probe = folder.with_name(f"{folder.name}-probe")
    run("train_distillation.py", *flags, "--max_steps", PROBE_STEPS, "--output_dir", probe, *QUIET)
    times = elapsed_seconds(probe)
    seconds_per_step = (times[-1] - times[3]) / (len(times) - 4)  # the first steps pay for warming up
    num_steps = max(1, round(60 * minutes / seconds_per_step))
    run("train_distillation.py", *flags, "--max_steps", num_steps, "--output_dir", folder, *QUIET)
    return {"steps": num_steps, "minutes": round(elapsed_seconds(folder)[-1] / 60, 2)}


def evaluate(folder: Path, num_prompts: int) -> dict:
    heldout = ROOT / "data" / "demo_heldout_prompts.txt"
    flags = [
        "--num_prompts",
        num_prompts,
        "--num_seeds",
        1,
        "--batch_size",
        50,
        "--judge",
        "tools/demo_judge.py:judge_all",
    ]
    run("evaluate_student.py", "--student", folder, "--prompts_file", heldout, *flags)
    results = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return {
        "parameters": results["cost"]["parameters"]["student"],
        "velocity_error": round(results["velocity_error"]["mean"], 4),
        "latent_relative_error": round(results["endpoint"]["latent_relative_error"], 4),
        "accuracy": round(results["accuracy"]["student"]["correct"], 4),
        "teacher_accuracy": round(results["accuracy"]["teacher"]["correct"], 4),
    }


def main() -> None:
    args = parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as temporary:
        work = args.output_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        lite_config = work / "lite_config.json"
        lite_config.write_text(
            json.dumps(json.loads(STUDENT_CONFIG.read_text(encoding="utf-8")) | LITE), encoding="utf-8"
        )
        print(f"{'arm':<34}{'steps':>7}{'minutes':>9}{'velocity err.':>15}{'latent err.':>13}{'accuracy':>10}")
        for name in args.arms:
            config = lite_config if name.startswith("lite") else STUDENT_CONFIG
            folder = work / name.replace(",", "").replace(" ", "_")
            row = train_for(args.minutes, ["--student_config", config, *ARMS[name]], folder)
            row |= evaluate(folder, args.num_prompts)
            rows[name] = row
            print(
                f"{name:<34}{row['steps']:>7}{row['minutes']:>9.1f}{row['velocity_error']:>15.3f}"
                f"{row['latent_relative_error']:>13.3f}{row['accuracy']:>10.1%}",
                flush=True,
            )
    print(f"{'the teacher':<34}{'':>44}{next(iter(rows.values()))['teacher_accuracy']:>10.1%}")
    print(json.dumps({"minutes": args.minutes, "num_prompts": args.num_prompts, "arms": rows}))


if __name__ == "__main__":
    main()
