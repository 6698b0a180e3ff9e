"""What a machine offers a run: memory of its device and of the host, and how fast it multiplies matrices."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from wandistiller.budget.cards import CARDS, GIB, PCIE_4, Card
from wandistiller.device import DTYPES, wait_for

MATRIX_SIZE = {
    "cuda": 8192,
    "mps": 4096,
    "cpu": 1024,
}  # large enough to reach the device's rate, small enough for a second
# The share of a rate that a whole step reaches: of the data sheet's, what others reached with Wan 14B (docs/training.md); of that of
# plain matrix products on the device, a guess.
SHARE_OF_DATA_SHEET, SHARE_OF_PRODUCTS = 0.33, 0.4


@dataclass(frozen=True)
class Speed:
    """How fast a step is, as far as it is known.

    Attributes:
        flops: FLOP/s, of which `share` is reached.
        what: of what these are.
        link: bytes/s from host memory.
    """

    flops: float
    share: float
    what: str
    link: float = PCIE_4


@dataclass(frozen=True)
class Machine:
    """The device that a budget is held against.

    Attributes:
        memory: bytes.
        unit: what has that memory.
        device: where a rate can be measured; None for a GPU that is not here.
        card: of a GPU that is not here.
        is_known: False where nobody said what GPU there will be.
    """

    name: str
    memory: int
    unit: str = "GPU"
    device: str | None = None
    card: Card | None = None
    is_known: bool = True

    def speed(self, dtype: str) -> Speed | None:
        """Return how fast steps in this precision are, measured for a second where the device is here."""
        if self.device is not None:
            rate = matmul_rate(self.device, DTYPES[dtype])
            return Speed(rate, SHARE_OF_PRODUCTS, f"plain {dtype} products here")
        if self.card is None or self.card.flops is None or dtype != "bf16":
            return None
        return Speed(self.card.flops, SHARE_OF_DATA_SHEET, f"{self.card.name}'s data sheet", self.card.link)


def find_machine(device: str, is_for_gpu: bool, assumed: Card | None = None) -> Machine:
    """Find the machine that a run is planned for.

    Args:
        device: the run's own.
        is_for_gpu: plan for a GPU, also where none is here.
        assumed: a GPU that is not here.
    """
    if assumed is not None:
        return Machine(f"{assumed.name} (assumed)", int(assumed.gib * GIB), card=assumed)
    if torch.device(device).type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return Machine(about.name, about.total_memory, device=device)
    if is_for_gpu:
        usual = CARDS["H100"]
        name = f"an assumed GPU, {usual.name} (none is here, see --assume_gpu)"
        return Machine(name, int(usual.gib * GIB), card=usual, is_known=False)
    return Machine("this machine", host_memory(), "process", device)


def host_memory() -> int:
    """Return the bytes of memory of this machine, or of the container around this process."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def matmul_rate(device: str, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Measure the FLOP/s of square matrix products on a device for about `seconds`."""
    size = MATRIX_SIZE[torch.device(device).type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right  # the first product pays for libraries
    wait_for(device)
    start, num_products = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        left @ right
        wait_for(device)
        num_products += 1
    return num_products * 2 * size**3 / (time.perf_counter() - start)
