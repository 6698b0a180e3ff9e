"""Linear layers of 1.3B's widths in float32 on a CPU: ours (oneDNN's products) against torch's own, outputs compared.

    python benchmarks/bench_linear.py --rounds 15

Both are measured in turns, forward alone and with the backward pass; "ratio" is the median of torch's time over ours, with its
quartiles. The last line is one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import in_turns, ratio, ratio_text
from wandistiller.model.layers import HAS_MKL_AND_ONEDNN, Linear

SHAPES = [(1536, 1536), (1536, 8960), (8960, 1536)]  # in, out


def compare(layer: Linear, x: torch.Tensor, is_training: bool, rounds: int) -> dict[str, float]:
    gradients = torch.randn(*x.shape[:-1], layer.out_features)

    def run(forward: Callable) -> None:
        layer.zero_grad()
        x.grad = None
        with torch.set_grad_enabled(is_training):
            answer = forward(x)
            if is_training:
                answer.backward(gradients)

    torchs = lambda x: F.linear(x, layer.weight, layer.bias)  # noqa: E731
    taken = in_turns({"ours": lambda: run(layer), "torch": lambda: run(torchs)}, rounds, "cpu")
    return ratio(taken["torch"], taken["ours"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 4096], help="image tokens")
    parser.add_argument("--rounds", type=int, default=9)
    args, rows = parser.parse_args(), []
    if not HAS_MKL_AND_ONEDNN:
        print("torch has not both MKL and oneDNN here: every layer is torch's own")
    print("  rows    in   out  mode      ratio (quartiles)       error")
    for count, (inside, outside) in ((count, shape) for count in args.rows for shape in SHAPES):
        layer, x = Linear(inside, outside), torch.randn(1, count, inside, requires_grad=True)
        with torch.no_grad():
            expected = F.linear(x, layer.weight, layer.bias)
            error = float((layer(x) - expected).norm() / expected.norm())
        for mode in ("forward", "training"):
            row = {"rows": count, "in": inside, "out": outside, "mode": mode, "relative_error": error}
            row |= compare(layer, x, mode == "training", args.rounds)
            print(f"{count:>6}{inside:>6}{outside:>6}  {mode:<10}{ratio_text(row):<20}{error:>9.1e}", flush=True)
            rows.append(row)
    print(json.dumps({"has_onednn": HAS_MKL_AND_ONEDNN, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
