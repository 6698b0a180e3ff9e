"""How much of a streamed teacher's copies its answers hide: `--teacher_offload blocks` beside the teacher that stays on the device.

    python benchmarks/bench_streaming.py --teacher 14B --depth 10 --teacher_dtype fp8
    python benchmarks/bench_streaming.py --teacher 1.3B --depth 2 --pixels 64 --device cpu --dtype fp32 --batch_size 1 2

Blocks of a released shape with random weights; all blocks are alike, so that a few tell of all. Of each batch of guided answers: the
seconds of the teacher that stays, of the copies alone, of the teacher that is streamed, and overlap, the share of the shorter of the
first two that is hidden: 100 % where a streamed answer takes no longer than the longer of them. The last line is one JSON document.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.random_step import random_inputs, random_model
from benchmarks.shapes import GIB, NEGATIVE_TEXT_TOKENS, RELEASED, in_turns, quartiles, released_config
from wandistiller.budget.workload import Workload
from wandistiller.device import DTYPES, autocast, pick_device
from wandistiller.model.fp8 import to_fp8
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.streaming import NUM_ROOMS, StreamedBlocks


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=list(RELEASED), default="14B", help="its shape (default: 14B)")
    parser.add_argument("--depth", type=int, default=10, help="its blocks (default: 10)")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 2, 4], help="prompts of an answer")
    parser.add_argument("--teacher_dtype", choices=["bf16", "fp8", "fp32"], default="fp8")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--device", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


def made(args: argparse.Namespace, device: str) -> WanLiteStudent:
    torch.manual_seed(0)
    dtype = DTYPES.get(args.teacher_dtype, DTYPES[args.dtype])
    model = random_model(released_config(args.teacher, args.pixels, args.depth), device, dtype)
    return (to_fp8(model) if args.teacher_dtype == "fp8" else model).eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device, rows = pick_device(args.device), []
    streamed = made(args, "cpu")
    blocks = StreamedBlocks({"high": streamed}, device, NUM_ROOMS)
    resident = made(args, device)
    config, num_bytes = resident.config, args.depth * len(blocks.rooms[0][0])
    negative = torch.randn(NEGATIVE_TEXT_TOKENS, config.text_encoder_output_dim, device=device)
    workload = Workload(teacher=config, student=config, latent_size=config.latent_size)

    def copies() -> None:
        for number, (host, _) in enumerate(blocks.host.values()):
            blocks.rooms[number % NUM_ROOMS][0].copy_(host, non_blocking=True)
        blocks.holders = [None] * NUM_ROOMS  # what is in the rooms is not what they say

    print(f"{'prompts':<9}{'stays s':>9}{'copies s':>10}{'streamed s':>12}{'overlap':>9}")
    for batch_size in args.batch_size:
        inputs = *random_inputs(replace(workload, batch_size=batch_size), device), negative
        ask = {
            name: autocast(model, device, DTYPES[args.dtype])
            for name, model in (("stays", resident), ("streamed", streamed))
        }
        with torch.no_grad():
            assert torch.equal(ask["stays"](*inputs), ask["streamed"](*inputs)), "a streamed teacher answers otherwise"
            works = {name: partial(model, *inputs) for name, model in ask.items()} | {"copies": copies}
            taken = {name: quartiles(seconds)[1] for name, seconds in in_turns(works, args.rounds, device).items()}
        hidden = taken["stays"] + taken["copies"] - taken["streamed"]
        row = taken | {"batch_size": batch_size, "overlap": hidden / min(taken["stays"], taken["copies"])}
        rows.append(row)
        print(
            f"{batch_size:<9}{row['stays']:>9.3f}{row['copies']:>10.3f}{row['streamed']:>12.3f}{row['overlap']:>9.0%}"
        )
    rate = num_bytes / GIB / min(row["copies"] for row in rows)
    print(
        f"{args.depth} blocks of {args.teacher} in {args.teacher_dtype}, {num_bytes / GIB:.2f} GiB, copied at {rate:.1f} GiB/s"
    )
    about = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    print(json.dumps({"device": about, "torch": torch.__version__, "gib_per_s": rate, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
