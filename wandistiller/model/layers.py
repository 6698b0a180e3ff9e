"""The parts of the transformer: positions, timestep features, how text is padded, attention and blocks.

Shapes: B batch, L image tokens, S text tokens, D hidden_size, N heads, E head dim.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wandistiller.model.config import StudentConfig

ROPE_THETA = 10000.0


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return [cos | sin] features (B, dim) of a float timestep (B,), in float32 as diffusers computes Wan's."""
    exponent = -math.log(10000.0) * torch.arange(dim // 2, dtype=torch.float32, device=timestep.device) / (dim // 2)
    angles = timestep.float()[:, None] * torch.exp(exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _axis_angles(dim: int, length: int) -> Tensor:
    """Return the angles (length, dim / 2) of one axis, position x theta^(-2i / dim), in float64 as the original does."""
    inverse = ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(length, dtype=torch.float64), inverse)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a table first made for sampling may serve training later
def rope_table(head_dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return cos and sin (L, 1, E / 2, 2) of Wan's RoPE at frame 0: the temporal channels come first and stay unrotated."""
    axis_dim = 2 * (head_dim // 6)
    temporal = torch.zeros(height, width, (head_dim - 2 * axis_dim) // 2, dtype=torch.float64)
    rows = _axis_angles(axis_dim, height)[:, None].expand(height, width, -1)
    columns = _axis_angles(axis_dim, width)[None].expand(height, width, -1)
    angles = torch.cat([temporal, rows, columns], dim=-1).flatten(0, 1)[:, None]
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float().to(device)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the interleaved channel pairs (2i, 2i + 1) of x (B, L, N, E), in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, and has no kernels for complex numbers
        (even, odd), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:  # this is one pass over memory, and gives the same bits
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def sincos_positions(dim: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return parameter-free 2D positions (L, dim): half the channels tell the row, the rest the column."""
    rows_dim = 2 * (dim // 4)
    rows, columns = _axis_angles(rows_dim, height), _axis_angles(dim - rows_dim, width)
    rows = torch.cat([rows.sin(), rows.cos()], dim=-1)[:, None].expand(height, width, -1)
    columns = torch.cat([columns.sin(), columns.cos()], dim=-1)[None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float().to(device)


# ---- text ----


def fold_text_padding(prompt_embeds: Tensor, prompt_lengths: Tensor, text_max_length: int) -> tuple[Tensor, Tensor]:
    """Replace Wan's zero padding up to `text_max_length` by ONE pad token of the same attention weight (exact).

    All pads share one key and value, and softmax over m equal logits z weighs like one logit z + log(m).

    Args:
        prompt_embeds: (B, S, text_dim); values past a prompt's length are ignored.
        prompt_lengths: (B,) numbers of tokens that are text.

    Returns:
        Embeddings (B, S + 1, text_dim) and the attention bias (B, 1, 1, S + 1) in float32.
    """
    batch, num_tokens, text_dim = prompt_embeds.shape
    if num_tokens > text_max_length:
        raise ValueError(f"prompt_embeds have {num_tokens} tokens; text_max_length is {text_max_length}")
    lengths = prompt_lengths.to(prompt_embeds.device)[:, None]
    is_text = torch.arange(num_tokens, device=prompt_embeds.device)[None] < lengths
    text = prompt_embeds.masked_fill(~is_text[..., None], 0.0)
    text_bias = torch.zeros(batch, num_tokens, device=text.device).masked_fill(~is_text, -math.inf)
    pad_bias = torch.log((text_max_length - lengths).float())  # where no padding is left, log(0) = -inf
    bias = torch.cat([text_bias, pad_bias], dim=1)
    return torch.cat([text, text.new_zeros(batch, 1, text_dim)], dim=1), bias[:, None, None]


def mean_text_token(prompt_embeds: Tensor, prompt_lengths: Tensor | None) -> Tensor:
    """Return the mean (B, text_dim) over the text tokens of embeddings (B, S, text_dim)."""
    if prompt_lengths is None:
        return prompt_embeds.mean(dim=1)
    lengths = prompt_lengths.to(prompt_embeds.device)[:, None]
    is_text = torch.arange(prompt_embeds.shape[1], device=prompt_embeds.device)[None] < lengths
    return prompt_embeds.masked_fill(~is_text[..., None], 0.0).sum(dim=1) / lengths.clamp(min=1)


# ---- layers and blocks ----


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift in one pass over memory."""
    return torch.addcmul(shift, x, 1 + scale)


class Context(NamedTuple):
    """The tokens that some rows of a batch attend to.

    Attributes:
        embeds: (B, S, D), or (1, S, D) where one text is that of all rows.
        bias: (B, 1, 1, S), added to the attention logits.
    """

    embeds: Tensor
    bias: Tensor | None = None


class Fp32LayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in float32 whatever its weights' dtype (an fp32 island of Wan)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class Fp32RMSNorm(nn.RMSNorm):
    """An RMSNorm that computes in float32 whatever its weight's dtype (an fp32 island of Wan)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


class WanAttention(nn.Module):
    """Multi-head attention whose RMSNorm of q and k goes over the full width instead of each head, as Wan has it."""

    def __init__(self, hidden_size: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
        self.norm_q = Fp32RMSNorm(hidden_size, eps=eps)
        self.norm_k = Fp32RMSNorm(hidden_size, eps=eps)

    def forward(self, x: Tensor, texts: Sequence[Context] = (), rope: Tensor | None = None) -> Tensor:
        """Attend to x itself; with texts, each of the equal parts that the rows are cut into attends to its own text."""
        query = self.norm_q(self.to_q(x)).unflatten(2, (self.num_heads, -1))  # (B, L, N, E)
        contexts = texts or [Context(x)]
        attended = [
            self._attend(part, *context, rope)
            for part, context in zip(query.chunk(len(contexts)), contexts, strict=True)
        ]
        return self.to_out[0](attended[0] if len(attended) == 1 else torch.cat(attended))  # (B, L, D)

    def _attend(self, query: Tensor, context: Tensor, bias: Tensor | None, rope: Tensor | None) -> Tensor:
        key = self.norm_k(self.to_k(context)).unflatten(2, (self.num_heads, -1))
        value = self.to_v(context).unflatten(2, (self.num_heads, -1))
        if rope is not None:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        query, key = query.to(value.dtype), key.to(value.dtype)  # the norms answer in float32
        if len(value) != len(query):  # one text serves all rows
            key, value = (part.expand(len(query), -1, -1, -1) for part in (key, value))
        bias = None if bias is None else bias.to(value.dtype)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, N, L, E)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)


def modulation_table(rows: int, hidden_size: int) -> nn.Parameter:
    """Return a table (1, rows, D) of Wan's initial values."""
    table = torch.empty(1, rows, hidden_size)
    if not table.is_meta:  # drawing on meta would give nothing, and load torch's compiler, a second of every start
        table.normal_(std=hidden_size**-0.5)
    return nn.Parameter(table)


class GeluProjection(nn.Module):
    """The first layer of a feed-forward network and its GELU-tanh, under diffusers' name `proj`."""

    def __init__(self, hidden_size: int, ffn_dim: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two layers with a GELU-tanh between them; index 1 of `net` is empty where diffusers has a dropout, so that names agree."""

    def __init__(self, hidden_size: int, ffn_dim: int):
        super().__init__()
        self.net = nn.Sequential(GeluProjection(hidden_size, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class WanBlock(nn.Module):
    """Self-attention, text cross-attention and FFN around a float32 residual stream (Wan2.2:wan/modules/model.py)."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        hidden_size, eps = config.hidden_size, config.eps
        self.norm1 = Fp32LayerNorm(hidden_size, eps, elementwise_affine=False)
        self.attn1 = WanAttention(hidden_size, config.num_heads, eps)
        self.norm2 = Fp32LayerNorm(hidden_size, eps)
        self.attn2 = WanAttention(hidden_size, config.num_heads, eps)
        self.norm3 = Fp32LayerNorm(hidden_size, eps, elementwise_affine=False)
        self.ffn = FeedForward(hidden_size, config.ffn_dim)
        self.scale_shift_table = modulation_table(6, hidden_size)

    def forward(self, x: Tensor, timestep_proj: Tensor, texts: Sequence[Context], rope: Tensor) -> Tensor:
        """Return the residual stream (B, L, D) after this block.

        Args:
            x: (B, L, D); for the first block, rows that differ in their text alone may still be one row.
            timestep_proj: (B, 6, D) shifts, scales and gates, which this block's own table is added to.
        """
        dtype = texts[0].embeds.dtype
        table = self.scale_shift_table.float() + timestep_proj  # (B, 6, D)
        shift_msa, scale_msa, gate_msa = table[: len(x), :3].chunk(3, dim=1)
        shift_mlp, scale_mlp, gate_mlp = table[:, 3:].chunk(3, dim=1)
        attended = self.attn1(modulate(self.norm1(x), shift_msa, scale_msa).to(dtype), rope=rope)
        x = torch.addcmul(x, gate_msa, attended)
        if len(x) != len(table):
            x = x.repeat(len(table) // len(x), 1, 1)
        x = x + self.attn2(self.norm2(x).to(dtype), texts)
        return torch.addcmul(x, gate_mlp, self.ffn(modulate(self.norm3(x), shift_mlp, scale_mlp).to(dtype)))


class MlpEmbedder(nn.Module):
    """Two Linear layers with an activation between them: Wan's time embedder (SiLU) and text embedder (GELU-tanh)."""

    def __init__(self, in_dim: int, hidden_size: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden_size)
        self.activation = activation
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Embedders of the timestep and of the text, under diffusers' names."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = MlpEmbedder(config.freq_dim, config.hidden_size, nn.SiLU())
        self.time_proj = nn.Linear(config.hidden_size, 6 * config.hidden_size)
        self.text_embedder = MlpEmbedder(
            config.text_encoder_output_dim, config.hidden_size, nn.GELU(approximate="tanh")
        )

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return temb (B, D) and timestep_proj (B, 6, D) in float32, an fp32 island of Wan where autocast is off."""
        # The meta device, where FLOPs are counted, knows no autocast.
        with nullcontext() if timestep.is_meta else torch.autocast(timestep.device.type, enabled=False):
            features = sinusoidal_embedding(timestep, self.freq_dim)
            temb = self.time_embedder(features.to(self.time_embedder.linear_1.weight.dtype))
            timestep_proj = self.time_proj(F.silu(temb).to(self.time_proj.weight.dtype))
        return temb.float(), timestep_proj.float().unflatten(1, (6, -1))


class LiteBlock(nn.Module):
    """A plain transformer block: self-attention and an MLP (4x, SiLU), each behind a LayerNorm and with a residual."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.norm1 = nn.LayerNorm(hidden_size, config.eps)
        self.attn = nn.MultiheadAttention(hidden_size, config.num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(hidden_size, config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, config.ffn_dim), nn.SiLU(), nn.Linear(config.ffn_dim, hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))
