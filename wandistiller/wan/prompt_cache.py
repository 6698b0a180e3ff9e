"""The cache of prompt embeddings on disk: a folder for each encoder and tokenizer, which holds shards that are only ever added.

Only the text tokens of a prompt are kept, since every later slot of Wan's text is zero.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.safetensors_files import DamagedFileError, open_safetensors, read_header, write_tensors

logger = logging.getLogger(__name__)
SHARD_BYTES = 128 * 2**20  # what a killed encoding loses at most, and what it holds in memory
KEPT_BYTES = 256 * 2**20  # embeddings up to this size stay in memory once they have been read
MAX_OPEN_SHARDS = 64  # each is a mapped file, and a million prompts have thousands of them


class PromptCache:
    """The shard that holds each prompt's embedding, by the sha256 of the cleaned prompt; values are read on demand."""

    def __init__(self, folder: Path, text_dim: int):
        self.folder, self.text_dim = folder, text_dim
        self._open = lru_cache(maxsize=MAX_OPEN_SHARDS)(open_safetensors)
        self.shard_of: dict[str, Path] = {}
        self.truncated: set[str] = set()
        self._kept: dict[str, Tensor] = {}
        self._num_kept_bytes = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise UserError(
                f"{folder}: the embedding cache cannot be made here ({err.strerror}); give --prompt_cache a folder"
            ) from err
        for path in sorted(folder.glob("*.safetensors")):
            self._add_shard(path)

    def _add_shard(self, path: Path) -> None:
        try:
            header = read_header(path)
        except DamagedFileError as err:
            self._leave_out(path, err.reason)
            return
        if any(shape[1:] != (self.text_dim,) for shape in header.shapes.values()):
            self._leave_out(path, f"it does not hold embeddings of width {self.text_dim}")
            return
        self.shard_of.update(dict.fromkeys(header.shapes, path))
        self.truncated.update(header.metadata.get("truncated", "").split())

    def _leave_out(self, path: Path, reason: str) -> None:
        logger.warning("%s: damaged, its prompts are encoded again (%s)", path, reason)

    def read(self, key: str) -> Tensor:
        """Return the embedding (n, text_dim) of a key that `shard_of` knows."""
        if key in self._kept:
            return self._kept[key]
        row = self._open(self.shard_of[key]).get_tensor(key)
        # The oldest never makes room for the newest: prompts come in rounds, and the oldest is asked for next.
        if self._num_kept_bytes + row.nbytes <= KEPT_BYTES:
            self._kept[key] = row
            self._num_kept_bytes += row.nbytes
        return row

    def fill(self, encoding: Iterator[tuple[str, Tensor, bool]], progress: Callable[[int], None]) -> None:
        """Write what is encoded in shards of about SHARD_BYTES; what came before a failure is kept.

        Args:
            encoding: yields key, embedding and whether the prompt was truncated.
            progress: called with the number of prompts done.
        """
        rows: dict[str, Tensor] = {}
        truncated: list[str] = []
        try:
            for done, (key, row, was_truncated) in enumerate(encoding, start=1):
                rows[key] = row
                truncated += [key] * was_truncated
                if sum(row.nbytes for row in rows.values()) >= SHARD_BYTES:
                    self._write_shard(rows, truncated)
                    rows, truncated = {}, []
                progress(done)
        finally:
            self._write_shard(rows, truncated)

    def _write_shard(self, rows: dict[str, Tensor], truncated: list[str]) -> None:
        if not rows:
            return
        # A shard is named by its prompts, so that encoding a damaged shard's prompts again puts a good one in its place.
        path = self.folder / f"{hashlib.sha256(' '.join(rows).encode()).hexdigest()[:32]}.safetensors"
        write_tensors(path, rows, {"truncated": " ".join(truncated)})
        self.shard_of.update(dict.fromkeys(rows, path))
        self.truncated.update(truncated)
