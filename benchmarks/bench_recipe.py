"""What each part of the recipe brings, at equal teacher calls on the demo teacher (or another of its world).

    python benchmarks/bench_recipe.py                                    # about an hour on two cores
    python benchmarks/bench_recipe.py --arms base noise --seeds 0        # a part of it
    python benchmarks/bench_recipe.py --few_steps 1 2 4 8                # students of few steps

Every arm changes one thing of the base, or a few together. Students of few steps take as many optimiser steps as the base;
a target of theirs costs several calls, which the table shows. Students are judged by the prompt accuracy, endpoint and sharpness of what they
draw on held-out prompts, and by their velocity error on the teacher's paths and on their own. Prints a table, mean and
spread over the seeds, and as its last line one JSON document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wandistiller.targets.answers import Answer
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.replay import ReplayedAnswers
from wandistiller.wan.prompt_embeds import PromptEmbeds

BATCH_SIZE = 64
BASE = {
    "--states": "trajectory", "--init": "projection", "--replay": 4, "--lr": 3e-3, "--lr_warmup_steps": 50,
    "--renoise_fraction": 0, "--student_rollout": (0, 0), "--feature_loss_weight": 0,
}  # fmt: skip
FEATURES, ROLLOUT = {"--feature_loss_weight": 1}, {"--student_rollout": (0, 1)}
ARMS = {
    "base": {},
    "noise": {"--states": "noise"},
    "renoise": {"--states": "renoise", "--renoise_fraction": 0.75},
    "renoise a quarter": {"--renoise_fraction": 0.25},
    "random init": {"--init": "random"},
    "replay 1": {"--replay": 1},
    "features": FEATURES,
    "rollout": ROLLOUT,
    "features, rollout": FEATURES | ROLLOUT,
    "all three": FEATURES | ROLLOUT | {"--renoise_fraction": 0.25},
    "all three, random init": FEATURES | ROLLOUT | {"--renoise_fraction": 0.25, "--init": "random"},
    "prompt swap": {"--prompt_swap": 0.5},
    "endpoint weights": {"--sigma_weighting": "endpoint"},
}
MEASURES = {  # column -> digits
    "accuracy": 3,
    "endpoint": 3,
    "sharpness": 2,
    "teacher_states": 3,
    "student_states": 3,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=None, metavar="ARM", help=str(list(ARMS)))
    parser.add_argument("--few_steps", nargs="*", type=int, default=[], help="step counts of few-step students")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--teacher_calls", type=int, default=120, help=f"batches of {BATCH_SIZE} the teacher answers")
    parser.add_argument("--num_prompts", type=int, default=100, help="held-out prompts drawn")
    parser.add_argument("--teacher_path", default="data/demo_teacher")
    parser.add_argument("--student_config", default="config/demo_student_config.json")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder that keeps the students; those it has are not made again (default: a temporary one)",
    )
    args = parser.parse_args()
    if args.arms is None:
        args.arms = [] if args.few_steps else list(ARMS)
    return args


NO_TEXT = PromptEmbeds(1, 1, lambda index: torch.zeros(0, 1))


class NoTeacher:
    """A teacher that only counts the calls that a replay store makes."""

    def __init__(self):
        self.num_calls = 0
        self.lanes = Lanes(BATCH_SIZE)

    def next(self) -> Answer:
        self.num_calls += 1
        nothing = torch.zeros(BATCH_SIZE, 1, 1, 1)
        text = NO_TEXT.batch([0] * BATCH_SIZE)
        return Answer(
            latents=nothing,
            sigma=torch.zeros(BATCH_SIZE),
            prompts=[0] * BATCH_SIZE,
            prompt_embeds=text[0],
            prompt_lengths=text[1],
            velocity=nothing,
            weights=torch.ones(BATCH_SIZE),
        )


def steps_of(teacher_calls: int, replay: int) -> int:
    """Return the optimiser steps for which the teacher is asked so often: the store's last answers are not used up."""
    answers, steps = ReplayedAnswers(NoTeacher(), NO_TEXT, replay), 0
    while answers.num_calls <= teacher_calls:
        answers.next()
        steps += 1
    return steps - 1


def run(script: str, *flags: object) -> None:
    """Run a command of this repository on one thread, and show its output only where it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{script} {flags} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def train_and_judge(args: argparse.Namespace, name: str, changes: dict, seed: int, work: Path) -> dict:
    """Train one student and return its measures."""
    folder = work / f"{name.replace(',', '').replace(' ', '_')}-{seed}"
    recipe = BASE | changes
    steps = steps_of(args.teacher_calls, recipe["--replay"])
    common = {
        "--teacher_path": args.teacher_path, "--student_config": args.student_config, "--max_steps": steps,
        "--data_path": "data/demo_prompts.txt", "--eval_prompts": "data/demo_heldout_prompts.txt",
        "--eval_every": 0 if "--student_steps" in recipe else steps, "--batch_size": BATCH_SIZE, "--num_samples": 0,
        "--seed": seed, "--output_dir": folder, "--device": "cpu",
    }  # fmt: skip
    flags = []
    for flag, value in (common | recipe).items():
        flags += [flag, *(value if isinstance(value, tuple) else [value])]
    if not (folder / "evaluation.json").exists():
        run("train_distillation.py", *flags)
        heldout = [
            "--prompts_file",
            "data/demo_heldout_prompts.txt",
            "--num_prompts",
            args.num_prompts,
            "--num_seeds",
            1,
        ]
        run("evaluate_student.py", "--student", folder, *heldout, "--batch_size", 50, "--device", "cpu")
    judged = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    row = {
        "steps": steps,
        "teacher_calls": last["teacher_calls"],
        "minutes": last["elapsed_s"] / 60,
        "accuracy": judged["accuracy"]["student"]["correct"],
        "teacher_accuracy": judged["accuracy"]["teacher"]["correct"],
        "endpoint": judged["endpoint"]["latent_relative_error"],
        "sharpness": judged["high_frequency_energy"]["ratio"],
        **(last["velocity_error"] or {}),
    }
    if few := changes.get("--student_steps"):
        fewer = judged["teacher_at_fewer_steps"]
        row["teacher_same_steps"] = {key: fewer[key][str(few)] for key in ("accuracy", "latent_relative_error")}
    return row


def spread(values: list[float], digits: int) -> str:
    """Return the mean, and the largest distance from it."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} +-{max(abs(value - mean) for value in values):.{digits}f}"


def main() -> None:
    args = parse_args()
    arms = {name: ARMS[name] for name in args.arms}
    arms |= {f"{few} steps": {"--student_steps": few} | ROLLOUT for few in args.few_steps}
    with tempfile.TemporaryDirectory(prefix="bench-recipe-") as temporary, ThreadPoolExecutor(args.jobs) as pool:
        work = args.output_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        runs = {
            name: [pool.submit(train_and_judge, args, name, changes, seed, work) for seed in args.seeds]
            for name, changes in arms.items()
        }
        print(f"{'arm':<20}{'steps':>6}{'calls':>6}{'minutes':>8}" + "".join(f"{name:>18}" for name in MEASURES))
        rows = {}
        for name, futures in runs.items():
            rows[name] = [future.result() for future in futures]
            first, cells = rows[name][0], ""
            for measure, digits in MEASURES.items():
                values = [row[measure] for row in rows[name] if measure in row]
                cells += f"{spread(values, digits) if values else '-':>18}"
            print(
                f"{name:<20}{first['steps']:>6}{first['teacher_calls']:>6}{first['minutes']:>8.1f}{cells}", flush=True
            )
            if "teacher_same_steps" in first:
                same = first["teacher_same_steps"]
                print(f"{'  teacher':<40}{same['accuracy']:>18.3f}{same['latent_relative_error']:>18.3f}", flush=True)
    print(f"{'the teacher':<40}{rows[name][0]['teacher_accuracy']:>18.3f}")
    print(json.dumps({"teacher_path": args.teacher_path, "seeds": args.seeds, "arms": rows}))


if __name__ == "__main__":
    main()
