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
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import clean_prompt
from wandistiller.wan.prompt_cache import PromptCache
from wandistiller.wan.prompt_embeds import PromptEmbeds, mock_prompt_embeds
from wandistiller.wan.text_encoder_files import TextEncoderFiles
from wandistiller.wan.tokenizer import Tokenize, open_tokenizer

CACHE_VERSION = 2
ROUND = 65536  # prompts whose tokens are in memory at a time


@dataclass(frozen=True)
class EncodingOptions:
    """How prompts are encoded.

    Attributes:
        text_max_length: text slots, past which a prompt is cut.
        dtype: precision of the encoder and of the stored embeddings; None is float32 on a CPU and bfloat16 elsewhere.
        batch_size: prompts encoded at once.
    """

    text_max_length: int = 512
    device: str | torch.device = "cpu"
    dtype: torch.dtype | None = None
    batch_size: int = 8

    def __post_init__(self):
        if self.text_max_length < 1 or self.batch_size < 1:
            raise UserError(
                f"text_max_length={self.text_max_length} and batch_size={self.batch_size} must both be at least 1"
            )

    @property
    def encoder_dtype(self) -> torch.dtype:
        return self.dtype or (torch.float32 if torch.device(self.device).type == "cpu" else torch.bfloat16)


def encode_prompts(
    prompts: Sequence[str],
    files: TextEncoderFiles,
    cache_dir: str | Path,
    options: EncodingOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PromptEmbeds:
    """Return UMT5's last hidden states of the text tokens, as WanPipeline.encode_prompt computes them.

    The encoder is loaded only for prompts that `cache_dir` lacks, and has left memory on return.

    Args:
        progress: called with (prompts encoded so far, prompts to encode).

    Raises:
        UserError: a folder is not that of a usable UMT5 encoder or tokenizer, or an embedding is not finite.
    """
    options = options or EncodingOptions()
    text_dim = files.text_dim()
    settings = f"{CACHE_VERSION} {options.text_max_length} {options.encoder_dtype}"
    cleaned = [clean_prompt(prompt) for prompt in prompts]
    keys = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in cleaned]
    folder = Path(cache_dir) / files.fingerprint(settings)
    cache = PromptCache(folder, text_dim, options.encoder_dtype, frozenset(keys))
    missing = {key: prompt for key, prompt in zip(keys, cleaned, strict=True) if key not in cache.shard_of}
    if missing:
        cache.check_writable()
        tokenize = open_tokenizer(files.tokenizer)
        encoder: Any = files.umt5.load(options.encoder_dtype)
        encoder.to(options.device)
        encoding = _encode(missing, tokenize, encoder, files, options)
        cache.fill(encoding, lambda done: progress(done, len(missing)) if progress else None)
        del encoder, encoding
        gc.collect()  # modules hold reference cycles, and 11 GB should not wait for the collector
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    truncated = sum(key in cache.truncated for key in keys)
    return PromptEmbeds(len(keys), text_dim, lambda index: cache.read(keys[index]), truncated)


def embed_texts(
    texts: Sequence[str],
    encoder: TextEncoderFiles | None,
    config: StudentConfig,
    prompt_cache: str | Path,
    device: str,
    progress: Callable[[int, int], None] | None = None,
) -> PromptEmbeds:
    """Return the text tokens of prompts, as teacher and student take them.

    Args:
        encoder: None makes the mock's embeddings.
        config: tells the width of the embeddings and the number of text slots.
        progress: called with (prompts encoded so far, prompts to encode).
    """
    if encoder is None:
        return mock_prompt_embeds(texts, config.text_encoder_output_dim, config.text_max_length)
    return encode_prompts(texts, encoder, prompt_cache, EncodingOptions(config.text_max_length, device), progress)


def count_tokens(prompts: Sequence[str], files: TextEncoderFiles) -> list[int]:
    """Count the tokens of each prompt, without cutting any."""
    return list(map(len, open_tokenizer(files.tokenizer)([clean_prompt(prompt) for prompt in prompts])))


Encoded = tuple[str, Tensor, bool]


def _encode(
    prompts: dict[str, str], tokenize: Tokenize, encoder, files: TextEncoderFiles, options: EncodingOptions
) -> Iterator[Encoded]:
    """Yield the key, the text tokens (n, text_dim) and whether it was truncated of every prompt, the longest of a round first."""
    keys = list(prompts)
    for start in range(0, len(keys), ROUND):
        part = {key: prompts[key] for key in keys[start : start + ROUND]}
        tokens = dict(zip(part, tokenize(list(part.values())), strict=True))
        yield from _encode_round(tokens, encoder, files, options)


def _encode_round(
    tokens: dict[str, list[int]], encoder, files: TextEncoderFiles, options: EncodingOptions
) -> Iterator[Encoded]:
    slots, vocab_size = options.text_max_length, encoder.config.vocab_size
    # With the longest first padding stays small, and a GPU that is too small is noticed at once.
    keys = sorted(tokens, key=lambda key: len(tokens[key]), reverse=True)
    for start in range(0, len(keys), options.batch_size):
        batch_keys = keys[start : start + options.batch_size]
        batch = [_cut(tokens[key], slots) for key in batch_keys]
        largest = max(map(max, filter(None, batch)), default=0)
        if largest >= vocab_size:  # on a GPU this would be an assertion that kills the process
            raise UserError(
                f"{files.tokenizer}: makes token {largest}, but {files.encoder} knows {vocab_size} tokens; "
                "give the tokenizer that belongs to this encoder"
            )
        for key, row in zip(batch_keys, _encode_batch(encoder, batch), strict=True):
            if not row.isfinite().all():
                raise UserError(
                    f"{files.encoder}: an embedding in {encoder.dtype} is not finite; use bfloat16 or float32, or check the "
                    "encoder's weights"
                )
            yield key, row, len(tokens[key]) > slots


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
    hidden = encoder(ids.to(encoder.device), mask.to(encoder.device)).last_hidden_state.to("cpu", encoder.dtype)
    return [row[: len(tokens)].clone() for row, tokens in zip(hidden, batch, strict=True)]
