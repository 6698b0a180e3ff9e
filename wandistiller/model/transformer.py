"""WanLiteStudent: a 2D text-to-image transformer, made of Wan's own blocks in 2D or of small plain ones.

One frame of Wan is a 2D model, so the same class serves as the frozen teacher (the teacher's own shape and weights)
and as the student (a smaller shape). Submodules bear the names of diffusers' `WanTransformer3DModel`.

Shapes: B batch, C latent channels, H W latent grid, P patch size, L image tokens, S text tokens, D hidden_size,
N heads, E head dim.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wandistiller.errors import UserError
from wandistiller.model.config import (
    CONFIG_NAME,
    STUDENT_ADVICE,
    WEIGHTS_NAME,
    ConfigError,
    StudentConfig,
)
from wandistiller.model.layers import (
    apply_rope,
    rope_table,
    sincos_positions,
    sinusoidal_embedding,
)

# Parameters that stay in float32 whatever the dtype of the rest (diffusers' Wan: _keep_in_fp32_modules).
FP32_ISLANDS = re.compile(r"time_embedder|time_proj|scale_shift_table|\.norm")


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


class WanLiteStudent(nn.Module):
    """The 2D transformer: `velocity = student(latents, timestep, prompt_embeds, prompt_lengths)`."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        blocks = WanBlock if config.is_wan else LiteBlock
        (self._init_wan if config.is_wan else self._init_lite)(config)
        self.blocks = nn.ModuleList(blocks(config) for _ in range(config.depth))

    def _init_wan(self, config: StudentConfig) -> None:
        channels, hidden_size, patch = config.num_channels, config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(channels, hidden_size, patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.norm_out = Fp32LayerNorm(hidden_size, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(hidden_size, patch * patch * channels)
        self.scale_shift_table = modulation_table(2, hidden_size)

    def _init_lite(self, config: StudentConfig) -> None:
        channels, hidden_size = config.num_channels, config.hidden_size
        self.conv_in = nn.Conv2d(channels, hidden_size, 3, padding=1)
        self.text_proj = nn.Linear(config.text_encoder_output_dim, hidden_size)
        self.time_mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.SiLU(), nn.Linear(4 * hidden_size, hidden_size)
        )
        self.conv_out = nn.Conv2d(hidden_size, channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        prompt_embeds: Tensor,
        prompt_lengths: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (noise - x_0) at a noise level.

        Args:
            latents: (B, C, H, W) in model space, (z - mean) / std; H and W are multiples of patch_size.
            timestep: (B,) or scalar, 1000 sigma.
            prompt_embeds: (B, S, text_dim).
            prompt_lengths: (B,) numbers of tokens that are text; the rest up to text_max_length then counts as Wan's zero
                padding, and a number outside of [0, S] as the nearer end. With None all S positions are used as they come.
            negative_prompt_embeds: (S', text_dim), all of it text. The model then answers for this prompt too, and computes
                only once what is equal for both.

        Returns:
            Velocity (B, C, H, W) in the dtype of `latents`; with a negative prompt (2 B, C, H, W), whose second half is
            that of the negative prompt.
        """
        if prompt_lengths is not None:
            # Wrong lengths are not refused, since looking at them would wait for the device.
            prompt_lengths = prompt_lengths.clamp(0, prompt_embeds.shape[1])
        prompts = [(prompt_embeds, prompt_lengths)]
        if negative_prompt_embeds is not None:
            num_tokens = len(negative_prompt_embeds)
            length = None if prompt_lengths is None else torch.full((1,), num_tokens, device=latents.device)
            prompts.append((negative_prompt_embeds[None].to(prompt_embeds), length))
        for embeds, _ in prompts:
            self._check_inputs(latents, embeds)
        timestep = torch.as_tensor(timestep, device=latents.device).expand(latents.shape[0])
        forward = self._forward_wan if self.config.is_wan else self._forward_lite
        return forward(latents, timestep, prompts).to(latents.dtype)

    def _check_inputs(self, latents: Tensor, prompt_embeds: Tensor) -> None:
        channels, patch, text_dim = (
            self.config.num_channels,
            self.config.patch_size,
            self.config.text_encoder_output_dim,
        )
        if latents.ndim != 4 or latents.shape[1] != channels or latents.shape[2] % patch or latents.shape[3] % patch:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: expected (B, {channels}, H, W) with H and W multiples of {patch}"
            )
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != text_dim:
            raise ValueError(f"prompt_embeds of shape {tuple(prompt_embeds.shape)}: expected (B, S, {text_dim})")

    def _forward_wan(
        self, latents: Tensor, timestep: Tensor, prompts: Sequence[tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        dtype = self.patch_embedding.weight.dtype
        patch = self.config.patch_size
        grid_height, grid_width = latents.shape[2] // patch, latents.shape[3] // patch
        rope = rope_table(self.config.head_dim, grid_height, grid_width, latents.device)
        temb, timestep_proj = (
            part.repeat(len(prompts), *[1] * (part.ndim - 1)) for part in self.condition_embedder(timestep)
        )
        texts = tuple(self._embed_text(*prompt, dtype) for prompt in prompts)

        x = self.patch_embedding(latents.to(dtype)).flatten(2).transpose(1, 2).float().contiguous()  # (B, L, D)
        for block in self.blocks:
            x = self._run(block, x, timestep_proj, texts, rope)

        shift_out, scale_out = (self.scale_shift_table.float() + temb[:, None]).chunk(2, dim=1)
        x = self.proj_out(modulate(self.norm_out(x), shift_out, scale_out).to(texts[0].embeds.dtype))  # (B, L, P*P*C)
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (grid_height, grid_width))  # (B, h, w, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, H, W)

    def _embed_text(self, prompt_embeds: Tensor, prompt_lengths: Tensor | None, dtype: torch.dtype) -> Context:
        bias = None
        if prompt_lengths is not None:
            prompt_embeds, bias = fold_text_padding(prompt_embeds, prompt_lengths, self.config.text_max_length)
        return Context(self.condition_embedder.text_embedder(prompt_embeds.to(dtype)), bias)

    def _run(self, block: nn.Module, *inputs: Tensor | Sequence[Context]) -> Tensor:
        """Run a block; with gradient_checkpointing its insides are computed again for the backward pass instead of kept."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _forward_lite(
        self, latents: Tensor, timestep: Tensor, prompts: Sequence[tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        dtype = self.conv_in.weight.dtype
        height, width = latents.shape[-2:]
        positions = sincos_positions(self.config.hidden_size, height, width, latents.device)
        time = self.time_mlp(sinusoidal_embedding(timestep, self.config.hidden_size).to(dtype))
        texts = [self.text_proj(mean_text_token(*prompt).to(dtype)) for prompt in prompts]

        x = self.conv_in(latents.to(dtype)).flatten(2).transpose(1, 2)  # (B, L, D)
        x = x + positions.to(x.dtype)
        x = torch.cat([x + (time + text)[:, None] for text in texts])
        for block in self.blocks:
            x = self._run(block, x)
        return self.conv_out(x.transpose(1, 2).unflatten(2, (height, width)))  # (B, C, H, W)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write student_config.json and diffusion_model.safetensors into `folder`, each whole or not at all.

        Args:
            state_dict: the weights to write, where a sharded student holds only a part of its own.
        """
        from wandistiller.files.atomic import write_text
        from wandistiller.files.tensor_files import write_tensors

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config_json = self.config.to_json()
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in (state_dict or self.state_dict()).items()
        }
        write_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt", "student_config": config_json})
        write_text(folder / CONFIG_NAME, config_json)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "WanLiteStudent":
        """Load a student.

        Args:
            folder: a folder that a student was saved in, the file with its weights, or a hub repository (`owner/name`).

        Raises:
            ConfigError: a file is missing or damaged, weights and config do not belong together, or weights are no numbers.
            UserError: there is no such folder, and no such repository can be had either.
        """
        from wandistiller.files.hub import place_of
        from wandistiller.files.weights import admit, stored_tensors

        files = [CONFIG_NAME, WEIGHTS_NAME]
        folder = place_of(folder, files, f"a student's folder with {' and '.join(files)}")
        config = saved_config(folder)
        path = folder if folder.is_file() else folder / WEIGHTS_NAME
        with torch.device("meta"):
            student = cls(config)
        expected = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
        try:
            stored = stored_tensors(path)
            if any(len(tensor.shape) == 5 for tensor in stored.values()):
                raise ConfigError(f"{path}: was exported for other tools; {STUDENT_ADVICE}")
            weights, _ = admit(stored, expected, path, what=f"student as its {CONFIG_NAME} says")
            tensors = {name: weight.read().to(device) for name, weight in weights.items()}
        except UserError as error:
            raise ConfigError(str(error)) from None
        student.load_state_dict(tensors, assign=True)
        return student.eval()


@contextmanager
def block_outputs(model: WanLiteStudent, layers: Sequence[int], num_rows: int | None = None) -> Iterator[list[Tensor]]:
    """Collect the hidden states (B, L, D) after the blocks in `layers` during the one forward pass inside the context.

    Args:
        num_rows: number of first rows to copy, so that the memory of the others is free; None keeps the outputs themselves.
    """
    outputs: list[Tensor] = []

    def keep(block: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs.append(output if num_rows is None else output[:num_rows].clone())

    hooks = [model.blocks[layer].register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def saved_config(place: str | Path) -> StudentConfig:
    """Read the config beside a student's weights, or else the one in their metadata.

    Raises:
        ConfigError: there is no student in this place.
    """
    from wandistiller.files.tensor_files import DamagedFileError, read_header

    place = Path(place)
    if not place.exists():
        raise ConfigError(f"{place}: there is no such file or folder; {STUDENT_ADVICE}")
    if (place / CONFIG_NAME).exists():
        return StudentConfig.load(place)
    weights = place / WEIGHTS_NAME if place.is_dir() else place
    try:
        text = read_header(weights).metadata["student_config"]
    except DamagedFileError as error:
        raise ConfigError(f"{error}; {STUDENT_ADVICE}") from None
    except KeyError:
        raise ConfigError(f"{weights}: has no student_config in its metadata; {STUDENT_ADVICE}") from None
    return StudentConfig.from_json(text, f"{weights}, student_config in its metadata")
