"""Shapes of the released Wans, and what the timed benchmarks share: work in turns, medians and quartiles."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from wandistiller.device import wait_for
from wandistiller.model.config import StudentConfig

RELEASED = {  # Wan2.1 and Wan2.2: wan/configs
    "1.3B": {"hidden_size": 1536, "depth": 30, "num_heads": 12, "ffn_dim": 8960, "num_channels": 16},
    "5B": {"hidden_size": 3072, "depth": 30, "num_heads": 24, "ffn_dim": 14336, "num_channels": 48},
    "14B": {"hidden_size": 5120, "depth": 40, "num_heads": 40, "ffn_dim": 13824, "num_channels": 16},
}


def released_config(name: str, image_size: int, depth: int | None = None) -> StudentConfig:
    """Return the 2D config of a released transformer, of all its blocks unless `depth` says how many."""
    shape = RELEASED[name]
    return StudentConfig(block="wan", image_size=image_size, **shape | {"depth": depth or shape["depth"]})


def seconds_of(work: Callable[[], object], device: str) -> float:
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


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
