"""How near to its teacher a student starts, and how long that lasts: weight norm, energy, energy with refitted layers.

    python benchmarks/bench_start.py                                            # the demo's student and one of 12 %
    python benchmarks/bench_start.py --seeds 0 --steps 0                        # before training alone

Every arm takes the same AdamW steps on the same answers of the teacher, which are asked once for each seed; the calibration
asks for more, and the table says how many. The error is the mean of |student - teacher| / |teacher| over states of the
teacher's paths with held-out prompts, the teacher guided. Prints a table in Markdown, mean and largest distance from it over
the seeds, and as its last line one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.calibrated import Calibration, calibrate, calibrated_student, velocity_error
from wandistiller.projection.calibration import CalibrationOptions, draw_states, options_for
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.prompts.prompts import load_prompts
from wandistiller.sampling.flow import sigma_to_timestep
from wandistiller.sampling.recorded import embed_with_negative
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.answers import Answer, TeacherAnswers
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.states import StatesOptions, build_states
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import resolve_settings

BATCH_SIZE = 64
WARMUP_STEPS = 20
ARMS = ("weight norm", "energy", "energy, refitted")
HELD_OUT_SEED = 1_000_003  # of noises that no calibration has


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher_path", default=str(ROOT / "data/demo_teacher"))
    parser.add_argument("--student_config", default=str(ROOT / "config/demo_student_config.json"))
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["128,4,4,384", "96,3,3,128"],
        help="hidden_size,depth,num_heads,ffn_dim of each student",
    )
    parser.add_argument("--data_path", default=str(ROOT / "data/demo_prompts.txt"))
    parser.add_argument("--heldout_prompts", default=str(ROOT / "data/demo_heldout_prompts.txt"))
    parser.add_argument("--num_heldout", type=int, default=48, help="held-out paths that errors are measured on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 100, 200, 400], help="when errors are measured")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--teacher_batches", type=int, default=50, help=f"of {BATCH_SIZE} answers that are learnt from")
    parser.add_argument("--num_paths", type=int, help="the teacher's paths to calibrate on")
    parser.add_argument("--prompt_cache", default=str(ROOT / "outputs/prompt_cache"))
    return parser.parse_args()


def student_of(base: StudentConfig, shape: str) -> StudentConfig:
    sizes = map(int, shape.split(","))
    return base.replace(**dict(zip(("hidden_size", "depth", "num_heads", "ffn_dim"), sizes, strict=True)))


class Bench:
    """A teacher, its prompts, and the states that every student is measured at."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.base = StudentConfig.load(args.student_config)
        self.wan_files = open_teacher(args.teacher_path, self.base)
        settings = resolve_settings(self.wan_files)
        trained = load_prompts(args.data_path).prompts
        held_out = load_prompts(args.heldout_prompts).prompts[: args.num_heldout]
        encoder = self.wan_files.text_encoder()
        embeds, negative = embed_with_negative(
            trained + held_out, settings, encoder, self.base, args.prompt_cache, "cpu"
        )
        self.embeds = embeds.first(len(trained))
        self.held_out_embeds = embeds.part(len(trained), len(held_out))
        self.teacher = Teacher(project_experts(self.wan_files, self.base.text_max_length), settings, negative)
        self.shape = settings.latent_shape(self.base)
        steps = settings.num_inference_steps
        own = {"num_paths": len(held_out), "num_held_back": 0, "num_levels": steps, "seed": HELD_OUT_SEED}
        self.held_out = draw_states(self.teacher, self.held_out_embeds, self.shape, replace(self.options(0), **own))[0]

    def options(self, seed: int) -> CalibrationOptions:
        patch = self.wan_files.config.patch_size
        return options_for(self.shape, patch, self.args.num_paths, seed=seed, batch_size=48)

    def answers(self, seed: int) -> list[Answer]:
        """Ask the teacher for what all arms of a seed learn from."""
        states = build_states(
            StatesOptions(kind="trajectory", seed=seed),
            self.base,
            self.teacher.settings,
            len(self.embeds),
            Lanes(BATCH_SIZE),
        )
        answers, asked = TeacherAnswers(self.teacher, states, self.embeds, "cpu", torch.float32), []
        for _ in range(self.args.teacher_batches):
            answer = answers.next()
            answers.advance(answer, answer.velocity, 0.0)
            asked.append(replace(answer.released(), latents=answer.latents.clone(), states=None))
        return asked

    def error(self, student: WanLiteStudent, calibration: Calibration) -> float:
        held_out = replace(calibration, embeds=self.held_out_embeds, held_back=self.held_out)
        return velocity_error(student, held_out)


def batches_of(answers: list[Answer], embeds: PromptEmbeds, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield endless batches, drawn from all answers anew in every round."""
    latents, velocity, sigma = (
        torch.cat([getattr(answer, name) for answer in answers]) for name in ("latents", "velocity", "sigma")
    )
    prompts = [prompt for answer in answers for prompt in answer.prompts]
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(prompts), generator=generator).split(BATCH_SIZE):
            text = embeds.batch([prompts[row] for row in rows])
            yield latents[rows], velocity[rows], sigma[rows], *text


def train(student: WanLiteStudent, batches: Iterator[tuple[Tensor, ...]], num_steps: int, lr: float) -> Iterator[int]:
    """Take steps, and yield before each how many were taken."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    for step in range(num_steps):
        yield step
        latents, velocity, sigma, *text = next(batches)
        loss = F.mse_loss(student(latents, sigma_to_timestep(sigma), *text), velocity)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        warmup.step()
    yield num_steps


def make(bench: Bench, arm: str, calibration: Calibration, config: StudentConfig) -> WanLiteStudent:
    if arm == "weight norm":
        return project_teacher(bench.wan_files, config, calibration.expert)[0]
    refit = arm == "energy, refitted"
    return calibrated_student(bench.wan_files, bench.teacher, calibration, config, refit=refit)[0]


def run_seed(bench: Bench, configs: list[StudentConfig], seed: int) -> list[dict]:
    args, rows = bench.args, []
    start = time.perf_counter()
    calibration = calibrate(bench.teacher, bench.embeds, bench.shape, "high", bench.options(seed))
    seconds = time.perf_counter() - start
    answers = bench.answers(seed) if max(args.steps) else []
    for config in configs:
        for arm in ARMS:
            start = time.perf_counter()
            student = make(bench, arm, calibration, config)
            row = {"parameters": config.num_parameters, "arm": arm, "seed": seed, "errors": {}}
            row |= {"calibrate_s": seconds, "make_s": time.perf_counter() - start}
            batches = batches_of(answers, bench.embeds, seed) if answers else iter(())
            for step in train(student, batches, max(args.steps), args.lr):
                if step in args.steps:
                    row["errors"][step] = bench.error(student, calibration)
            rows.append(row)
            print(f"seed {seed}, {config.num_parameters:,}, {arm}: {row['errors']}", file=sys.stderr, flush=True)
    return rows


def spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {max(abs(value - mean) for value in values):.3f}"


def main() -> None:
    args = parse_args()
    bench = Bench(args)
    configs = [student_of(bench.base, shape) for shape in args.shapes]
    rows = [row for seed in args.seeds for row in run_seed(bench, configs, seed)]
    print("| parameters | start | " + " | ".join(f"{step} steps" for step in args.steps) + " |")
    print("|---" * (2 + len(args.steps)) + "|")
    for config in configs:
        for arm in ARMS:
            of_arm = [row for row in rows if (row["parameters"], row["arm"]) == (config.num_parameters, arm)]
            cells = [spread([row["errors"][step] for row in of_arm]) for step in args.steps]
            print(f"| {config.num_parameters:,} | {arm} | " + " | ".join(cells) + " |")
    options = bench.options(0)
    states = (options.num_paths + options.num_held_back) * options.num_levels
    learnt_from = args.teacher_batches * BATCH_SIZE if max(args.steps) else 0
    print(f"Calibration: {states} guided answers beside the {learnt_from} learnt from.")
    print(json.dumps({"teacher_path": args.teacher_path, "lr": args.lr, "calibration_states": states, "rows": rows}))


if __name__ == "__main__":
    main()
