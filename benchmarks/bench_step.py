"""What a training step costs beside its arithmetic: the loop of a real run against its parts, measured alone in turns with it.

    python benchmarks/bench_step.py                                        # the demo with the trainer's defaults, on a CPU
    python benchmarks/bench_step.py --steps 40 --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers \
        --student_config config/student_config.json --data_path data/static_prompts.txt --batch_size 4

Flags that are not its own go to train_distillation.py, whose own loop is timed. After every step the clock of the loop stands
still while the same work is done again without the loop: the teacher's call where the step made one, the student's forward and
backward pass on the same answer, clipping, optimiser and weight average on a copy of the student. "overhead" is the time of the
step over the sum of these. "MFU" is the share of the rate that plain matrix products reach on the device in the same run.
The last line is one JSON document.
"""

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_distillation
import wandistiller.training.loop
from wandistiller.budget.machine import matmul_rate
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import (
    BACKWARD_PASSES,
    guided_flops,
    num_image_tokens,
    transformer_flops,
)
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.teacher import Teacher
from wandistiller.step_metrics import StepMetrics
from wandistiller.training.optimizer import WeightAverage, make_optimizer

WARM_UP = 10
PARTS = ("teacher", "student forward", "student backward", "optimizer and average")


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help=f"measured, after {WARM_UP} to warm up")
    return parser.parse_known_args()


class Bench:
    """A stand-in for `wandistiller.training.loop.train`: the same loop, with a stopwatch around each of its steps."""

    def __init__(self, train: Callable):
        self.train, self.ask = train, None
        self.rows: list[dict[str, float]] = []
        self.flops: list[float] = []
        self.asked: tuple | None = None  # the teacher's call of the step in hand
        self.dtype = torch.float32
        self.device = "cpu"

    def __call__(self, student, answers, objective, options, observer, *rest):
        self.device, self.dtype = options.device, objective.compute_dtype
        twin = copy.deepcopy(student).train()
        optimizer = make_optimizer(twin, options.optimization, options.device, self.dtype)
        average = WeightAverage(twin, options.optimization.ema_decay)
        next_answer, answer = answers.next, None

        def watched_next():
            nonlocal answer
            answer = next_answer()
            return answer

        def timed_step(metrics: StepMetrics) -> None:
            nonlocal start
            told(metrics)
            row = {"step": self.now() - start}
            call, self.asked = self.asked, None
            row["teacher"] = 0.0 if call is None else self.seconds(lambda: self.autocast(self.ask)(*call))
            progress = metrics.step / options.num_steps
            losses = []
            row["student forward"] = self.seconds(lambda: losses.append(objective(twin, answer, progress)))
            row["student backward"] = self.seconds(losses[0].total.backward)
            row["optimizer and average"] = self.seconds(lambda: self.update(twin, optimizer, average, options))
            self.rows.append(row)
            self.flops.append(self.flops_of(twin.config, answer.latents, answer.prompt_lengths, call))
            start = self.now()

        answers.next = watched_next
        told, observer.step = observer.step, timed_step
        start = self.now()
        return self.train(student, answers, objective, options, observer, *rest)

    def watch(self, ask: Callable) -> Callable:
        """Wrap the teacher's method so that it remembers what it is asked."""
        self.ask = ask

        def watched(*call: object):
            self.asked = call
            return ask(*call)

        return watched

    def now(self) -> float:
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        start = self.now()
        work()
        return self.now() - start

    def autocast(self, function: Callable) -> Callable:
        is_on = self.dtype != torch.float32
        return torch.autocast(torch.device(self.device).type, self.dtype, enabled=is_on)(function)

    @staticmethod
    def update(twin: WanLiteStudent, optimizer: torch.optim.Optimizer, average: WeightAverage, options) -> None:
        torch.nn.utils.clip_grad_norm_(twin.parameters(), options.optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if options.optimization.ema_decay > 0:
            average.update()

    @staticmethod
    def flops_of(config: StudentConfig, latents: Tensor, lengths: Tensor, call: tuple | None) -> float:
        """Count a step: three passes of the student, and of the teacher what guidance takes."""
        side, texts = latents.shape[-1], [int(length) + 1 for length in lengths]
        student = sum(transformer_flops(config, num_image_tokens(config, side), text) for text in texts)
        total = (1 + BACKWARD_PASSES) * student
        if call is not None:
            teacher, *_, asked_lengths, _layers = call
            own = teacher.experts["high"].config
            texts = [int(length) + 1 for length in asked_lengths]
            image = num_image_tokens(own, side)
            for text in texts:
                if teacher.negative_prompt_embeds is None:
                    total += transformer_flops(own, image, text)
                else:
                    total += guided_flops(own, image, text, len(teacher.negative_prompt_embeds) + 1)
        return total


def main() -> int:
    args, flags = parse_args()
    bench = Bench(wandistiller.training.loop.train)
    wandistiller.training.loop.train = bench
    Teacher.velocity_and_features = bench.watch(Teacher.velocity_and_features)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        steps = str(WARM_UP + args.steps)
        own = ["--output_dir", folder, "--max_steps", steps, "--num_samples", "0", "--save_every", "0"]
        if code := train_distillation.run_command(lambda: train_distillation.main([*flags, *own])):
            return code
    rows, flops = bench.rows[WARM_UP:], bench.flops[WARM_UP:]
    overheads = [row["step"] / sum(row[part] for part in PARTS) for row in rows]
    low, middle, high = statistics.quantiles(overheads, n=4)
    rate = matmul_rate(bench.device, bench.dtype)
    total = sum(row["step"] for row in rows)
    result = {
        "flags": flags, "device": bench.device, "steps": len(rows), "teacher_calls": sum(row["teacher"] > 0 for row in rows),
        "seconds": {name: sum(row[name] for row in rows) / len(rows) for name in ("step", *PARTS)},
        "overhead": middle, "overhead_low": low, "overhead_high": high,
        "overhead_of_sums": total / sum(row[part] for row in rows for part in PARTS),
        "matmul_flops_per_s": rate, "mfu": sum(flops) / total / rate,
    }  # fmt: skip
    for name, seconds in result["seconds"].items():
        print(f"{name:<24}{1000 * seconds:>9.1f} ms a step{'':2}{seconds / result['seconds']['step']:>7.0%}")
    print(f"teacher calls: {result['teacher_calls']} in {len(rows)} steps; MFU {result['mfu']:.0%}")
    print(f"overhead: {middle:.3f} ({low:.3f} to {high:.3f}), of the sums {result['overhead_of_sums']:.3f}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
