"""A large teacher on its device: weights and products in 8 bits, and the swap of two offloaded experts.

    python benchmarks/bench_fp8.py --device cuda                           # blocks of 14B's width at 1024 pixels
    python benchmarks/bench_fp8.py --model 1.3B --depth 1 --pixels 64 --rounds 1     # a CPU

All sides have the same random weights and are timed in turns. "error" is the relative distance of the answer from that of weights
and products in fp32; "ratio" is the time of bf16 over this one's, the median over the rounds. Products in fp8 are torchao's
Float8DynamicActivationFloat8WeightConfig, a scale for each row; where torchao or a GPU for it (compute capability 8.9) is missing,
the row says so. Two experts then lie in host memory (pinned if the device is a GPU) and are brought to it in turns, as
`--teacher_offload` does; both times grow with depth alike. The last line is one JSON document.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import RELEASED, in_turns, ratio, ratio_text, released_config, seconds_of
from wandistiller.budget.machine import GIB
from wandistiller.budget.step_time import random_model
from wandistiller.device import DTYPES, autocast
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.teacher import OffloadedExperts

NUM_TOKENS = 64  # text tokens of the prompt
LEAST_CAPABILITY = (8, 9)  # Ada and Hopper multiply in fp8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(RELEASED), default="14B")
    parser.add_argument("--depth", type=int, default=4, help="blocks (default: 4)")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=2, help="samples; guidance has two a prompt (default: 2)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def make_model(args: argparse.Namespace, device: str) -> WanLiteStudent:
    torch.manual_seed(0)
    config = released_config(args.model, args.pixels, args.depth)
    return random_model(config, device, torch.bfloat16).requires_grad_(False)


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
    side, generator = args.pixels // config.vae_scale_factor, torch.Generator().manual_seed(1)
    latents = torch.randn(count, config.num_channels, side, side, generator=generator)
    text = 0.1 * torch.randn(count, NUM_TOKENS, config.text_encoder_output_dim, generator=generator)
    times, lengths = torch.full((count,), 700.0), torch.full((count,), NUM_TOKENS)
    return tuple(value.to(args.device) for value in (latents, times, text, lengths))


@torch.no_grad()
def measure_sides(args: argparse.Namespace) -> dict[str, dict]:
    """Return seconds, ratio to bf16 and error of every side; one that is missing has a "note" alone."""
    model = make_model(args, args.device)
    inputs = make_inputs(model, args)
    expected = copy.deepcopy(model).float()(*inputs)
    sides = {
        "bf16": model,
        "fp8 weights": to_fp8(copy.deepcopy(model)),
        "fp8 weights and products": with_fp8_products(copy.deepcopy(model)),
    }
    there = {name: side for name, side in sides.items() if not isinstance(side, str)}
    works = {
        name: lambda side=side: autocast(side, args.device, DTYPES["bf16"])(*inputs) for name, side in there.items()
    }
    taken = in_turns(works, args.rounds, args.device)
    found = {name: {"note": side} for name, side in sides.items() if name not in there}
    for name, work in works.items():
        error = float((work() - expected).norm() / expected.norm())
        seconds = statistics.median(taken[name])
        found[name] = {"seconds": seconds, **ratio(taken["bf16"], taken[name]), "error": error}
    return found


@torch.no_grad()
def measure_swaps(args: argparse.Namespace) -> dict[str, float]:
    experts = {name: make_model(args, "cpu") for name in ("high", "low")}
    num_bytes = sum(tensor.nbytes for tensor in [*experts["high"].parameters(), *experts["high"].buffers()])
    offloaded, inputs = OffloadedExperts(experts, args.device), make_inputs(experts["high"], args)
    swaps, answers = [], []
    for number in range(2 * args.rounds + 2):
        name = ("high", "low")[number % 2]
        swaps.append(seconds_of(lambda name=name: offloaded.use(name), args.device))
        ask = autocast(experts[name], args.device, DTYPES["bf16"])
        answers.append(seconds_of(lambda ask=ask: ask(*inputs), args.device))
    swap, answer = statistics.median(swaps[2:]), statistics.median(answers[2:])  # the first two pay for libraries
    return {"expert_gib": num_bytes / GIB, "swap_s": swap, "answer_s": answer, "answers_a_swap": swap / answer}


def main() -> int:
    args = parse_args()
    sides, swaps = measure_sides(args), measure_swaps(args)
    print(f"{'weights and products':<26}{'s':>9}  {'bf16 / this':<22}{'error':>9}")
    for name, row in sides.items():
        text = row.get("note") or f"{row['seconds']:>9.4f}  {ratio_text(row):<22}{row['error']:>9.1e}"
        print(f"{name:<26}{text}")
    print(
        f"a swap of experts of {swaps['expert_gib']:.2f} GiB takes {swaps['swap_s']:.4f} s, {swaps['answers_a_swap']:.2f} answers"
    )
    print(json.dumps(vars(args) | {"sides": sides, "swaps": swaps}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
