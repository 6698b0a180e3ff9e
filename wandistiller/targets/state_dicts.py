"""How names in a state_dict say whose tensors they are: the prefix of a part, and the prefix of this process's lanes."""

import torch
from torch import Tensor

# The first dimension of a tensor whose name starts so is this process's lanes; all other tensors are the same everywhere.
LANE_PREFIX = "lanes."


def with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict of a part, named as an entry of the whole."""
    return {f"{prefix}{name}": value for name, value in state.items()}


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def belongs_to_lanes(name: str) -> bool:
    """Return whether a tensor holds what belongs to this process's lanes, whatever parts of the state it lies in."""
    return f".{LANE_PREFIX}" in f".{name}"


def check_order(order: Tensor, position: Tensor, count: int, *, of_all: bool = True) -> None:
    """Refuse an order that is not one of `count` things, or a position outside of it, which nothing would ever reach the end of.

    Args:
        of_all: whether each of them must be in it; else some of them, each once.

    Raises:
        ValueError: it is none.
    """
    expected = torch.arange(count) if of_all else order.unique()
    are_indices = order.ndim == 1 and order.dtype == torch.int64 and len(order) > 0
    is_within = are_indices and int(order.min()) >= 0 and int(order.max()) < count
    if not is_within or not torch.equal(order.sort().values, expected):
        raise ValueError(f"an order of {count} prompts or answers does not hold each of them once")
    if not 0 <= int(position) <= len(order):
        raise ValueError(f"position {int(position)} lies outside an order of {len(order)}")
