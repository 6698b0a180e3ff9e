"""Embeddings of prompts in memory or on disk, padded into batches, and the mock teacher's stand-ins for them.

The cache on disk is a folder for each encoder and tokenizer, which holds shards that are only ever added. Only the text tokens of a
prompt are kept, since every later slot of Wan's text is zero.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.errors import UserError, first_line
from wandistiller.files.atomic import remove_all_leftovers
from wandistiller.files.json_files import parse_json
from wandistiller.files.tensor_files import DTYPES, StoredTensor, read_header, write_tensors
from wandistiller.prompts.prompts import clean_prompt

logger = logging.getLogger(__name__)
SHARD_BYTES = 128 * 2**20  # what a killed encoding loses at most, and what it holds in memory
MOCK_SCALE = 0.1
KEPT_BYTES = 256 * 2**20  # of embeddings stay in memory once they have been read or made


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

    def warn_of_cuts(self, slots: int) -> None:
        if self.num_full:
            print(f"Warning: {self.num_full} prompts take all {slots} tokens; longer ones were cut")

    def part(self, start: int, count: int) -> "PromptEmbeds":
        """Return `count` of these prompts from `start` on, which share their values."""
        return PromptEmbeds(count, self.text_dim, lambda index: self.read(start + index))

    def batch(self, indices: Sequence[int] | Tensor, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Return prompt_embeds (B, L, text_dim), zero past each length, and prompt_lengths (B,); L is the longest of them."""
        rows = [self.read(int(index)) for index in indices]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        prompt_embeds = torch.zeros(len(rows), max([1, *lengths.tolist()]), self.text_dim)
        for padded, row in zip(prompt_embeds, rows, strict=True):
            padded[: len(row)] = row
        return to_device(prompt_embeds, device), to_device(lengths, device)


@dataclass(frozen=True)
class Embeds:
    """Embeddings of a run's prompts.

    Attributes:
        samples: the prompts of the sample pictures.
        negative: the negative prompt (n, text_dim); None where the teacher is not guided.
    """

    trained: PromptEmbeds
    held_out: PromptEmbeds
    samples: PromptEmbeds
    negative: Tensor | None


class PromptCache:
    """Where each prompt's embedding lies, by the sha256 of the cleaned prompt; values are read on demand.

    The folder appears with its first shard, so that an encoder which is refused leaves none.

    Args:
        dtype: what the embeddings are stored in; a shard of another one is left out.
        wanted: keys that will be asked for, so that the others take no memory.
    """

    def __init__(self, folder: Path, text_dim: int, dtype: torch.dtype, wanted: frozenset[str]):
        self.folder, self.text_dim, self.dtype, self.wanted = folder, text_dim, dtype, wanted
        self._rows: dict[str, tuple[StoredTensor, str]] = {}  # with checksums
        self._checked: set[str] = set()
        remove_all_leftovers(folder)
        for path in sorted(folder.glob("*.safetensors")):
            self._add_shard(path)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def num_tokens(self, key: str) -> int:
        return self._rows[key][0].shape[0]

    def _add_shard(self, path: Path) -> None:
        try:
            header = read_header(path)
            digests = parse_json(header.metadata.get("digests", "{}"))
            for key, row in header.tensors.items():
                if row.shape[1:] != (self.text_dim,) or DTYPES.get(row.dtype) != self.dtype:
                    raise ValueError(f"an embedding is stored as {list(row.shape)} in {row.dtype}")
                if not isinstance(digests, dict) or key not in digests:
                    raise ValueError("it does not hold a checksum for each embedding")
        except ValueError as error:
            logger.warning("%s: damaged, its prompts are encoded again (%s)", path, first_line(error))
            return
        self._rows |= {key: (row, digests[key]) for key, row in header.tensors.items() if key in self.wanted}

    def read(self, key: str) -> Tensor:
        """Return the embedding (n, text_dim) of a key that is in the cache.

        Raises:
            UserError: it is not what was stored.
        """
        stored, digest = self._rows[key]
        row = stored.read()
        if key not in self._checked and _digest(row) != digest:
            raise UserError(
                f"{stored.path}: is damaged, an embedding in it is not what was written; remove this file and run again, "
                "its prompts are encoded anew"
            )
        self._checked.add(key)
        return row

    def fill(self, encoding: Iterator[tuple[str, Tensor]], progress: Callable[[int], None]) -> None:
        """Write what is encoded in shards of about SHARD_BYTES; what came before a failure is kept.

        Args:
            encoding: yields key and embedding.
            progress: called with the number of prompts done.
        """
        rows: dict[str, Tensor] = {}
        num_bytes = 0
        try:
            for done, (key, row) in enumerate(encoding, start=1):
                rows[key] = row
                num_bytes += row.nbytes
                if num_bytes >= SHARD_BYTES:
                    self._write_shard(rows)
                    rows, num_bytes = {}, 0
                progress(done)
        finally:
            if rows:
                self._write_shard(rows)

    def _write_shard(self, rows: dict[str, Tensor]) -> None:
        # A shard is named by its prompts, so that encoding a damaged shard's prompts again puts a good one in its place.
        path = self.folder / f"{hashlib.sha256(' '.join(rows).encode()).hexdigest()[:32]}.safetensors"
        digests = {key: _digest(row) for key, row in rows.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, rows, {"digests": json.dumps(digests)})
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); give --prompt_cache another folder"
            ) from None
        self._add_shard(path)


def _digest(row: Tensor) -> str:
    content = row.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{list(row.shape)}".encode() + content).hexdigest()[:16]


def kept(read: Callable[[int], Tensor], text_dim: int, text_max_length: int) -> Callable[[int], Tensor]:
    """Return a function that keeps some of the embeddings that it has read, KEPT_BYTES of the longest."""
    return lru_cache(max(1, KEPT_BYTES // (text_max_length * text_dim * torch.float32.itemsize)))(read)


def mock_prompt_embeds(prompts: Sequence[str], text_dim: int, text_max_length: int = 512) -> PromptEmbeds:
    """Return noise in place of UMT5's embeddings, which depends on the prompt alone: a token for each word and one more."""
    cleaned = [clean_prompt(prompt) for prompt in prompts]

    lengths = [min(len(prompt.split()) + 1, text_max_length) for prompt in cleaned]

    def read(index: int) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(cleaned[index].encode()).digest()[:7])
        generator = torch.Generator().manual_seed(seed)
        return MOCK_SCALE * torch.randn(lengths[index], text_dim, generator=generator)

    return PromptEmbeds(len(cleaned), text_dim, kept(read, text_dim, text_max_length), lengths.count(text_max_length))
