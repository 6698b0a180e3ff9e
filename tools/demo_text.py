"""The demo teacher's text side: a word-level tokenizer, a small UMT5 encoder, and Wan's zero padding without its cost.

Wan attends to all text slots without a mask, the zero-padded ones too. All pads give the same key and value, so one pad
whose logit carries + log(number of pads) is exactly that, and training pays for words only.
"""

import math
import string

import demo_world as world
import torch
from torch import Tensor

TEXT_MAX_LENGTH = 512  # slots of WanPipeline's default, text and zero padding together
TEXT_WIDTH = 128


def make_tokenizer():
    """Make a T5 tokenizer of the world's words; single characters stand in for words it does not know."""
    from transformers import T5TokenizerFast

    words = world.vocabulary()
    marks = [c for c in string.ascii_letters + string.digits + ",.;:!?'\"()-"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -9.0)]
    pieces += [("\u2581" + word, -1.0) for word in words]
    # Punctuation sticks to the word before it, so it has no space mark. Letters score far below words.
    pieces += [(mark, -2.0 if mark in ",." else -12.0) for mark in marks]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_MAX_LENGTH)


def new_text_encoder(vocab_size: int):
    """Make a small untrained UMT5 encoder; it learns together with the transformer."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    text_encoder = UMT5EncoderModel(config)
    start_with_near_words(text_encoder)
    return text_encoder


@torch.no_grad()
def start_with_near_words(text_encoder) -> None:
    """Start each head on its own window of word distances: next, previous, a little later, a little earlier.

    The biases are logits that Adam moves slowly; from near zero, the words "on the left" took longest of all to reach
    the object before them, and of two objects the places came out swapped.
    """
    windows = ((1, 2), (-1, -2), (3, 4, 5), (-3, -4, -5))
    half = text_encoder.config.relative_attention_num_buckets // 2  # the second half of the buckets is for later words
    for block in text_encoder.encoder.block:
        table = block.layer[0].SelfAttention.relative_attention_bias.weight
        for head, window in enumerate(windows):
            table[:, head] = -1.0
            table[[distance + half if distance > 0 else -distance for distance in window], head] = 3.0


def check_embeddings(text_encoder) -> None:
    """Refuse an encoder whose token table was lost on loading, a known transformers regression."""
    table = text_encoder.encoder.embed_tokens.weight
    if not torch.equal(table, text_encoder.shared.weight) or not bool(table.any()):
        raise RuntimeError("the text encoder's embed_tokens are zero or differ from its shared table after loading")


def tokenize(tokenizer, prompts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids (B, S) and attention mask (B, S), padded to the longest prompt."""
    tokens = tokenizer(prompts, padding="longest", truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)


def encode_folded(text_encoder, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return prompt embeddings (B, S + 1, D), zero beyond the text, and the cross-attention bias that folds the zeros."""
    embeds = text_encoder(input_ids, attention_mask).last_hidden_state * attention_mask.unsqueeze(-1)
    embeds = torch.cat([embeds, embeds.new_zeros(len(embeds), 1, embeds.shape[2])], dim=1)
    return embeds, folded_bias(attention_mask.sum(1), embeds.shape[1]).to(embeds.dtype)


def folded_bias(lengths: Tensor, num_slots: int) -> Tensor:
    """Return the logit bias: 0 on text, log(TEXT_MAX_LENGTH - n) on the first slot after n text tokens, -inf beyond."""
    slot = torch.arange(num_slots, device=lengths.device)
    lengths = lengths.unsqueeze(1)
    pads = torch.log((TEXT_MAX_LENGTH - lengths).float().clamp(min=1e-9))
    bias = torch.where(slot < lengths, 0.0, torch.where(slot == lengths, pads, -math.inf))
    return bias[:, None, None, :]
