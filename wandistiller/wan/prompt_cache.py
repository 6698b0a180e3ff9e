"""The cache of prompt embeddings on disk: a folder for each encoder and tokenizer, which holds shards that are only ever added.

Only the text tokens of a prompt are kept, since every later slot of Wan's text is zero.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.atomic import remove_all_leftovers
from wandistiller.files.json_files import JsonError, parse_json
from wandistiller.files.paths import nearest_existing
from wandistiller.files.safetensors_files import DamagedFileError, open_safetensors, read_header, write_tensors

logger = logging.getLogger(__name__)
SHARD_BYTES = 128 * 2**20  # what a killed encoding loses at most, and what it holds in memory
KEPT_BYTES = 256 * 2**20  # embeddings up to this size stay in memory once they have been read
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MAX_OPEN_SHARDS = 64  # each is a mapped file, and a million prompts have thousands of them


class PromptCache:
    """The shard that holds each prompt's embedding, by the sha256 of the cleaned prompt; values are read on demand.

    The folder appears with its first shard, so that an encoder which is refused leaves none.

    Args:
        dtype: what the embeddings are stored in; a shard of another one is left out.
        wanted: keys that will be asked for, so that the others take no memory; None for all that there are.
    """

    def __init__(self, folder: Path, text_dim: int, dtype: torch.dtype, wanted: frozenset[str] | None = None):
        self.folder, self.text_dim, self.dtype, self.wanted = folder, text_dim, dtype, wanted
        self._open = lru_cache(maxsize=MAX_OPEN_SHARDS)(open_safetensors)
        self.shard_of: dict[str, Path] = {}
        self.truncated: set[str] = set()
        self._digest_of: dict[str, str] = {}
        self._kept: dict[str, Tensor] = {}
        self._num_kept_bytes = 0
        existing = nearest_existing(folder.absolute())
        if not existing.is_dir():
            raise self._cannot_be_made(f"{existing} is a file")
        remove_all_leftovers(folder)
        for path in sorted(folder.glob("*.safetensors")):
            self._add_shard(path)

    def _cannot_be_made(self, reason: str | None) -> UserError:
        return UserError(
            f"{self.folder}: the embedding cache cannot be made here ({reason}); give --prompt_cache a folder"
        )

    def check_writable(self) -> None:
        """Refuse a folder that cannot be written to, before the encoder is loaded for it.

        Raises:
            UserError: its permissions say so.
        """
        existing = nearest_existing(self.folder.absolute())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise self._cannot_be_made(os.strerror(errno.EACCES))

    def _add_shard(self, path: Path) -> None:
        try:
            header = read_header(path, self.wanted)
        except DamagedFileError as err:
            self._leave_out(path, err.reason)
            return
        if any(shape[1:] != (self.text_dim,) for shape in header.shapes.values()):
            self._leave_out(path, f"it does not hold embeddings of width {self.text_dim}")
            return
        if set(header.dtypes.values()) - {_SAFETENSORS_NAMES.get(self.dtype)}:
            self._leave_out(path, f"it does not hold embeddings in {self.dtype}")
            return
        digests = _read_digests(header.metadata.get("digests", ""))
        if not header.shapes.keys() <= digests.keys():
            self._leave_out(path, "it does not hold a checksum for each embedding")
            return
        self._digest_of.update({key: digests[key] for key in header.shapes})
        self.shard_of.update(dict.fromkeys(header.shapes, path))
        cut = header.metadata.get("truncated", "").split()
        self.truncated.update(cut if self.wanted is None else self.wanted.intersection(cut))

    def _leave_out(self, path: Path, reason: str) -> None:
        logger.warning("%s: damaged, its prompts are encoded again (%s)", path, reason)

    def read(self, key: str) -> Tensor:
        """Return the embedding (n, text_dim) of a key that `shard_of` knows.

        Raises:
            UserError: it is not what was stored.
        """
        if key in self._kept:
            return self._kept[key]
        row = self._open(self.shard_of[key]).get_tensor(key)
        if _digest(row) != self._digest_of[key]:
            raise UserError(
                f"{self.shard_of[key]}: is damaged, an embedding in it is not what was written; remove this file and run again, "
                "its prompts are encoded anew"
            )
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
        num_bytes = 0
        try:
            for done, (key, row, was_truncated) in enumerate(encoding, start=1):
                rows[key] = row
                num_bytes += row.nbytes
                truncated += [key] * was_truncated
                if num_bytes >= SHARD_BYTES:
                    self._write_shard(rows, truncated)
                    rows, truncated, num_bytes = {}, [], 0
                progress(done)
        finally:
            self._write_shard(rows, truncated)

    def _write_shard(self, rows: dict[str, Tensor], truncated: list[str]) -> None:
        if not rows:
            return
        # A shard is named by its prompts, so that encoding a damaged shard's prompts again puts a good one in its place.
        path = self.folder / f"{hashlib.sha256(' '.join(rows).encode()).hexdigest()[:32]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            digests = {key: _digest(row) for key, row in rows.items()}
            write_tensors(path, rows, {"truncated": " ".join(truncated), "digests": json.dumps(digests)})
        except OSError as error:
            raise self._cannot_be_made(error.strerror) from None
        self._digest_of.update(digests)
        self.shard_of.update(dict.fromkeys(rows, path))
        self.truncated.update(truncated)


def _digest(row: Tensor) -> str:
    """Return a checksum of an embedding's bytes and shape."""
    return hashlib.sha256(
        f"{list(row.shape)}".encode() + row.contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()[:16]


def _read_digests(text: str) -> dict[str, str]:
    try:
        digests = parse_json(text)
    except JsonError:
        return {}
    return digests if isinstance(digests, dict) else {}
