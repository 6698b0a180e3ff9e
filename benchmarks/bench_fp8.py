"""A teacher in 8 bits on its device: weights kept as fp8 and widened for each product, and products in fp8 by torchao.

    python benchmarks/bench_fp8.py --device cuda                           # blocks of 14B's width at 1024 pixels
    python benchmarks/bench_fp8.py --model 1.3B --pixels 64 --rounds 1     # a CPU

All sides have the same random weights and are timed in turns. "error" is the distance of the answer from that of the weights and
products in fp32, relative; "ratio" is the time of bf16 over this one's, the median over the rounds. Products in fp8 are those of
torchao's Float8DynamicActivationFloat8WeightConfig, a scale for each row; where torchao or a GPU for it (compute capability 8.9) is
missing, the row says so. They pay where they are faster at an error near that of fp8 weights alone. The last line is one JSON
document.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench_forward import SHAPES
from wandistiller.budget.step_time import random_model
from wandistiller.device import DTYPES, autocast, wait_for
from wandistiller.model.config import StudentConfig
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.transformer import WanLiteStudent

NUM_TOKENS = 64  # text tokens of the prompt
LEAST_CAPABILITY = (8, 9)  # Ada and Hopper multiply in fp8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[name for name in SHAPES if name != "demo"], default="14B")
    parser.add_argument("--depth", type=int, default=4, help="blocks (default: 4)")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument(
        "--batch_size", type=int, default=2, help="samples; a guided call has two a prompt (default: 2)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def make_model(args: argparse.Namespace) -> WanLiteStudent:
    hidden_size, heads, ffn_dim, _, channels, text_dim = SHAPES[args.model]
    config = StudentConfig(
        block="wan",
        hidden_size=hidden_size,
        depth=args.depth,
        num_heads=heads,
        ffn_dim=ffn_dim,
        num_channels=channels,
        image_size=args.pixels,
        text_encoder_output_dim=text_dim,
    )
    torch.manual_seed(0)
    return random_model(config, args.device, torch.bfloat16).requires_grad_(False)


def with_fp8_products(model: WanLiteStudent) -> WanLiteStudent | str:
    """Return the model with the products of its blocks in fp8, or why there are none here."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        return f"not measured: {error}"
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "not measured: products in fp8 need a GPU of compute capability 8.9 or newer"
    quantize_(model.blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def make_inputs(model: WanLiteStudent, args: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    config, count = model.config, args.batch_size
    side = args.pixels // config.vae_scale_factor
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(count, config.num_channels, side, side, generator=generator)
    text = 0.1 * torch.randn(count, NUM_TOKENS, config.text_encoder_output_dim, generator=generator)
    times, lengths = torch.full((count,), 700.0), torch.full((count,), NUM_TOKENS)
    return tuple(value.to(args.device) for value in (latents, times, text, lengths))


def seconds_of(work: Callable[[], object], device: str) -> float:
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Return seconds, ratio to bf16 and error of every side; the one that is missing has a "note" alone."""
    model = make_model(args)
    inputs = make_inputs(model, args)
    expected = copy.deepcopy(model).float()(*inputs).cpu()
    sides: dict[str, WanLiteStudent | str] = {
        "bf16": model,
        "fp8 weights": to_fp8(copy.deepcopy(model)),
        "fp8 weights and products": with_fp8_products(copy.deepcopy(model)),
    }
    works = {
        name: lambda side=side: autocast(side, args.device, DTYPES["bf16"])(*inputs)
        for name, side in sides.items()
        if not isinstance(side, str)
    }
    found: dict[str, dict] = {name: {"note": side} if isinstance(side, str) else {} for name, side in sides.items()}
    for name, work in works.items():  # which warms the libraries too
        found[name]["error"] = float((work().float().cpu() - expected).norm() / expected.norm())
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            taken[name].append(seconds_of(work, args.device))
    for name, seconds in taken.items():
        ratios = [plain / own for plain, own in zip(taken["bf16"], seconds, strict=True)]
        found[name] |= {"seconds": statistics.median(seconds), "ratio": statistics.median(ratios)}
    return found


def main() -> int:
    args = parse_args()
    found = measure(args)
    print(f"{'side':<28}{'s':>10}{'ratio to bf16':>15}{'error':>10}")
    for name, row in found.items():
        print(
            f"{name:<28}"
            + (row["note"] if "note" in row else f"{row['seconds']:>10.4f}{row['ratio']:>15.2f}{row['error']:>10.1e}")
        )
    print(json.dumps(vars(args) | {"sides": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
