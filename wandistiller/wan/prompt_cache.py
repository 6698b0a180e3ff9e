"""The cache of prompt embeddings on disk: a folder per encoder and tokenizer, in it shards that are only ever added.

Only the n text tokens of a prompt are kept; every later slot of Wan's text is zero. A complete cache needs no transformers.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.safetensors_files import DamagedFileError, open_safetensors, read_header, write_tensors

logger = logging.getLogger(__name__)
CACHE_VERSION = 1
SHARD_BYTES = 128 * 2**20  # what a killed encoding loses at most, and what it holds in memory
READ_WHOLE_BYTES = 64 * 2**20  # weight files up to this size are fingerprinted by all their bytes
NUM_SAMPLES, SAMPLE_BYTES = 2048, 4096  # of larger ones: some blocks of every matrix of UMT5-XXL
TOKENIZER_MODELS = ("tokenizer.json", "spiece.model")
TOKENIZER_FILES = (*TOKENIZER_MODELS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
KEPT_BYTES = 256 * 2**20  # of embeddings that have been read once stay in memory


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(f"{path}: cannot be read as JSON ({err})") from err
    return content if isinstance(content, dict) else {}


def _weight_files(folder: Path) -> list[Path]:
    """The files transformers will read, none of them outside the folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder}: holds neither {single.name} nor {index.name}; only safetensors weights are read")
    weight_map = _read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names:
        raise UserError(f"{index}: has no weight_map from tensors to files; fetch it again")
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index}: names {name!r}, which is not a file of {folder}")
    return [folder / name for name in names]


def encoder_fingerprint(encoder_folder: Path, tokenizer_folder: Path, settings: str) -> str:
    """Changes with anything that changes an embedding; of a large weight file only samples are read."""
    if not any((tokenizer_folder / name).is_file() for name in TOKENIZER_MODELS):
        raise UserError(
            f"{tokenizer_folder}: holds no {' or '.join(TOKENIZER_MODELS)}; give the tokenizer/ folder of a Wan pipeline"
        )
    small = [encoder_folder / "config.json", *(tokenizer_folder / name for name in TOKENIZER_FILES)]
    parts = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in small if path.is_file()]
    parts += [(path.name, _weight_file_digest(path)) for path in _weight_files(encoder_folder)]
    return hashlib.sha256(json.dumps([settings, parts]).encode()).hexdigest()[:32]


def _weight_file_digest(path: Path) -> str:
    read_header(path)  # refuses a file that is not whole
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(READ_WHOLE_BYTES if size <= READ_WHOLE_BYTES else 2**20))  # the header at least
        for start in range(0, size if size > READ_WHOLE_BYTES else 0, max(1, size // NUM_SAMPLES)):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class EmbedCache:
    """Which shard holds the embedding of which prompt (sha256 of the cleaned text); values are read on demand."""

    def __init__(self, folder: Path, text_dim: int):
        self.folder, self.text_dim = folder, text_dim
        # A mapped file each, and a million prompts have thousands of shards: few stay open.
        self._open = lru_cache(maxsize=64)(open_safetensors)
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
            if any(shape[1:] != (self.text_dim,) for shape in header.shapes.values()):
                reason = f"it holds no embeddings of width {self.text_dim}"
                raise DamagedFileError(f"{path}: {reason}", reason)
        except DamagedFileError as error:
            logger.warning("%s: damaged, its prompts are encoded again (%s)", path, error.reason)
            return
        self.shard_of.update(dict.fromkeys(header.shapes, path))
        self.truncated.update(header.metadata.get("truncated", "").split())

    def read(self, key: str) -> Tensor:
        """The embedding (n, text_dim) of a key that `shard_of` knows."""
        if key in self._kept:
            return self._kept[key]
        row = self._open(self.shard_of[key]).get_tensor(key)
        # Never the oldest for the newest: prompts come in rounds, and the oldest is the next to be asked for.
        if self._num_kept_bytes + row.nbytes <= KEPT_BYTES:
            self._kept[key] = row
            self._num_kept_bytes += row.nbytes
        return row

    def fill(self, encoding: Iterator[tuple[str, Tensor, bool]], progress: Callable[[int], None]) -> None:
        """Write what `encoding` yields, in shards of about SHARD_BYTES; what came before a failure is kept."""
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
        # Named by its prompts: encoding a damaged shard's prompts again puts a good one in its place.
        path = self.folder / f"{hashlib.sha256(' '.join(rows).encode()).hexdigest()[:32]}.safetensors"
        write_tensors(path, rows, {"truncated": " ".join(truncated)})
        self.shard_of.update(dict.fromkeys(rows, path))
        self.truncated.update(truncated)
