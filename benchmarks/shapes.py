"""Shapes of the released Wans and runs that learn from them; what the timed benchmarks share: work in turns, medians, quartiles."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from wandistiller.budget.workload import Workload
from wandistiller.device import wait_for
from wandistiller.model.config import StudentConfig
from wandistiller.walk.walk import FEW_PATHS

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
H100_FLOPS = 989e12  # dense bf16, by the data sheet of H100 and H200

RELEASED = {  # Wan2.1 and Wan2.2: wan/configs
    "1.3B": {"hidden_size": 1536, "depth": 30, "num_heads": 12, "ffn_dim": 8960, "num_channels": 16},
    "5B": {"hidden_size": 3072, "depth": 30, "num_heads": 24, "ffn_dim": 14336, "num_channels": 48},
    "14B": {"hidden_size": 5120, "depth": 40, "num_heads": 40, "ffn_dim": 13824, "num_channels": 16},
}

# A teacher -> its shape here, the factor of its VAE, its experts, and the ready student for it
RUNS = {
    "Wan2.1 1.3B": ("1.3B", 8, 1, "student_config_0.5B.json"),
    "Wan2.2 TI2V-5B": ("5B", 16, 1, "student_config_5B.json"),
    "Wan2.1 14B": ("14B", 8, 1, "student_config.json"),
    "Wan2.2 A14B": ("14B", 8, 2, "student_config.json"),
}
MEAN_TEXT_TOKENS, NEGATIVE_TEXT_TOKENS = 96, 120  # long captions; Wan's own negative prompt
BATCH_SIZE = 4


def released_config(name: str, image_size: int, depth: int | None = None) -> StudentConfig:
    """Return the 2D config of a released transformer, of all its blocks unless `depth` says how many."""
    shape = RELEASED[name]
    return StudentConfig(block="wan", image_size=image_size, **shape | {"depth": depth or shape["depth"]})


def run_of(name: str, pixels: int) -> Workload:
    """Return a run of a released teacher with its ready student, at batches of 4 and the default states."""
    shape, factor, num_experts, file = RUNS[name]
    student = StudentConfig.load(ROOT / "config" / file).replace(image_size=pixels)
    return Workload(
        teacher=released_config(shape, pixels),
        student=student,
        latent_size=pixels // factor,
        num_experts=num_experts,
        optimizer="muon",
        batch_size=BATCH_SIZE,
        num_features=student.depth,
        latents_per_slot=FEW_PATHS,
        mean_text_tokens=MEAN_TEXT_TOKENS,
        negative_text_tokens=NEGATIVE_TEXT_TOKENS,
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def seconds_of(work: Callable[[], object], device: str) -> float:
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def matmul_rate(device: str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Measure the FLOP/s of square matrix products on a device for about `seconds`."""
    size = 8192 if device.startswith("cuda") else 1024  # large enough to reach the rate, small enough for a second
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right  # the first product pays for libraries
    spent, num_products = 0.0, 0
    while spent < seconds:
        spent, num_products = spent + seconds_of(lambda: left @ right, device), num_products + 1
    return num_products * 2 * size**3 / spent


def in_turns(works: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Return seconds of each work, all of them once a round, in alternating order, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in list(works) if number % 2 else reversed(works):
            seconds = seconds_of(works[name], device)
            if number:
                taken[name].append(seconds)
    return taken


def quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of pairs that were taken in the same round."""
    low, middle, high = quartiles([one / other for one, other in zip(slower, faster, strict=True)])
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def ratio_text(row: Mapping[str, float]) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
