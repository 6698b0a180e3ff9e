"""The processes of a run: one, or as many as torchrun started. No other module touches torch.distributed.

Gradients are averaged by DistributedDataParallel, or weights are sharded by FSDP2 (`fully_shard`). Checkpoints are
torch.distributed.checkpoint's, in safetensors files, so that a run saved by N processes is resumed by M.
"""

import contextlib
import copy
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wandistiller.command_line import torchrun_environment
from wandistiller.device import is_out_of_memory
from wandistiller.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

# One process may wait this long for another, far longer than anything that one of them does alone.
TIMEOUT = timedelta(hours=2)
# A checkpoint is cut into files of about this size: what is copied to host memory at a time.
FILE_BYTES = 2**30
_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """Who takes part in a run; made by `join`, or without arguments for a process by itself.

    Attributes:
        rank: number of this process; 0 writes files and prints.
        count: number of processes.
        per_node: processes of each machine, where all have as many; else all of them.
        device: where this one computes.
    """

    def __init__(self, device: str = "cpu", rank: int = 0, count: int = 1, per_node: int | None = None):
        self.device, self.rank, self.count = device, rank, count
        self.group: dist.ProcessGroup | None = None  # for plain values; None: torch's default group
        self.mesh = self.weights_mesh = None
        if dist.is_initialized():
            kind, own = torch.device(device).type, per_node if per_node and count % per_node == 0 else count
            self.mesh = self.weights_mesh = dist.device_mesh.init_device_mesh(kind, (count,))
            if 1 < own < count:
                names = ("copies", "shards")
                self.weights_mesh = dist.device_mesh.init_device_mesh(kind, (count // own, own), mesh_dim_names=names)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        return self.count > 1

    @property
    def can_shard(self) -> bool:
        """Whether there is a group to shard weights over; a single process that torchrun started has one too."""
        return self.mesh is not None

    def beside(self) -> "Processes":
        """Return these processes with a group of their own on the CPU, for a thread beside the training; all call this."""
        other = copy.copy(self)
        if dist.is_initialized():
            other.group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return other

    # ---- agreeing ----

    def barrier(self) -> None:
        if self.are_many:
            dist.barrier()

    def gathered(self, values: Tensor) -> Tensor:
        """Return the values (N, ...) of every process, one after another (count N, ...), on the device."""
        return torch.cat(_all_gathered(values.to(self.device)))

    def any_true(self, value: bool) -> bool:
        return bool(self.gathered(torch.tensor([float(value)])).any())

    def all_true(self, value: bool) -> bool:
        return not self.any_true(not value)

    def from_each(self, value: T) -> list[T]:
        """Return the plain values of all processes, the first one's first."""
        values = [value] * self.count
        if self.are_many:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: T) -> T:
        return self.from_each(value)[0]

    def first_then_all(self, work: Callable[[], T]) -> T:
        """Do something in the first process alone and return its answer in all; what it raises is raised in all."""
        value, message = None, None
        try:
            value = work() if self.is_first else None
        except (UserError, OSError) as error:
            message = str(error)
        value, message = self.from_first((value, message))
        if message is not None:
            raise UserError(message)
        return cast(T, value)  # without a message `work` has returned

    # ---- models ----

    def averaging(self, model: nn.Module, has_idle_parts: bool = False) -> nn.Module:
        """Return the model with its gradients averaged over the processes; the model itself where there is only one.

        Args:
            has_idle_parts: whether some parameters take no part in some steps.
        """
        if not self.are_many or any(map(is_sharded, model.parameters())):
            return model
        from torch.nn.parallel import DistributedDataParallel

        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # in some steps none is unused
        return DistributedDataParallel(
            model, forward_sync_buffers=False, find_unused_parameters=has_idle_parts, gradient_as_bucket_view=True
        )

    def shard(self, model: nn.Module | None) -> None:
        """Shard a model's parameters over the processes in place, a block of `model.blocks` at a time (FSDP2).

        Over several machines each one has a copy, sharded within it (hybrid sharding, arXiv 2304.11277), since the network between
        them is far slower than that inside.
        A process by itself leaves the model as it is, and so does every process with a model without parameters.
        """
        from torch.distributed.fsdp import fully_shard

        if not self.can_shard or model is None or not list(model.parameters()):
            return
        # A model's answer is a view, which nothing writes to.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        for block in getattr(model, "blocks", []):
            fully_shard(block, mesh=self.weights_mesh)
        fully_shard(model, mesh=self.weights_mesh)

    # ---- tensors of slots ----

    def rows(self, local: Tensor) -> Tensor:
        """Return a tensor that is sharded equally along its first dimension, from this process's rows of it."""
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False)


def join(device: str | None, pick: Callable[[str | None], str]) -> Processes:
    """Join the processes that torchrun started this one among; without torchrun it is alone.

    Args:
        device: what the person asked for; None is the best there is.
        pick: returns the device that a name stands for.

    Raises:
        UserError: the launch or the device cannot work.
    """
    given, name = [variable for variable in _SET_BY_TORCHRUN if variable in os.environ], pick(device)
    if "RANK" not in given and "WORLD_SIZE" not in given:
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)  # what names no device (pinned memory, random numbers) means this one
        return Processes(name)
    if missing := [variable for variable in _SET_BY_TORCHRUN if variable not in given]:
        raise UserError(
            f"the environment has {', '.join(given)} without {', '.join(missing)}: start several processes with torchrun "
            "--nproc_per_node N train_distillation.py ..., or unset these for a single one"
        )
    env = torchrun_environment()
    if name == "mps":
        raise UserError("--device mps: is one GPU for one process; start it without torchrun")
    if name not in ("cpu", "cuda", f"cuda:{env.local_rank}"):
        raise UserError(f"--device {name}: under torchrun each process takes the GPU of its number; leave --device out")
    backend, place = "gloo", None
    if name != "cpu":
        if env.local_world_size > (count := torch.cuda.device_count()):
            raise UserError(
                f"torchrun started {env.local_world_size} processes on a machine with {count} GPUs; give --nproc_per_node {count}"
            )
        name = f"cuda:{env.local_rank}"
        backend, place = "nccl", torch.device(name)
        torch.cuda.set_device(place)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=place)
    if env.rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (for good: what there is to print, the first process prints)
    return Processes(name, env.rank, env.world_size, env.local_world_size)


def leave() -> None:
    """End the process group, where there is one, once all have done their part."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


# ---- sharded tensors ----


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor lies in several processes. An attribute tells, because importing DTensor takes most of a second."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor put together from all processes, which must all call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _all_gathered(values: Tensor) -> list[Tensor]:
    if num_processes() == 1:
        return [values]
    parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(num_processes())]
    dist.all_gather(parts, values.contiguous())
    return parts


def each_in_one_process(work: Callable[[Tensor], Tensor], values: Iterable[Tensor]) -> list[Tensor]:
    """Return `work` of some tensors, each done in one process; at most as many as there are processes.

    All processes call this, with the same values or their shards of them. Answers are of one shape, and are exchanged.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    own, count = torch.empty(0), 0
    for count, value in enumerate(values, start=1):
        whole = full_tensor(value)
        if count == 1 or count == rank + 1:  # a process that is left over repeats the first one's work
            own = whole
        del whole, value
    return _all_gathered(work(own))[:count]


def fill(target: Tensor, values: Tensor) -> None:
    """Copy full values into a tensor, of which this process may hold a shard."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements
        values = distribute_tensor(values.to(mesh.device_type), mesh, placements, src_data_rank=None)
    target.copy_(values)


@contextlib.contextmanager
def without_averaging(model: nn.Module, is_on: bool) -> Iterator[None]:
    """Skip the gradient all-reduce inside, as in all micro-batches of a step but the last."""
    from torch.nn.parallel import DistributedDataParallel

    if is_on and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    for module in _sharded_modules(model):
        module.set_requires_gradient_sync(not is_on, recurse=False)
    yield


def reshard(model: nn.Module) -> None:
    """Free full weights that a forward pass has left (FSDP2), so that parameters are this process's shards again."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> "list[FSDPModule]":
    """Return the modules that FSDP2 shards. A method tells them apart, because importing their class takes most of a second."""
    return [cast("FSDPModule", module) for module in model.modules() if hasattr(module, "reshard")]


# ---- checkpoints ----


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy in host memory of tensors, each full or sharded, as torch.distributed.checkpoint.async_save makes it."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    # A plain copy: not pinned, not shared, by no thread or stream; it is freed once it is written.
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copies = cast("dict[str, Tensor]", stager.stage(tensors))
    stager.close()
    return copies


def save_tensors(folder: Path, tensors: dict[str, Tensor], processes: Processes) -> None:
    """Write tensors, each full or sharded, as safetensors files; all processes call this.

    Raises:
        OSError: a file could not be written, in any process; raised in all.
    """
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), _files_of(tensors), save_distributed=True)
    with _failures_as_os_error():
        dcp.save(tensors, storage_writer=writer, process_group=processes.group, no_dist=not dist.is_initialized())


@contextlib.contextmanager
def _failures_as_os_error() -> Iterator[None]:
    """Turn what torch.distributed.checkpoint raises, which is no Exception, into an OSError with the reasons of all processes."""
    from torch.distributed.checkpoint.api import CheckpointException

    warnings.filterwarnings("ignore", "torch.distributed is")  # disabled, or unavailable: a process by itself
    try:
        yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if is_out_of_memory(failure):
                raise failure from None  # no fault of the disk's
        reasons = [error_reason(failure) for failure, _ in error.failures.values()]
        raise OSError("; ".join(dict.fromkeys(reasons))) from None


def error_reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]


def _files_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the number, from 1, of the file that each tensor goes to."""
    ends = itertools.accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends, strict=True)}


def load_tensors(folder: Path, room_for: Callable[[str, torch.Size, torch.dtype], Tensor | None]) -> dict[str, Tensor]:
    """Read back what `save_tensors` wrote, by any number of processes.

    Args:
        room_for: returns a tensor to read into, full or sharded, by name, full shape and dtype; None leaves it out.

    Raises:
        OSError: a file could not be read, in any process; raised in all.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        stored = cast("TensorStorageMetadata", about)  # a safetensors file holds nothing else
        room = room_for(name, stored.size, stored.properties.dtype)
        if room is not None:
            tensors[name] = room
    with _failures_as_os_error():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors
