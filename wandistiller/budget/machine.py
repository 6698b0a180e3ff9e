"""What a machine offers a run: memory of its device, and how fast it multiplies matrices."""

import os
import time
from dataclasses import dataclass

import torch

from wandistiller.device import wait_for

GIB = 2**30
ASSUMED_GPU_GIB = 80.0  # an A100 or H100, where no GPU is here and none was named
MATRIX_SIZE = {
    "cuda": 8192,
    "mps": 4096,
    "cpu": 1024,
}  # large enough to reach the device's rate, small enough for a second


@dataclass(frozen=True)
class Machine:
    """The device that a budget is held against.

    Attributes:
        memory: bytes.
        unit: what has that memory.
        device: where a rate can be measured; None for a GPU that is not here.
        is_known: False where nobody said what GPU there will be.
    """

    name: str
    memory: int
    unit: str = "GPU"
    device: str | None = None
    is_known: bool = True


def find_machine(device: str, is_for_gpu: bool, assumed_gib: float | None = None) -> Machine:
    """Find the machine that a run is planned for.

    Args:
        device: the run's own.
        is_for_gpu: plan for a GPU, also where none is here.
        assumed_gib: memory of a GPU that is not here.
    """
    if assumed_gib is not None:
        return Machine(f"the GPU of --assume_gpu_gib {assumed_gib:g}", int(assumed_gib * GIB))
    if torch.device(device).type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return Machine(about.name, about.total_memory, device=device)
    if is_for_gpu:
        name = "an assumed GPU (none is here, see --assume_gpu_gib)"
        return Machine(name, int(ASSUMED_GPU_GIB * GIB), is_known=False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("this machine", memory, "process", device)


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
