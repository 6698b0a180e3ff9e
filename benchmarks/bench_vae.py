"""The VAE of one picture in 2D against diffusers' AutoencoderKLWan: seconds and peak memory of decoding, same random weights.

    python benchmarks/bench_vae.py --release 2.1 2.2 --pixels 512 1024

Each decoding is a process of its own, in turns, so that neither inherits the other's memory; the memory is what is in use beyond the
weights. On a CPU the seconds are those of the process, so that other work on the machine counts little. The last line is one JSON document.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import GIB, markdown, ratio, ratio_text, seconds_of
from wandistiller.device import peak_memory_bytes
from wandistiller.wan.vae_2d import TILE_PIXELS, WanVae2D

SHAPES = {  # diffusers: scripts/convert_wan_to_diffusers.py; 2.1's is AutoencoderKLWan's default
    "2.1": {},
    "2.2": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
    },
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--release", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--pixels", nargs="+", type=int, default=[512])
    parser.add_argument("--tile_pixels", type=int, default=TILE_PIXELS, help="side of what is decoded at once in 2D")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


@torch.inference_mode()
def decode_once(who: str, release: str, pixels: int, device: str, tile_pixels: int) -> tuple[float, float]:
    """Return seconds, and GiB at the peak beyond the weights, of decoding one picture."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**SHAPES[release]).eval()
    side, channels = pixels // vae.config.scale_factor_spatial, vae.config.z_dim
    flat = WanVae2D(vae).to(device).eval() if who == "2d" else vae.to(device)
    del vae

    def decode(size: int) -> None:
        latents = torch.randn(1, channels, size, size, device=device)
        flat.decode(*((latents, tile_pixels) if who == "2d" else (latents[:, :, None],)))

    decode(2)  # what is set up once does not count
    before, start = memory(device, reset=True), time.process_time()
    seconds = seconds_of(lambda: decode(side), device)
    used = (memory(device) - before) / GIB
    return time.process_time() - start if device == "cpu" else seconds, used


def memory(device: str, reset: bool = False) -> int:
    """Return the peak of memory in bytes; after a reset, the memory in use."""
    if torch.device(device).type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return peak_memory_bytes(device) or 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM falls to what is resident
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def main() -> int:
    args, rows = parse_args(), {}
    for release in args.release:
        for pixels in args.pixels:
            found: dict[str, list[tuple[float, float]]] = {"diffusers": [], "2d": []}
            for number in range(args.rounds):
                for who in sorted(found, reverse=bool(number % 2)):
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        what = who, release, pixels, args.device, args.tile_pixels
                        found[who].append(pool.apply(decode_once, what))
            theirs, ours = (list(zip(*found[who], strict=True)) for who in ("diffusers", "2d"))
            rows[f"{release} {pixels}"] = {
                "seconds": [min(theirs[0]), min(ours[0])],
                "gib": [max(theirs[1]), max(ours[1])],
                **ratio(theirs[0], ours[0]),
            }
            print(f"{release} {pixels}: {rows[f'{release} {pixels}']}", file=sys.stderr, flush=True)
    header = ["VAE, pixels", "diffusers", "in 2D", "times as fast", "GiB, diffusers", "GiB, in 2D"]
    lines = [
        [
            name,
            *(f"{seconds:.1f} s" for seconds in row["seconds"]),
            ratio_text(row),
            *(f"{gib:.2f}" for gib in row["gib"]),
        ]
        for name, row in rows.items()
    ]
    print(markdown(header, lines))
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
