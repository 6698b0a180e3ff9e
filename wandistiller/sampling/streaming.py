"""A frozen teacher in host memory: its blocks reach the device on a stream of their own, one ahead of their use.

    StreamedBlocks(teacher.experts, "cuda", num_rooms("blocks", depth))

The device has room for a few blocks, or for all of one expert, which then moves only where experts change. diffusers'
`apply_group_offloading` was tried first. It answers alike, but the host waits for each block's copy, so that little is queued ahead;
each tensor is pinned alone, in a power of two of bytes, while the unpinned model is still there (half as much again for a Wan of
14B, and twice while it loads); and it needs a GPU, so that no test could hold it to the teacher that stays.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wandistiller.model.transformer import WanLiteStudent

# One block answers while the next one arrives.
NUM_ROOMS = 2
# Pinned memory comes in powers of two of bytes. Blocks share pieces of this size, of which little is lost.
PINNED_BYTES = 2**32
ALIGNMENT = 256  # of a tensor in its block, as torch's allocator has it


class StreamedBlocks:
    """Brings the blocks of experts to the device as they are asked; the experts are changed in place.

    Weights never change, so nothing is ever copied back: a block that leaves the device takes up its host copy again. What is in no
    block moves to the device for good.

    Args:
        experts: frozen models of one shape in host memory, which is pinned here for a GPU.
        device: where they answer. On a CPU the same copies are made.
        num_rooms: blocks that the device has room for, two or more.
    """

    def __init__(self, experts: Mapping[str, WanLiteStudent], device: str | torch.device, num_rooms: int):
        device = torch.device(device)
        self.backend = torch.get_device_module(device)  # torch.cpu has streams too, in which nothing is ever queued
        self.copies = self.backend.Stream()
        stacks = [list(expert.blocks) for expert in experts.values()]
        for expert in experts.values():
            _move_rest(expert, device)
        layout = _offsets(tensors_of(stacks[0][0]))
        self.host: dict[nn.Module, tuple[Tensor, list[Tensor]]] = {}
        model = tensors_of(stacks[0][0])
        for stack in stacks:
            for block, memory in zip(stack, _host_memory(len(stack), layout[-1], device), strict=True):
                views = _views(model, memory, layout)
                for tensor, view in zip(tensors_of(block), views, strict=True):
                    view.copy_(tensor)
                    tensor.data = view  # one at a time, so that no expert is there twice
                self.host[block] = memory, views
        memories = [torch.empty(layout[-1], dtype=torch.uint8, device=device) for _ in range(num_rooms)]
        self.rooms = [(memory, _views(model, memory, layout)) for memory in memories]
        self.holders: list[nn.Module | None] = [None] * num_rooms
        self.next_room = 0
        self.following = {block: stack[(i + 1) % len(stack)] for stack in stacks for i, block in enumerate(stack)}
        before = torch.compiler.disable(self._before)
        for block in self.following:
            block.register_forward_pre_hook(before)

    @torch.inference_mode(False)  # because a block brought in while a picture is drawn serves training later
    @torch.no_grad()
    def _before(self, block: nn.Module, _inputs: tuple) -> None:
        """Have this block on the device, and let the next one come while it answers."""
        self._bring(block, block)  # has come already, but for the first block of an expert
        self.backend.current_stream().wait_stream(self.copies)
        self._bring(self.following[block], block)

    def _bring(self, block: nn.Module, in_use: nn.Module) -> None:
        if block in self.holders:
            return
        room = self.next_room
        if self.holders[room] is in_use:
            room = (room + 1) % len(self.rooms)
        self.next_room = (room + 1) % len(self.rooms)
        if (leaving := self.holders[room]) is not None:
            _point(leaving, self.host[leaving][1])
        memory, views = self.rooms[room]
        self.copies.wait_stream(self.backend.current_stream())  # which may still read what is in the room
        with self.backend.stream(self.copies):
            memory.copy_(self.host[block][0], non_blocking=True)
        _point(block, views)
        self.holders[room] = block


def num_rooms(offload: str, depth: int) -> int:
    """Return the blocks that the device has room for, by the value of --teacher_offload."""
    return depth if offload == "experts" else NUM_ROOMS


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _point(block: nn.Module, views: Sequence[Tensor]) -> None:
    for tensor, view in zip(tensors_of(block), views, strict=True):
        tensor.data = view


def _move_rest(expert: WanLiteStudent, device: torch.device) -> None:
    in_blocks = set(map(id, tensors_of(expert.blocks)))
    for tensor in tensors_of(expert):
        if id(tensor) not in in_blocks:
            tensor.data = tensor.data.to(device)


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Return where each tensor begins in a block's memory, and the bytes of all."""
    offsets = [0]
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        offsets.append(offsets[-1] + ALIGNMENT * math.ceil(num_bytes / ALIGNMENT))
    return offsets


def _views(tensors: Sequence[Tensor], memory: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    """Return a block's memory (bytes) as tensors of these shapes."""
    return [
        memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, offsets[:-1], strict=True)
    ]


def _host_memory(num_blocks: int, block_bytes: int, device: torch.device) -> list[Tensor]:
    """Return the memory of each block, pinned for a GPU."""
    is_pinned, counts = device.type == "cuda", _blocks_of_pieces(num_blocks, block_bytes)
    pieces = [torch.empty(count, block_bytes, dtype=torch.uint8, pin_memory=is_pinned) for count in counts]
    return [row for piece in pieces for row in piece.unbind()]


def pinned_bytes(num_blocks: int, block_bytes: int) -> int:
    """Return the bytes of pinned memory that an expert's blocks take."""
    return sum(2 ** math.ceil(math.log2(count * block_bytes)) for count in _blocks_of_pieces(num_blocks, block_bytes))


def _blocks_of_pieces(num_blocks: int, block_bytes: int) -> list[int]:
    most = max(1, PINNED_BYTES // block_bytes)
    return [min(most, num_blocks - start) for start in range(0, num_blocks, most)]
