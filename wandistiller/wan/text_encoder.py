"""UMT5 embeddings of prompts: the encoding, equal to diffusers' WanPipeline.encode_prompt, and its cache on disk.

Only the n text tokens of a prompt are kept; every later slot of Wan's text is zero (diffusers: pipelines/wan/pipeline_wan.py).
transformers and safetensors are imported where they are used: a complete cache needs no transformers.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.errors import UserError
from wandistiller.files.atomic import atomic_path
from wandistiller.files.prompts import clean_prompt

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
SHARD_BYTES = 128 * 2**20  # what a killed encoding loses at most, and what it holds in memory
READ_WHOLE_BYTES = 64 * 2**20  # weight files up to this size are fingerprinted by all their bytes
NUM_SAMPLES, SAMPLE_BYTES = 2048, 4096  # of larger ones: some blocks of every matrix of UMT5-XXL
TOKENIZER_MODELS = ("tokenizer.json", "spiece.model")
TOKENIZER_FILES = (*TOKENIZER_MODELS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
KEPT_BYTES = 256 * 2**20  # of embeddings that have been read once stay in memory
MOCK_SCALE = 0.1


class PromptEmbeds:
    """Text-token embeddings of a list of prompts; `read(i)` gives the i-th, (n_i, text_dim), from memory or from disk.

    `truncated` counts the prompts that were longer than the text slots.
    """

    def __init__(self, num_prompts: int, text_dim: int, read: Callable[[int], Tensor], truncated: int = 0):
        self.num_prompts, self.text_dim, self.read, self.truncated = num_prompts, text_dim, read, truncated

    def __len__(self) -> int:
        return self.num_prompts

    def first(self, count: int) -> "PromptEmbeds":
        """The first `count` of these prompts, sharing their values."""
        return self.part(0, count)

    def part(self, start: int, count: int) -> "PromptEmbeds":
        """`count` of these prompts from `start` on, sharing their values."""
        return PromptEmbeds(count, self.text_dim, lambda index: self.read(start + index))

    def batch(
        self, indices: Sequence[int] | Tensor, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """prompt_embeds (B, L, text_dim), zero past each length, L the longest of the batch; prompt_lengths (B,) int64."""
        rows = [self.read(int(index)) for index in indices]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        prompt_embeds = torch.zeros(len(rows), max([1, *lengths.tolist()]), self.text_dim, dtype=dtype)
        for padded, row in zip(prompt_embeds, rows, strict=True):
            padded[: len(row)] = row
        return to_device(prompt_embeds, device), to_device(lengths, device)


@dataclass(frozen=True)
class Embeds:
    """Text tokens of a run's `Texts`; `trained` holds the prompts and after them the extra ones."""

    trained: PromptEmbeds
    held_out: PromptEmbeds
    negative: Tensor | None


def mock_prompt_embeds(prompts: Sequence[str], text_dim: int, text_max_length: int = 512) -> PromptEmbeds:
    """Noise that depends on the prompt alone, one token a word and one more: stands in for UMT5, needs no download."""
    embeds, truncated = [], 0
    for prompt in map(clean_prompt, prompts):
        num_tokens = len(prompt.split()) + 1
        seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7])
        generator = torch.Generator().manual_seed(seed)
        embeds.append(MOCK_SCALE * torch.randn(min(num_tokens, text_max_length), text_dim, generator=generator))
        truncated += num_tokens > text_max_length
    return PromptEmbeds(len(embeds), text_dim, embeds.__getitem__, truncated)


def encode_prompts(
    prompts: Sequence[str],
    text_encoder_path: str | Path,
    tokenizer_path: str | Path,
    cache_dir: str | Path,
    text_max_length: int = 512,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> PromptEmbeds:
    """UMT5's last hidden states of the text tokens, as WanPipeline.encode_prompt(max_sequence_length=text_max_length).

    The encoder is loaded only for prompts that `cache_dir` lacks, and has left memory on return.

    Args:
        text_encoder_path, tokenizer_path: local folders.
        dtype: of the encoder and of the stored values; None is float32 on the CPU, bfloat16 elsewhere.
        progress: called with (prompts encoded so far, prompts to encode).

    Raises:
        UserError: a folder that is not a usable UMT5 encoder or tokenizer, or values that are not finite.
    """
    if text_max_length < 1 or batch_size < 1:
        raise UserError(f"text_max_length={text_max_length} and batch_size={batch_size} must both be at least 1")
    encoder_folder, tokenizer_folder = Path(text_encoder_path), Path(tokenizer_path)
    text_dim = text_encoder_dim(encoder_folder)
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    fingerprint = _fingerprint(encoder_folder, tokenizer_folder, f"{CACHE_VERSION} {text_max_length} {dtype}")
    cache = _EmbedCache(Path(cache_dir) / fingerprint, text_dim)

    cleaned = [clean_prompt(prompt) for prompt in prompts]
    keys = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in cleaned]
    missing = {key: prompt for key, prompt in zip(keys, cleaned, strict=True) if key not in cache.shard_of}
    if missing:
        tokenizer = _load_tokenizer(tokenizer_folder)
        encoder = _load_encoder(encoder_folder, dtype).to(device)
        encoding = _encode(missing, tokenizer, encoder, text_max_length, batch_size)
        cache.fill(encoding, lambda done: progress(done, len(missing)) if progress else None)
        del encoder, encoding
        gc.collect()  # modules hold reference cycles; 11 GB should not wait for the collector
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    truncated = sum(key in cache.truncated for key in keys)
    return PromptEmbeds(len(keys), text_dim, lambda index: cache.read(keys[index]), truncated)


# The encoder


def _encode(
    prompts: dict[str, str], tokenizer, encoder, text_max_length: int, batch_size: int
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (key, text tokens (n, text_dim), was truncated) for every prompt, the longest first."""
    untruncated = tokenizer(list(prompts.values()), truncation=True, max_length=text_max_length + 1)["input_ids"]
    num_tokens = dict(zip(prompts, map(len, untruncated), strict=True))
    # Longest first: padding stays small, and a GPU that is too small says so at once.
    keys = sorted(prompts, key=num_tokens.__getitem__, reverse=True)
    for start in range(0, len(keys), batch_size):
        batch_keys = keys[start : start + batch_size]
        texts = [prompts[key] for key in batch_keys]
        longest = min(num_tokens[batch_keys[0]], text_max_length)
        for key, row in zip(batch_keys, _encode_batch(tokenizer, encoder, texts, longest), strict=True):
            if not row.isfinite().all():
                raise UserError(
                    f"{encoder.name_or_path}: the embedding of {prompts[key][:60]!r} in {encoder.dtype} is not finite; "
                    "use bfloat16 or float32, or check the encoder's weights"
                )
            yield key, row, num_tokens[key] > text_max_length


@torch.no_grad()
def _encode_batch(tokenizer, encoder, texts: list[str], longest: int) -> list[Tensor]:
    # The mask makes the number of pads immaterial, so pads up to the longest of the batch are enough.
    settings = {"padding": "max_length", "max_length": max(1, longest), "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer(texts, add_special_tokens=True, return_attention_mask=True, **settings)
    ids, mask, vocab_size = tokens.input_ids, tokens.attention_mask, encoder.config.vocab_size
    if ids.max() >= vocab_size:  # on a GPU this would be an assertion that kills the process
        raise UserError(
            f"{tokenizer.name_or_path}: makes token {ids.max()}, but {encoder.name_or_path} knows {vocab_size} tokens; "
            "give the tokenizer that belongs to this encoder"
        )
    hidden = encoder(ids.to(encoder.device), mask.to(encoder.device)).last_hidden_state.to("cpu", encoder.dtype)
    return [row[:length].clone() for row, length in zip(hidden, mask.sum(dim=1).tolist(), strict=True)]


def _load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 (a local folder)
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as err:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({_first_line(err)})") from err
    if tokenizer.pad_token is None:
        raise UserError(f"{folder}: the tokenizer has no pad token; give the tokenizer/ folder of a Wan pipeline")
    return tokenizer


def _load_encoder(folder: Path, dtype: torch.dtype):
    from transformers import UMT5EncoderModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        encoder, info = UMT5EncoderModel.from_pretrained(  # nosec B615 (a local folder)
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as err:  # transformers wraps a bad file in any of a dozen types
        raise UserError(f"{folder}: the text encoder cannot be loaded ({_first_line(err)})") from err
    missing = set(info["missing_keys"])
    table, shared = encoder.encoder.embed_tokens.weight, encoder.shared.weight
    # transformers after PR 41580 could leave the table zero or unfilled, silently: issues 43880 and 43992.
    is_tied = table.data_ptr() == shared.data_ptr() or "shared.weight" in missing or torch.equal(table, shared)
    if not is_tied or not table.any():
        raise UserError(
            f"{folder}: the embedding table came out all zeros or unlike shared.weight, so prompts would mean nothing. "
            "Some versions of transformers load UMT5 so (a known regression): install the one in requirements.txt; "
            "if it is that one already, the file itself is broken: fetch it again"
        )
    if lacking := missing - {"shared.weight"}:
        raise UserError(f"{folder}: the weights lack {len(lacking)} tensors of the encoder, first {min(lacking)}")
    return encoder.eval()


def _first_line(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0][:200]}" if lines else type(err).__name__


# What is on disk: checks and fingerprint


def count_tokens(prompts: Sequence[str], tokenizer_path: str | Path) -> list[int]:
    """Tokens of each prompt, not cut."""
    tokenizer = _load_tokenizer(Path(tokenizer_path))
    return [len(ids) for ids in tokenizer([clean_prompt(prompt) for prompt in prompts])["input_ids"]]


def encoder_parameters(text_encoder_path: str | Path) -> int:
    """Parameters of a text encoder, from the headers of its files; the embedding table counts once."""
    from safetensors import SafetensorError, safe_open

    sizes: dict[str, int] = {}
    for path in _weight_files(Path(text_encoder_path)):
        try:
            with safe_open(path, framework="pt") as file:
                sizes |= {key: prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as err:
            raise UserError(f"{path}: is not a whole safetensors file; fetch it again ({_first_line(err)})") from err
    table = "encoder.embed_tokens.weight"
    return sum(size for key, size in sizes.items() if key != table or "shared.weight" not in sizes)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise UserError(f"{path}: cannot be read as JSON ({err})") from err
    return content if isinstance(content, dict) else {}


def text_encoder_dim(folder: Path) -> int:
    """The encoder's width d_model, from a folder that says it is UMT5."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: holds no config.json; a text encoder is a folder like text_encoder/ of a Wan pipeline in diffusers "
            "format, with config.json and *.safetensors (an original models_t5_*.pth cannot be used directly)"
        )
    config = _read_json(folder / "config.json")
    model_type, text_dim = config.get("model_type"), config.get("d_model")
    if model_type != "umt5" or not isinstance(text_dim, int) or text_dim < 1:
        raise UserError(
            f"{folder}/config.json: model_type={model_type!r}, d_model={text_dim!r}; "
            "Wan's text encoder has model_type 'umt5' and a positive d_model"
        )
    return text_dim


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


def _fingerprint(encoder_folder: Path, tokenizer_folder: Path, settings: str) -> str:
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):  # checks the header against the size
            pass
    except (SafetensorError, OSError) as err:
        raise UserError(f"{path}: is not a whole safetensors file; fetch it again ({_first_line(err)})") from err
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(READ_WHOLE_BYTES if size <= READ_WHOLE_BYTES else 2**20))  # the header at least
        for start in range(0, size if size > READ_WHOLE_BYTES else 0, max(1, size // NUM_SAMPLES)):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


# The cache: one folder per fingerprint, in it shards that are only ever added


class _EmbedCache:
    """Which shard holds the embedding of which prompt (sha256 of the cleaned text); values are read on demand."""

    def __init__(self, folder: Path, text_dim: int):
        from safetensors import safe_open

        self.folder, self.text_dim = folder, text_dim
        # A mapped file each, and a million prompts have thousands of shards: few stay open.
        self._open = lru_cache(maxsize=64)(partial(safe_open, framework="pt"))
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
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as shard:
                keys, metadata = list(shard.keys()), shard.metadata() or {}
                shapes = [shard.get_slice(key).get_shape() for key in keys]
            if any(len(shape) != 2 or shape[1] != self.text_dim for shape in shapes):
                raise ValueError(f"not embeddings of width {self.text_dim}")
        except (SafetensorError, OSError, ValueError) as err:
            logger.warning("%s: damaged, its prompts are encoded again (%s)", path, _first_line(err))
            return
        self.shard_of.update(dict.fromkeys(keys, path))
        self.truncated.update(metadata.get("truncated", "").split())

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
        from safetensors.torch import save_file

        if not rows:
            return
        # Named by its prompts: encoding a damaged shard's prompts again puts a good one in its place.
        path = self.folder / f"{hashlib.sha256(' '.join(rows).encode()).hexdigest()[:32]}.safetensors"
        with atomic_path(path) as beside:
            save_file(rows, beside, metadata={"truncated": " ".join(truncated)})
        self.shard_of.update(dict.fromkeys(rows, path))
        self.truncated.update(truncated)
