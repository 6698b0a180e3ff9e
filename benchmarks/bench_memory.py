"""A whole training step at true size on a GPU: its memory beside what `--dry_run` says it takes, its time and its MFU.

    python benchmarks/bench_memory.py                                           # Wan2.2-TI2V-5B
    python benchmarks/bench_memory.py --teacher 14B --arms checkpointing        # one expert of Wan2.2-A14B

A teacher of the released shape and the default student with its channels, random weights, in bf16: a guided answer, forward and
backward pass, clipping, optimizer and EMA; no hidden states, no training states. Each arm is a process of its own, so that none
inherits another's memory. MFU is the share of the rate of plain matrix products on the device. The last line is one JSON document.
It needs a CUDA GPU; without one it exits with 2.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.random_step import RandomStep
from benchmarks.shapes import GIB, RELEASED, matmul_rate, released_config
from wandistiller.budget.memory import memory_budget, training_peak_bytes
from wandistiller.budget.workload import Workload, step_flops
from wandistiller.model.config import StudentConfig

NUM_TOKENS = 64  # text tokens of every prompt
ARMS = {"plain": False, "checkpointing": True}  # with --gradient_checkpointing?


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=list(RELEASED), default="5B", help="its shape (default: 5B)")
    parser.add_argument("--image_size", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts of a step (default: 4)")
    parser.add_argument("--num_steps", type=int, default=5, help="steps of an arm, the first is not timed (default: 5)")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--one_arm", action="store_true", help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if not torch.cuda.is_available():
        print("bench_memory.py: measures a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    if args.one_arm:
        print(json.dumps(measure_arm(args)))
        return 0
    rows = {}
    print(f"{'arm':<15}{'budget GiB':>12}{'measured GiB':>14}{'measured / budget':>19}{'s a step':>10}{'MFU':>6}")
    for name in args.arms:
        row = rows[name] = run_arm(name)
        print(f"{name:<15}{row.get('error') or shown(row)}", flush=True)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(about | vars(args) | {"arms": rows}))
    return 0


def shown(row: dict) -> str:
    budget, measured = row["budget_gib"], row["measured_gib"]
    return (
        f"{budget:>12.2f}{measured:>14.2f}{measured / budget:>19.1%}{row['seconds_per_step']:>10.3f}{row['mfu']:>6.0%}"
    )


def run_arm(name: str) -> dict:
    """Return the row of one arm, or under "error" why there is none."""
    words = [sys.executable, __file__, *sys.argv[1:], "--arms", name, "--one_arm"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def measure_arm(args: argparse.Namespace) -> dict:
    teacher = released_config(args.teacher, args.image_size)
    student = StudentConfig.load(ROOT / "config" / "student_config.json")
    student = student.replace(num_channels=teacher.num_channels, image_size=args.image_size)
    workload = Workload(
        teacher=teacher,
        student=student,
        latent_size=student.latent_size,
        batch_size=args.batch_size,
        gradient_checkpointing=ARMS[args.arms[0]],
        optimizer="muon",
        latents_per_slot=0,
        mean_text_tokens=NUM_TOKENS,
        negative_text_tokens=NUM_TOKENS,
        text_encoder_parameters=0,
    )
    step = RandomStep(workload, "cuda")

    def take_step() -> None:
        step.answer()
        step.learn()
        step.update()
        step.student.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    take_step()  # the optimizer's state exists from here on
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(args.num_steps - 1):
        take_step()
    seconds = (time.perf_counter() - start) / max(1, args.num_steps - 1)
    # The context and fragmentation are outside of what max_memory_allocated counts, so the reserve stays out here too.
    parts = [part for part in memory_budget(workload) if part.name != "reserve"]
    flops = step_flops(workload)
    return {
        "budget_gib": training_peak_bytes(parts) / GIB,
        "measured_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "seconds_per_step": seconds,
        "mfu": (flops.total - flops.recompute) / seconds / matmul_rate("cuda", torch.bfloat16),
        "components_gib": {part.name: part.num_bytes / GIB for part in parts},
    }


if __name__ == "__main__":
    sys.exit(main())
