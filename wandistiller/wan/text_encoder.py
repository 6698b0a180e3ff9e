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

from wandistiller.errors import UserError, first_line
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import clean_prompt
from wandistiller.wan.prompt_cache import PromptCache
from wandistiller.wan.prompt_embeds import PromptEmbeds, mock_prompt_embeds
from wandistiller.wan.text_encoder_files import TextEncoderFiles

CACHE_VERSION = 1
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
        tokenizer = _load_tokenizer(files.tokenizer)
        encoder = _load_encoder(files.encoder, options.encoder_dtype).to(options.device)
        encoding = _encode(missing, tokenizer, encoder, options.text_max_length, options.batch_size)
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
    tokenizer = _load_tokenizer(files.tokenizer)
    return [len(ids) for ids in tokenizer([clean_prompt(prompt) for prompt in prompts])["input_ids"]]


def _encode(
    prompts: dict[str, str], tokenizer, encoder, text_max_length: int, batch_size: int
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield the key, the text tokens (n, text_dim) and whether it was truncated of every prompt, the longest of a round first."""
    keys = list(prompts)
    for start in range(0, len(keys), ROUND):
        part = {key: prompts[key] for key in keys[start : start + ROUND]}
        yield from _encode_round(part, tokenizer, encoder, text_max_length, batch_size)


def _encode_round(
    prompts: dict[str, str], tokenizer, encoder, text_max_length: int, batch_size: int
) -> Iterator[tuple[str, Tensor, bool]]:
    untruncated = tokenizer(list(prompts.values()), truncation=True, max_length=text_max_length + 1)["input_ids"]
    num_tokens = dict(zip(prompts, map(len, untruncated), strict=True))
    # With the longest first padding stays small, and a GPU that is too small is noticed at once.
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
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 # a local folder
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as err:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({first_line(err)})") from err
    if tokenizer.pad_token is None:
        raise UserError(f"{folder}: the tokenizer has no pad token; give the tokenizer/ folder of a Wan pipeline")
    return tokenizer


def _load_encoder(folder: Path, dtype: torch.dtype):
    from transformers import UMT5EncoderModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        # transformers' annotation does not know of the pair that `output_loading_info` returns.
        loaded: Any = UMT5EncoderModel.from_pretrained(  # nosec B615 # a local folder
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as err:  # transformers wraps a bad file in any of a dozen types
        raise UserError(f"{folder}: the text encoder cannot be loaded ({first_line(err)})") from err
    encoder, info = loaded
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
