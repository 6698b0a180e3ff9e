"""The 2D forward pass against diffusers' WanTransformer3DModel at one frame: the same weights, outputs compared.

    python benchmarks/bench_forward.py                      # the demo teacher, and 1.3B's widths with two blocks
    python benchmarks/bench_forward.py --model 14B --depth 4 --pixels 512 1024 --device cuda --dtype bf16

Every pair is measured in turns, so that a busy machine slows both alike, and reported as the median of the pairs' ratios with
their quartiles. In bf16 each side keeps in fp32 what its own loader keeps. "error" is the distance of our velocities from those of
diffusers in fp32, relative, and "diffusers'" that of its own in this dtype. "limit" is diffusers' FLOPs over ours: what the ratio would be if both sides were matrix products alone.
"MFU" is the share of the rate that plain matrix products of this dtype reach on the device in the same run, and "products" the
share of our time that the profiler finds inside matrix products and attention. The last line is one JSON document.
"""

import argparse
import copy
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import RELEASED, in_turns, matmul_rate, ratio, ratio_text, released_config
from wandistiller.device import DTYPES
from wandistiller.model.config import StudentConfig
from wandistiller.model.sizes import BACKWARD_PASSES, transformer_flops
from wandistiller.model.transformer import FP32_ISLANDS, WanLiteStudent
from wandistiller.wan.names import transformer_settings

DEMO = ROOT / "data" / "demo_teacher" / "transformer"
TEXT_SLOTS = 512
PRODUCTS = re.compile(r"^(aten::(mm|addmm|bmm|baddbmm|.*attention.*|.*convolution.*))$")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=["demo", *RELEASED], default=["demo", "1.3B"])
    parser.add_argument("--depth", type=int, default=2, help="blocks of the released shapes (random weights)")
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 1024], help="of the picture; the demo's are 64")
    parser.add_argument("--prompt_tokens", nargs="+", type=int, default=[24, 200])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--modes", nargs="+", choices=["forward", "training"], default=["forward", "training"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of weights and products (bf16 on cuda, else fp32)")
    parser.add_argument("--compile", action="store_true", help="both sides compiled")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if torch.device(args.device).type == "cuda" else "fp32")
    return args


def make_pair(name: str, args: argparse.Namespace) -> tuple[WanLiteStudent, torch.nn.Module]:
    """Make our model and diffusers', with the same weights."""
    from diffusers import WanTransformer3DModel

    if name == "demo":
        theirs = WanTransformer3DModel.from_pretrained(DEMO, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        config = released_config(name, 512, args.depth)
        theirs = WanTransformer3DModel(
            **{key: value for key, value in transformer_settings(config).items() if key[0] != "_"}
        )
    shape = theirs.config
    config = StudentConfig(
        block="wan",
        hidden_size=shape.num_attention_heads * shape.attention_head_dim,
        depth=shape.num_layers,
        num_heads=shape.num_attention_heads,
        ffn_dim=shape.ffn_dim,
        num_channels=shape.in_channels,
        image_size=64,
        text_encoder_output_dim=shape.text_dim,
        text_max_length=TEXT_SLOTS,
    )
    with torch.device("meta"):
        ours = WanLiteStudent(config)
    weights = {key: value.squeeze(2) if value.ndim == 5 else value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(weights, assign=True)
    return ours.to(args.device).train(), theirs.to(args.device).train()


def cast(model: torch.nn.Module, dtype: torch.dtype, islands: re.Pattern) -> None:
    """Cast all parameters but those that are kept in float32."""
    for name, parameter in model.named_parameters():
        if not islands.search(name):
            parameter.data = parameter.data.to(dtype)


def make_inputs(config: StudentConfig, pixels: int, num_tokens: int, args: argparse.Namespace) -> dict:
    side = pixels // config.vae_scale_factor
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(args.batch_size, config.num_channels, side, side, generator=generator)
    text = torch.zeros(args.batch_size, TEXT_SLOTS, config.text_encoder_output_dim)
    text[:, :num_tokens] = 0.1 * torch.randn(args.batch_size, num_tokens, text.shape[-1], generator=generator)
    dtype = DTYPES[args.dtype]
    return {
        "latents": noise.to(args.device, dtype),
        "timestep": torch.full((args.batch_size,), 700.0, device=args.device),
        "text": text.to(args.device, dtype),
        "lengths": torch.full((args.batch_size,), num_tokens, device=args.device),
    }


def calls(ours, theirs, inputs: dict, num_tokens: int) -> tuple[Callable, Callable]:
    """Return each side as its users call it: ours with the text tokens and their number, diffusers' with all slots."""
    short = inputs["text"][:, :num_tokens].contiguous()
    frames = inputs["latents"][:, :, None]
    return (
        lambda: ours(inputs["latents"], inputs["timestep"], short, inputs["lengths"]),
        lambda: theirs(frames, inputs["timestep"], inputs["text"], return_dict=False)[0][:, :, 0],
    )


def run(work: Callable, is_training: bool) -> None:
    if is_training:
        work().float().square().mean().backward()
    else:
        with torch.no_grad():
            work()


def share_of_products(work: Callable, model: torch.nn.Module, is_training: bool) -> float:
    """Return the share of one pass's time that the profiler finds inside matrix products, attention and convolutions."""
    model.zero_grad()
    with torch.profiler.profile() as profiler:
        run(work, is_training)
    field = "self_device_time_total" if next(model.parameters()).is_cuda else "self_cpu_time_total"
    taken = {entry.key: getattr(entry, field) for entry in profiler.key_averages()}
    return sum(time for name, time in taken.items() if PRODUCTS.search(name)) / sum(taken.values())


def compare(
    models: tuple, works: tuple[Callable, Callable], is_training: bool, args: argparse.Namespace
) -> dict[str, float]:
    """Return the median seconds of both, and the ratio of theirs over ours."""

    def side(number: int) -> Callable[[], None]:
        def work() -> None:
            models[number].zero_grad()
            run(works[number], is_training)

        return work

    taken = in_turns({"ours": side(0), "diffusers": side(1)}, args.rounds, args.device)
    medians = {f"{name}_s": statistics.median(seconds) for name, seconds in taken.items()}
    return medians | ratio(taken["diffusers"], taken["ours"])


def measure(name: str, args: argparse.Namespace, rate: float) -> list[dict]:
    models = ours, theirs = make_pair(name, args)
    reference = theirs
    if args.dtype != "fp32":
        reference = copy.deepcopy(theirs)
        cast(ours, DTYPES[args.dtype], FP32_ISLANDS)
        cast(theirs, DTYPES[args.dtype], re.compile("|".join(theirs._keep_in_fp32_modules)))
    if args.compile:
        for model in models:
            for block in model.blocks:
                block.compile()
    rows = []
    for pixels in [64] if name == "demo" else args.pixels:
        for num_tokens in args.prompt_tokens:
            inputs = make_inputs(ours.config, pixels, num_tokens, args)
            works = calls(ours, theirs, inputs, num_tokens)
            in_fp32 = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
            with torch.no_grad():
                expected = calls(ours, reference, in_fp32, num_tokens)[1]()
                error, their_error = (float((work() - expected).norm() / expected.norm()) for work in works)
            num_image_tokens = (inputs["latents"].shape[-1] // ours.config.patch_size) ** 2
            flops = transformer_flops(ours.config, num_image_tokens, num_tokens + 1)
            limit = transformer_flops(ours.config, num_image_tokens, TEXT_SLOTS) / flops
            for mode in args.modes:
                is_training = mode == "training"
                found = compare(models, works, is_training, args)
                done = args.batch_size * flops * (1 + BACKWARD_PASSES * is_training)
                row = {
                    "model": name, "pixels": pixels, "image_tokens": num_image_tokens, "prompt_tokens": num_tokens,
                    "mode": mode, **found, "limit": limit, "relative_error": error, "diffusers_error": their_error,
                    "mfu": done / found["ours_s"] / rate, "products": share_of_products(works[0], ours, is_training),
                }  # fmt: skip
                print_row(row)
                rows.append(row)
    return rows


def print_row(row: dict) -> None:
    print(
        f"{row['model']:<6}{row['pixels']:>6}{row['image_tokens']:>8}{row['prompt_tokens']:>8}  {row['mode']:<9}"
        f"{row['ours_s']:>10.4f}{row['diffusers_s']:>12.4f}  {ratio_text(row)}{row['limit']:>7.2f}{row['relative_error']:>10.1e}"
        f"{row['diffusers_error']:>11.1e}{row['mfu']:>6.0%}{row['products']:>9.0%}",
        flush=True,
    )


def main() -> int:
    args = parse_args()
    rate = matmul_rate(args.device, DTYPES[args.dtype])
    print(f"{args.device}, {args.dtype}: plain matrix products reach {rate / 1e12:.3g} TFLOP/s")
    print(
        "model pixels  tokens  prompt  mode       ours, s  diffusers, s  ratio (quartiles)  limit     error diffusers'   MFU products"
    )
    rows = [row for name in args.model for row in measure(name, args, rate)]
    settings = {"device": args.device, "dtype": args.dtype, "depth": args.depth, "batch_size": args.batch_size}
    print(json.dumps({**settings, "compiled": args.compile, "matmul_flops_per_s": rate, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
