"""What each part of the recipe brings: the default, and the default with one part changed, on one teacher or several.

    python benchmarks/bench_recipe.py --output_dir outputs/recipe                     # the demo teacher, hours on two cores
    python benchmarks/bench_recipe.py --arms default AdamW --seeds 0                  # a part of it
    python benchmarks/bench_recipe.py --teachers data/demo_teacher outputs/icon_teacher --write
    python benchmarks/bench_recipe.py --batch_size 4 --arms default AdamW             # smaller steps, as many answers
    python benchmarks/bench_recipe.py --few_steps 1 2 4 8                             # students of few steps

Every arm gets as many answers of the teacher (counted in batches of 64, whatever the batch is), or with `--equal flops` as many
FLOPs of teacher and student together; the second stage of students of few steps comes on top of either. A teacher's folder names its prompts: those of the demo, or prompts.txt and heldout_prompts.txt in the folder. Students are
judged by what they draw from held-out prompts, four noises of each: prompts right, distance to the teacher's latents, and how the
noise is followed. A student that --output_dir holds is not made again, so that the same command resumes. Prints a table in Markdown,
mean and largest distance from it over the seeds, and as its last line one JSON document; --write puts the table into
docs/measurements.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.pages import write_section
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import BACKWARD_PASSES, num_image_tokens, transformer_flops
from wandistiller.reports.metrics import read_metrics, training_seconds
from wandistiller.run.resolve import TYPICAL_TEXT_TOKENS, suggested_lr, suggested_replay
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.settings import resolve_settings

BATCH_SIZE = 64
NUM_NOISES = 4
PAGE = ROOT / "docs" / "measurements.md"
ARMS: dict[str, dict[str, object]] = {
    "default": {},
    "AdamW": {"--optimizer": "adamw"},
    "no hidden states": {"--feature_loss_weight": 0},
    "random init": {"--init_from": "random"},
    "replay 1": {"--replay": 1},
    "replay 2": {"--replay": 2},
    "replay 8": {"--replay": 8},
    "half the learning rate": {"lr factor": 0.5},
    "twice the learning rate": {"lr factor": 2.0},
    "4 times the learning rate": {"lr factor": 4.0},
    "hidden states, weight 3": {"--feature_loss_weight": 3},
    "weight decay 0.1": {"--weight_decay": 0.1},
}
MEASURES = {  # of a row -> the title of its column, and digits
    "accuracy": ("prompts right", 3),
    "endpoint": ("endpoint", 3),
    "velocity": ("velocity error", 3),
    "norm_ratio": ("noise: size", 2),
    "cosine": ("noise: cosine", 2),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=None, metavar="ARM", help=str(list(ARMS)))
    parser.add_argument("--few_steps", nargs="*", type=int, default=[], help="step counts of few-step students")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--teacher_calls", type=int, default=160, help=f"batches of {BATCH_SIZE} the teacher answers")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="samples a step learns from")
    parser.add_argument("--equal", choices=["calls", "flops"], default="calls", help="what every arm gets as much of")
    parser.add_argument(
        "--num_prompts", type=int, default=40, help=f"held-out prompts drawn, {NUM_NOISES} noises of each"
    )
    parser.add_argument("--teachers", nargs="+", default=["data/demo_teacher"])
    parser.add_argument("--student_config", default="config/demo_student_config.json")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--output_dir", type=Path, help="folder that keeps the students (default: a temporary one)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/measurements.md")
    args = parser.parse_args()
    if args.arms is None:
        args.arms = [] if args.few_steps else list(ARMS)
    return args


@dataclass(frozen=True)
class Setting:
    """A teacher with its prompts, and what an answer of it and a step of the student cost a sample.

    Attributes:
        answer_flops: of a guided answer.
        step_flops: of a student's forward and backward pass.
    """

    teacher: str
    prompts: str
    heldout_prompts: str
    config: StudentConfig
    student_config: str
    answer_flops: float
    step_flops: float
    replay: int

    @property
    def name(self) -> str:
        return Path(self.teacher).name

    @property
    def judge(self) -> str:
        world = "icon" if (Path(self.teacher) / "pictographs.png").exists() else "demo"
        return f"tools/{world}_judge.py:judge_all"


def open_setting(teacher: str, student_config: str) -> Setting:
    folder, config = Path(teacher), StudentConfig.load(student_config)
    wan_files = open_teacher(teacher, config)
    settings = resolve_settings(wan_files)
    size = settings.latent_shape(config)[-1]
    own = wan_files.config
    answer = transformer_flops(own, num_image_tokens(own, size), TYPICAL_TEXT_TOKENS, TYPICAL_TEXT_TOKENS)
    forward = transformer_flops(config, num_image_tokens(config, size), TYPICAL_TEXT_TOKENS)
    has_own = (folder / "prompts.txt").exists()
    return Setting(
        teacher=teacher,
        prompts=str(folder / "prompts.txt") if has_own else "data/demo_prompts.txt",
        heldout_prompts=str(folder / "heldout_prompts.txt") if has_own else "data/demo_heldout_prompts.txt",
        config=config,
        student_config=student_config,
        answer_flops=answer,
        step_flops=(1 + BACKWARD_PASSES) * forward,
        replay=suggested_replay(own, config, size, is_guided=settings.uses_guidance),
    )


def steps_of(setting: Setting, args: argparse.Namespace, changes: dict) -> int:
    """Return the optimiser steps of an arm."""
    replay = changes.get("--replay", setting.replay)
    samples = args.teacher_calls * BATCH_SIZE
    if args.equal == "flops":
        budget = samples * (setting.answer_flops + setting.replay * setting.step_flops)
        samples = budget / (setting.answer_flops + replay * setting.step_flops)
    return round(samples / args.batch_size) * replay


def run(script: str, *flags: object, **environment: str) -> None:
    """Run a command of this repository on one thread, and show its output only where it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{script} {flags} failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")


def train_and_judge(setting: Setting, args: argparse.Namespace, name: str, seed: int, work: Path) -> dict:
    """Train one student and return its measures."""
    few = name.removesuffix(" steps") if name.endswith(" steps") else "none"
    changes: dict = {"--student_steps": few} | ARMS.get(name, {})
    budget = f"{args.equal} {args.teacher_calls} batch {args.batch_size}"
    kind = f"{setting.name} {Path(args.student_config).stem} {name} {budget} {seed}"
    folder = work / re.sub(r"\W+", "_", kind)
    steps = steps_of(setting, args, changes)
    optimizer = changes.get("--optimizer", "muon")
    if factor := changes.pop("lr factor", None):
        changes["--lr"] = factor * suggested_lr(optimizer, setting.config.hidden_size, args.batch_size)
    calls = round(args.teacher_calls * BATCH_SIZE / args.batch_size)
    length = {"--teacher_calls": calls} if args.equal == "calls" else {"--max_steps": steps}
    flags = length | {
        "--teacher_path": setting.teacher, "--student_config": setting.student_config, "--data_path": setting.prompts,
        "--batch_size": args.batch_size, "--num_samples": 0, "--sample_every": 0, "--eval_every": 0, "--save_every": 0,
        "--seed": seed, "--output_dir": folder, "--device": "cpu",
    } | changes  # fmt: skip
    words = [
        word for flag, value in flags.items() for word in (flag, *(value if isinstance(value, tuple) else [value]))
    ]
    if not (folder / "evaluation.json").exists():
        run("train_distillation.py", *words)
        held_out = {
            "--student": folder, "--prompts_file": setting.heldout_prompts, "--num_prompts": args.num_prompts,
            "--num_seeds": NUM_NOISES, "--batch_size": 64, "--judge": setting.judge, "--frontier_prompts": 0,
        }  # fmt: skip
        # tools/icon_judge.py finds its pictographs by this:
        run("evaluate_student.py", *(word for pair in held_out.items() for word in pair), ICON_TEACHER=setting.teacher)
    judged = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    lines = read_metrics(folder / "metrics.jsonl")
    last = lines[-1]
    noise = judged["noise"]
    row = {
        "steps": last["step"],
        "teacher_calls": last["teacher_calls"] * args.batch_size / BATCH_SIZE,
        "minutes": training_seconds(lines) / 60,
        "accuracy": judged["accuracy"]["student"]["correct"] if "accuracy" in judged else None,
        "teacher_accuracy": judged["accuracy"]["teacher"]["correct"] if "accuracy" in judged else None,
        "endpoint": judged["endpoint"]["latent_relative_error"],
        "velocity": judged["velocity_error"]["mean"] if "velocity_error" in judged else None,
        "norm_ratio": noise["norm_ratio"],
        "cosine": noise["cosine"],
    }
    print(f"{setting.name}, {name}, seed {seed}: {json.dumps(row)}", file=sys.stderr, flush=True)
    return row


def spread(values: list[float], digits: int) -> str:
    """Return the mean, and the largest distance from it."""
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f} ± {max(abs(value - mean) for value in values):.{digits}f}"


def table(rows: dict[str, dict[str, list[dict]]], args: argparse.Namespace) -> str:
    """Return the results in Markdown, a table for each teacher."""
    titles = ["arm", "seeds", "steps", "calls", *(title for title, _ in MEASURES.values())]
    lines = []
    for teacher, arms in rows.items():
        right = next(iter(arms.values()))[0]["teacher_accuracy"]
        lines += [f"`{teacher}`" + ("" if right is None else f", which draws {right:.1%} of these prompts right:"), ""]
        lines += ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
        for name, found in arms.items():
            cells = [name, str(len(found)), str(found[0]["steps"]), f"{found[0]['teacher_calls']:.0f}"]
            for measure, (_, digits) in MEASURES.items():
                values = [row[measure] for row in found if row[measure] is not None]
                cells.append(spread(values, digits) if values else "-")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    names = [*args.arms, *(f"{few} steps" for few in args.few_steps)]
    rows: dict[str, dict[str, list[dict]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-recipe-") as temporary, ThreadPoolExecutor(args.jobs) as pool:
        work = args.output_dir or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        runs = {}
        for teacher in args.teachers:
            setting = open_setting(teacher, args.student_config)
            for name in names:
                for seed in args.seeds:
                    runs[teacher, name, seed] = pool.submit(train_and_judge, setting, args, name, seed, work)
        for (teacher, name, _), future in runs.items():
            rows.setdefault(teacher, {}).setdefault(name, []).append(future.result())
    text = table(rows, args)
    print(text)
    if args.write:
        write_section(PAGE, "bench_recipe", text)
    print(json.dumps({"equal": args.equal, "seeds": args.seeds, "teachers": rows}))


if __name__ == "__main__":
    main()
