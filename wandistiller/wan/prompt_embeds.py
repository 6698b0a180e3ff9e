"""Embeddings of prompts in memory or on disk, padded into batches, and the mock teacher's stand-ins for them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.prompts.prompts import clean_prompt

MOCK_SCALE = 0.1
MOCK_KEPT_BYTES = 256 * 2**20  # at most, of what was made already


class PromptEmbeds:
    """Text-token embeddings of a list of prompts.

    Args:
        read: returns the embedding (n, text_dim) of the prompt at an index, from memory or from disk.
        num_full: how many of them take all text slots, which longer ones are cut to.
    """

    def __init__(self, num_prompts: int, text_dim: int, read: Callable[[int], Tensor], num_full: int = 0):
        self.num_prompts, self.text_dim, self.read, self.num_full = num_prompts, text_dim, read, num_full

    def __len__(self) -> int:
        return self.num_prompts

    def part(self, start: int, count: int) -> "PromptEmbeds":
        """Return `count` of these prompts from `start` on, which share their values."""
        return PromptEmbeds(count, self.text_dim, lambda index: self.read(start + index))

    def batch(
        self, indices: Sequence[int] | Tensor, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return prompt_embeds (B, L, text_dim), zero past each length, and prompt_lengths (B,); L is the longest of them."""
        rows = [self.read(int(index)) for index in indices]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        prompt_embeds = torch.zeros(len(rows), max([1, *lengths.tolist()]), self.text_dim, dtype=dtype)
        for padded, row in zip(prompt_embeds, rows, strict=True):
            padded[: len(row)] = row
        return to_device(prompt_embeds, device), to_device(lengths, device)


@dataclass(frozen=True)
class Embeds:
    """Embeddings of a run's `Texts`.

    Attributes:
        samples: the prompts of the sample pictures.
        negative: the negative prompt (n, text_dim); None where the teacher is not guided.
    """

    trained: PromptEmbeds
    held_out: PromptEmbeds
    samples: PromptEmbeds
    negative: Tensor | None


def mock_prompt_embeds(prompts: Sequence[str], text_dim: int, text_max_length: int = 512) -> PromptEmbeds:
    """Return noise in place of UMT5's embeddings, which depends on the prompt alone: a token for each word and one more."""
    cleaned = [clean_prompt(prompt) for prompt in prompts]

    lengths = [min(len(prompt.split()) + 1, text_max_length) for prompt in cleaned]

    @lru_cache(maxsize=max(1, MOCK_KEPT_BYTES // (text_max_length * text_dim * torch.float32.itemsize)))
    def read(index: int) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(cleaned[index].encode()).digest()[:7])
        generator = torch.Generator().manual_seed(seed)
        return MOCK_SCALE * torch.randn(lengths[index], text_dim, generator=generator)

    return PromptEmbeds(len(cleaned), text_dim, read, lengths.count(text_max_length))
