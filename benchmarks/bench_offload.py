"""What `--teacher_offload` costs: bringing an expert to the device, against the answer that it then gives.

    python benchmarks/bench_offload.py --device cuda            # blocks of 14B's width
    python benchmarks/bench_offload.py --model 1.3B --depth 1   # a CPU, where nothing moves

Two experts of random weights lie in host memory (pinned where the device is a GPU) and are brought to the device in turns, as the
trainer does it. "hidden by" says how many answers in a row of one expert take as long as the swap, at the blocks that are here:
both grow with depth alike. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench_forward import SHAPES
from benchmarks.bench_fp8 import make_inputs, make_model, seconds_of
from wandistiller.device import DTYPES, autocast, wait_for
from wandistiller.sampling.teacher import OffloadedExperts

GIB = 2**30


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[name for name in SHAPES if name != "demo"], default="14B")
    parser.add_argument("--depth", type=int, default=4, help="blocks of each expert (default: 4)")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, float]:
    host = argparse.Namespace(**vars(args) | {"device": "cpu"})
    experts = {name: make_model(host) for name in ("high", "low")}
    num_bytes = sum(tensor.nbytes for tensor in [*experts["high"].parameters(), *experts["high"].buffers()])
    offloaded = OffloadedExperts(experts, args.device)
    inputs = make_inputs(experts["high"], args)
    swaps, answers = [], []
    for number in range(2 * args.rounds + 2):
        name = ("high", "low")[number % 2]
        start = time.perf_counter()
        offloaded.use(name)
        wait_for(args.device)
        swap = time.perf_counter() - start
        answer = seconds_of(
            lambda name=name: autocast(experts[name], args.device, DTYPES["bf16"])(*inputs), args.device
        )
        if number >= 2:  # the first of each pays for libraries and memory
            swaps.append(swap)
            answers.append(answer)
    swap, answer = statistics.median(swaps), statistics.median(answers)
    return {
        "expert_gib": num_bytes / GIB,
        "swap_s": swap,
        "gib_per_s": num_bytes / GIB / swap,
        "answer_s": answer,
        "answers_a_swap": swap / answer,
    }


def main() -> int:
    args = parse_args()
    found = measure(args)
    print(f"{'expert, GiB':>12}{'swap, s':>10}{'GiB/s':>8}{'answer, s':>11}{'hidden by, answers':>20}")
    print(
        f"{found['expert_gib']:>12.2f}{found['swap_s']:>10.4f}{found['gib_per_s']:>8.1f}{found['answer_s']:>11.4f}"
        f"{found['answers_a_swap']:>20.2f}"
    )
    print(json.dumps(vars(args) | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
