"""The GPUs that people have, for --assume_gpu. Standard library only, as flags are.

Rates are of the data sheets: products of bf16 with sums in float32, without sparsity. Nothing here multiplies in fp8.
"""

from dataclasses import dataclass

GIB = 2**30
# Bytes a second from pinned host memory: four fifths of the 31.5 and 63 GB/s of PCIe 4.0 and 5.0 with 16 lanes
PCIE_4, PCIE_5 = 25e9, 50e9
MOST_GIB = 1024.0  # so that 4080 is a card that is not known here, not its memory


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        gib: memory that CUDA reports, which is less than the name says.
        flops: FLOP/s; None where only the memory is known.
        link: bytes/s from host memory.
    """

    name: str
    gib: float
    flops: float | None = None
    link: float = PCIE_4


CARDS = {
    "3090": Card("RTX 3090", 23.6, 71e12),
    "4090": Card("RTX 4090", 23.6, 165e12),
    "5090": Card("RTX 5090", 31.4, 209e12, PCIE_5),
    "A6000": Card("RTX A6000", 47.5, 155e12),
    "L40S": Card("L40S", 44.4, 362e12),
    "A100": Card("A100 80 GB", 79.1, 312e12),
    "H100": Card("H100 SXM", 79.1, 989e12, PCIE_5),
    "H200": Card("H200", 139.8, 989e12, PCIE_5),
    "B200": Card("B200", 178.3, 2250e12, PCIE_5),
}


def card(text: str) -> Card:
    """Read the name of a card, or a number of GiB, as an argparse type."""
    from argparse import ArgumentTypeError

    known = {name.lower(): found for name, found in CARDS.items()}
    name = text.lower().removeprefix("rtx").strip(" _-")
    if name in known:
        return known[name]
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib <= MOST_GIB:
        raise ArgumentTypeError(f"{text!r}; allowed: {', '.join(CARDS)}, or a number of GiB")
    return Card(f"a GPU of {gib:g} GiB", gib)
