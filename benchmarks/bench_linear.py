"""Linear layers of 1.3B's widths in float32 on a CPU: ours (oneDNN's products) against torch's own, outputs compared.

    python benchmarks/bench_linear.py
    python benchmarks/bench_linear.py --rows 1024 --rounds 15

Each pair is measured in turns, forward alone and with the backward pass, and reported as the median of the pairs' ratios with
their quartiles. The last line is one JSON document.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from wandistiller.model.layers import HAS_MKL_AND_ONEDNN, Linear

SHAPES = [(1536, 1536), (1536, 8960), (8960, 1536)]  # in, out
PASSES = {"forward": 1, "training": 3}  # products of a layer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 4096], help="image tokens")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(layer: Linear, x: torch.Tensor, mode: str, rounds: int) -> dict[str, float]:
    """Return GFLOP/s of both, and the ratio of their times."""
    weights = torch.randn(*x.shape[:-1], layer.out_features)

    def run(forward: Callable) -> None:
        layer.zero_grad()
        x.grad = None
        with torch.set_grad_enabled(mode == "training"):
            answer = forward(x)
            if mode == "training":
                answer.backward(weights)

    works = [lambda: run(layer), lambda: run(lambda x: F.linear(x, layer.weight, layer.bias))]
    for work in works:
        work()
    pairs = [tuple(seconds_of(work) for work in works) for _ in range(rounds)]
    flops = PASSES[mode] * 2 * x.numel() * layer.out_features
    low, middle, high = statistics.quantiles([torchs / ours for ours, torchs in pairs], n=4)
    ours, torchs = (flops / 1e9 / statistics.median(times) for times in zip(*pairs, strict=True))
    return {"ours_gflops": ours, "torch_gflops": torchs, "ratio": middle, "ratio_low": low, "ratio_high": high}


def main() -> int:
    args = parse_args()
    if not HAS_MKL_AND_ONEDNN:
        print("torch has not both MKL and oneDNN here: every layer is torch's own")
    rows = []
    print("  rows    in   out  mode      ours, GFLOP/s  torch's  ratio (quartiles)      error")
    for count in args.rows:
        for inside, outside in SHAPES:
            layer, x = Linear(inside, outside), torch.randn(1, count, inside, requires_grad=True)
            with torch.no_grad():
                expected = F.linear(x, layer.weight, layer.bias)
                error = float((layer(x) - expected).norm() / expected.norm())
            for mode in PASSES:
                row = {"rows": count, "in": inside, "out": outside, "mode": mode, "relative_error": error}
                row |= compare(layer, x, mode, args.rounds)
                print(
                    f"{count:>6}{inside:>6}{outside:>6}  {mode:<9}{row['ours_gflops']:>14.0f}{row['torch_gflops']:>9.0f}"
                    f"{row['ratio']:>7.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}){error:>10.1e}",
                    flush=True,
                )
                rows.append(row)
    print(json.dumps({"has_onednn": HAS_MKL_AND_ONEDNN, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
