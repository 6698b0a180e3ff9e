"""The device and the precision that a run computes in, and the memory it has taken there."""

from collections.abc import Callable

import torch

from wandistiller.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str | None) -> str:
    """Return the device that a flag names, or the GPU where there is one: of NVIDIA or AMD (cuda), or of Apple (mps)."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # "meta" allocates, but computes nothing
    except (RuntimeError, AssertionError) as error:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        usable = ", ".join(["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])])
        raise UserError(
            f"--device {name!r}: cannot be used here ({str(error).splitlines()[0]}); allowed: {usable}"
        ) from None
    return name


def pick_dtype(name: str | None, device: str) -> torch.dtype:
    """Return the precision that a flag names, or bf16 on a GPU and fp32 elsewhere."""
    return DTYPES[name or ("bf16" if torch.device(device).type == "cuda" else "fp32")]


def autocast(function: Callable, device: str | torch.device, dtype: torch.dtype) -> Callable:
    """Return the function with its matrix products in `dtype`, over weights that stay float32; float32 changes nothing."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)(function)


def peak_memory_bytes(device: str) -> int | None:
    """Return the most bytes that this process has held so far: tensors on a GPU; on the CPU all of it, where the system is Linux."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # getrusage would count the process that started this one too.
        with open("/proc/self/status", encoding="utf-8") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


# torch raises no exception of its own for pinned memory, cuBLAS and the CPU's allocator; these are their words.
_OUT_OF_MEMORY = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "Storage size calculation overflowed",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, is that a device has no memory left."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def wait_for(device: str) -> None:
    """Wait until a GPU has done all that was asked of it."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def to_device(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Bring a tensor to the device; the host waits neither for the copy nor for the work queued before it.

    Whatever a step brings to the device (indices too: a GPU tensor indexed by a CPU one waits) comes this way, float64 as float32,
    since Apple's GPUs have no other.
    """
    kind = torch.device(device).type
    if kind != "cpu" and tensor.dtype == torch.float64:
        tensor = tensor.float()
    if kind == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
