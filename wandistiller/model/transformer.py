"""WanLiteStudent: a 2D text-to-image transformer, made of Wan's own blocks in 2D or of small plain ones.

One frame of Wan is a 2D model, so the same class serves as the frozen teacher (the teacher's own shape and weights)
and as the student (a smaller shape). Submodules bear the names of diffusers' `WanTransformer3DModel`.

Shapes: B batch, C latent channels, H W latent grid, P patch size, L image tokens, S text tokens, D hidden_size,
N heads, E head dim.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wandistiller.errors import UserError
from wandistiller.model.config import CONFIG_NAME, STUDENT_ADVICE, WEIGHTS_NAME, ConfigError, StudentConfig
from wandistiller.model.layers import (
    ConditionEmbedder,
    Context,
    Fp32LayerNorm,
    LiteBlock,
    WanBlock,
    fold_text_padding,
    mean_text_token,
    modulate,
    modulation_table,
    rope_table,
    sincos_positions,
    sinusoidal_embedding,
)

# Parameters that stay in float32 whatever the dtype of the rest (diffusers' Wan: _keep_in_fp32_modules).
FP32_ISLANDS = re.compile(r"time_embedder|time_proj|scale_shift_table|\.norm")


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
    from wandistiller.files.tensor_files import read_header

    place = Path(place)
    if not place.exists():
        raise ConfigError(f"{place}: there is no such file or folder; {STUDENT_ADVICE}")
    if (place / CONFIG_NAME).exists():
        return StudentConfig.load(place)
    weights = place / WEIGHTS_NAME if place.is_dir() else place
    try:
        text = read_header(weights).metadata["student_config"]
    except UserError as error:
        raise ConfigError(f"{error}; {STUDENT_ADVICE}") from None
    except KeyError:
        raise ConfigError(f"{weights}: has no student_config in its metadata; {STUDENT_ADVICE}") from None
    return StudentConfig.from_json(text, f"{weights}, student_config in its metadata")
