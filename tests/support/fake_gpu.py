"""A GPU that computes nothing: it finds tensors on the wrong device, and lines of the product at which the host would wait for a GPU.

Tensors on "cuda" are fake there, those of the host are real. An operator that mixes the two raises torch's own
error. What would make the host wait is written down with the line of the product that asked for it, and
answered with zeros: a number or a tensor that is read, a copy from memory that is not pinned, an index that lies on the host, a
shape that depends on values. As on Apple's GPUs, there is no float64. Autograd does not work with these tensors, so that a backward pass is left out.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from support.runs import ROOT
from support.true_size import fake_mode
from wandistiller.model.layers import rope_table, sincos_positions

aten = torch.ops.aten
PRODUCT = str(ROOT / "wandistiller")
VALUE_SHAPED = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


CUDA, META = 1, 14  # numbers of devices in torch's C++ code (c10/core/DeviceType.h)
# These methods read values; torch's own read fake ones in other ways.
READERS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")


class FakeGpu(TorchDispatchMode):
    """Makes "cuda" a device inside.

    Attributes:
        waits: the lines of the product that have made the host wait so far, each with the reason.
    """

    def __init__(self):
        super().__init__()
        self.mode = fake_mode()
        self.waits: list[str] = []
        self._pinned = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func is aten.is_pinned.default:
            return args[0].untyped_storage() in self._pinned
        if func is aten._pin_memory.default:
            pinned = args[0].clone() if isinstance(args[0], FakeTensor) else self._real(aten.clone.default, args[0])
            self._pinned[pinned.untyped_storage()] = True
            return pinned
        if kwargs.pop("pin_memory", False):
            pinned = self._real(func, *args, **kwargs)
            self._pinned[pinned.untyped_storage()] = True
            return pinned
        goes_there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not goes_there and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._real(func, *args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        if func is aten._local_scalar_dense.default and is_there(args[0]):
            self._note("a number is read")
            return self._real(torch.zeros, (), dtype=args[0].dtype).item()
        if func in VALUE_SHAPED and is_there(args[0]):
            self._note("a shape depends on values")
        if func in INDEXING and is_there(args[0]):
            self._check_indices(args[1])
        return self._without_float64(func(*args, **kwargs))

    @staticmethod
    def _without_float64(made):
        if any(
            isinstance(part, Tensor) and is_there(part) and part.dtype == torch.float64 for part in tree_leaves(made)
        ):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return made

    @staticmethod
    def _real(func, *args, **kwargs):
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _copy(self, func, args, kwargs):
        target, source = (None, args[0]) if func is aten._to_copy.default else args[:2]
        is_to = (
            torch.device(kwargs.get("device") or source.device).type == "cuda" if target is None else is_there(target)
        )
        is_queued = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if is_there(source) and not is_to:
            self._note("values are read")
            if target is not None:
                return target
            return self._real(torch.zeros, source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if is_to and not is_there(source) and not (is_queued and source.untyped_storage() in self._pinned):
            self._note("what it copies there is not pinned" if is_queued else "it copies there at once")
        return self._without_float64(func(*args, **kwargs))

    def set_data(self, tensor: FakeTensor, data: Tensor) -> None:
        """Bring a tensor to where `data` of its shape is, as `tensor.data = data` does; a fake one would lose its device by that."""
        tensor.fake_device = data.device
        if data.untyped_storage() in self._pinned:
            self._pinned[tensor.untyped_storage()] = True

    def _check_indices(self, indices) -> None:
        given = [index for index in indices if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in given):
            self._note("a shape depends on values")
        elif not all(is_there(index) for index in given):
            self._note("an index lies on the host")

    def _note(self, why: str) -> None:
        frame = sys._getframe()
        while frame and not frame.f_code.co_filename.startswith(PRODUCT):
            frame = frame.f_back
        where = "-" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(PRODUCT)}:{frame.f_lineno}"
        self.waits.append(f"{where}: {why}")


def is_there(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _read_by(name: str) -> Callable[[Tensor], object]:
    return lambda tensor: getattr(tensor.cpu(), name)()


@contextlib.contextmanager
def _guard_that_does_nothing() -> Iterator[None]:
    """Let torch's C++ code make "cuda" the current device, as taking a part of a tensor does; the meta device's guard stands in."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, registry[CUDA] = registry[CUDA], registry[META]
    try:
        yield
    finally:
        registry[CUDA] = before


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Have a GPU inside, without autograd."""
    tables = rope_table, sincos_positions
    for table in tables:
        table.cache_clear()
    try:
        gpu = FakeGpu()
        with torch.no_grad(), contextlib.ExitStack() as readers:
            for name in READERS:
                readers.enter_context(mock.patch.object(FakeTensor, name, _read_by(name), create=True))
            readers.enter_context(
                mock.patch.object(FakeTensor, "data", property(Tensor.detach, gpu.set_data), create=True)
            )
            for name in ("Stream", "stream", "current_stream"):
                readers.enter_context(mock.patch.object(torch.cuda, name, getattr(torch.cpu, name)))
            with _guard_that_does_nothing(), gpu.mode, gpu:
                yield gpu
    finally:
        for table in tables:
            table.cache_clear()  # a table without values must not reach another test
