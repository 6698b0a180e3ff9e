"""UMT5 embeddings of prompts, equal to those of diffusers' WanPipeline.encode_prompt.

Only the text tokens of a prompt are kept, since every later slot of Wan's text is zero (diffusers:
pipelines/wan/pipeline_wan.py). transformers is imported where it is used: a complete cache does not need it.
"""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.output_folder import check_writable
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import clean_prompt
from wandistiller.wan.prompt_embeds import PromptCache, PromptEmbeds, kept, mock_prompt_embeds
from wandistiller.wan.text_encoder_files import TextEncoderFiles, Tokenize, open_tokenizer

CACHE_VERSION = 2
ROUND = 65536  # prompts whose tokens are in memory at a time
BATCH_SIZE = 8  # prompts encoded at once


@dataclass(frozen=True)
class EncodingOptions:
    """How prompts are encoded; past `text_max_length` text slots one is cut."""

    text_max_length: int = 512
    device: str = "cpu"

    @property
    def encoder_dtype(self) -> torch.dtype:
        """The precision of the encoder and of the embeddings that are stored."""
        return torch.float32 if torch.device(self.device).type == "cpu" else torch.bfloat16


def encode_prompts(
    prompts: Sequence[str],
    files: TextEncoderFiles,
    cache_dir: str | Path,
    options: EncodingOptions = EncodingOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> PromptEmbeds:
    """Return UMT5's last hidden states of the text tokens, as WanPipeline.encode_prompt computes them.

    The encoder is loaded only for prompts that `cache_dir` lacks, and has left memory on return.

    Args:
        progress: called with (prompts encoded so far, prompts to encode).

    Raises:
        UserError: a folder is not that of a usable UMT5 encoder or tokenizer, or an embedding is not finite.
    """
    text_dim, dtype, slots = files.umt5.text_dim, options.encoder_dtype, options.text_max_length
    settings = f"{CACHE_VERSION} {slots} {dtype}"
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    keys = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in cleaned]
    folder = Path(cache_dir) / files.fingerprint(settings)
    cache = PromptCache(folder, text_dim, dtype, frozenset(keys))
    missing = {key: prompt for key, prompt in zip(keys, cleaned, strict=True) if key not in cache}
    if missing:
        check_writable(folder, "--prompt_cache")
        tokenize = open_tokenizer(files.tokenizer)
        encoder: Any = files.umt5.load(dtype)
        encoder.to(options.device)
        encoding = _encode(missing, tokenize, encoder, files, slots)
        cache.fill(encoding, lambda done: progress(done, len(missing)) if progress else None)
        del encoder, encoding
        gc.collect()  # modules hold reference cycles, and 11 GB should not wait for the collector
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    num_full = sum(cache.num_tokens(key) == slots for key in keys)
    return PromptEmbeds(len(keys), text_dim, kept(lambda index: cache.read(keys[index]), text_dim, slots), num_full)


def embed_texts(
    texts: Sequence[str],
    encoder: TextEncoderFiles | None,
    config: StudentConfig,
    prompt_cache: str | Path,
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> PromptEmbeds:
    """Return the text tokens of prompts, as teacher and student of `config` take them; without an encoder the mock's."""
    if encoder is None:
        return mock_prompt_embeds(texts, config.text_encoder_output_dim, config.text_max_length)
    return encode_prompts(texts, encoder, prompt_cache, EncodingOptions(config.text_max_length, device), progress)


def token_ids(prompts: Sequence[str], files: TextEncoderFiles, text_max_length: int) -> list[list[int]]:
    """Return the token ids of each prompt, cut as `encode_prompts` cuts them."""
    tokens = open_tokenizer(files.tokenizer)([clean_prompt(prompt) for prompt in prompts])
    return [_cut(ids, text_max_length) for ids in tokens]


def prompts_digest(prompts: Sequence[str]) -> str:
    lines = (prompt.encode("utf-8", "surrogatepass") + b"\n" for prompt in prompts)
    return hashlib.sha256(b"".join(lines)).hexdigest()[:16]


def _encode(
    prompts: dict[str, str], tokenize: Tokenize, encoder, files: TextEncoderFiles, slots: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the key and the text tokens (n, text_dim) of every prompt, the longest of a round first."""
    vocab_size = encoder.config.vocab_size
    for keys in _parts(list(prompts), ROUND):
        tokens = dict(zip(keys, tokenize([prompts[key] for key in keys]), strict=True))
        # With the longest first padding stays small, and a GPU that is too small is noticed at once.
        longest_first = sorted(tokens, key=lambda key: len(tokens[key]), reverse=True)
        for batch_keys in _parts(longest_first, BATCH_SIZE):
            batch = [_cut(tokens[key], slots) for key in batch_keys]
            largest = max(map(max, filter(None, batch)), default=0)
            if largest >= vocab_size:  # on a GPU this would be an assertion that kills the process
                raise UserError(
                    f"{files.tokenizer}: makes token {largest}, but {files.encoder} knows {vocab_size} tokens; "
                    "give the tokenizer that belongs to this encoder"
                )
            for key, row in zip(batch_keys, _encode_batch(encoder, batch), strict=True):
                if not row.isfinite().all():
                    raise UserError(f"{files.encoder}: embedding in {encoder.dtype} is not finite; check its weights")
                yield key, row


def _parts(keys: list[str], size: int) -> Iterator[list[str]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _cut(ids: list[int], slots: int) -> list[int]:
    """Return at most `slots` tokens, of which the last one stays the closing </s>."""
    return ids if len(ids) <= slots else [*ids[: slots - 1], ids[-1]]


@torch.no_grad()
def _encode_batch(encoder, batch: list[list[int]]) -> list[Tensor]:
    # The mask makes the number of pads immaterial, so pads up to the longest of the batch are enough.
    ids = torch.zeros(len(batch), max(1, *map(len, batch)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    hidden = encoder(ids.to(encoder.device), mask.to(encoder.device)).last_hidden_state
    hidden = encoder.embedding_map(hidden).to("cpu", encoder.dtype)
    return [row[: len(tokens)].clone() for row, tokens in zip(hidden, batch, strict=True)]
