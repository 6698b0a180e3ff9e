"""A Wan's VAE for one frame: 2D, and equal to diffusers' AutoencoderKLWan.

A causal convolution pads the past with zeros, so at the first frame only the last temporal slice of its kernel counts, and temporal
down- and upsampling pass that frame on as it is. What is 3D in diffusers' modules (diffusers:models/autoencoders/
autoencoder_kl_wan.py) is replaced here; their blocks then take (B, C, H, W). Most of the time and the memory that is saved is that of
the padded zeros.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan as wan_3d
from torch import Tensor, nn

from wandistiller.wan.vae import load_vae

TILE_PIXELS = 1024  # side of what is decoded at once


class WanVae2D(nn.Module):
    """The encoder and the decoder of a Wan's VAE for single pictures; it takes over, and changes, the modules of diffusers' `vae`."""

    def __init__(self, vae: Any):
        super().__init__()
        self.config = vae.config
        self.patch_size = self.config.patch_size or 1
        self.encoder, self.quant_conv = _in_2d(vae.encoder), _in_2d(vae.quant_conv)
        self.decoder, self.post_quant_conv = _in_2d(vae.decoder), _in_2d(vae.post_quant_conv)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the means of the latents (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]."""
        patches = F.pixel_unshuffle(pixels, self.patch_size)  # (B, 3 p p, H / p, W / p), rows of a patch before columns
        patches = _columns_first(patches, self.patch_size)
        return self.quant_conv(self.encoder(patches)).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor, tile_pixels: int = TILE_PIXELS) -> Tensor:
        """Return the pictures (B, 3, H, W) in [-1, 1] of latents (B, C, h, w), as the VAE has them.

        All that comes after the attention of the middle block sees a few latent pixels around, so that large pictures are decoded
        in tiles with such a margin: in less memory, and without a seam.
        """
        hidden = self.decoder.mid_block(self.decoder.conv_in(self.post_quant_conv(latents)))
        side = tile_pixels // self.config.scale_factor_spatial
        height, width = hidden.shape[-2:]
        num_at_once = max(1, side**2 // (height * width))
        pictures = [
            torch.cat([self._row(part, top, side) for top in range(0, height, side)], dim=-2)
            for part in hidden.split(num_at_once)
        ]
        return torch.cat(pictures)

    @torch.inference_mode()
    def pictures(
        self, latents: Tensor, latents_mean: Sequence[float] | None, latents_std: Sequence[float] | None
    ) -> np.ndarray:
        """Return the pictures (B, H, W, 3) uint8 of latents (B, C, h, w) in model space.

        Args:
            latents_mean, latents_std: statistics that put the latents into model space; None stands for the VAE's own.
        """
        device = self.post_quant_conv.weight.device
        mean = torch.tensor(latents_mean or self.config.latents_mean, device=device)[:, None, None]
        std = torch.tensor(latents_std or self.config.latents_std, device=device)[:, None, None]
        pixels = self.decode(latents.to(device, torch.float32) * std + mean)
        shares = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
        return (shares * 255).round().astype(np.uint8)

    def _row(self, hidden: Tensor, top: int, side: int) -> Tensor:
        """Return the pixels of all tiles whose first row is `top`."""
        # 2 convolutions of each residual block reach a pixel far, in stages whose pixels halve; so do those that upsample:
        margin = 4 * (self.config.num_res_blocks + 1) + 2
        height, width = hidden.shape[-2:]
        scale, tiles = self.config.scale_factor_spatial, []
        for left in range(0, width, side):
            first_row, first_column = max(0, top - margin), max(0, left - margin)
            around = hidden[:, :, first_row : top + side + margin, first_column : left + side + margin]
            rows = slice((top - first_row) * scale, (min(top + side, height) - first_row) * scale)
            columns = slice((left - first_column) * scale, (min(left + side, width) - first_column) * scale)
            tiles.append(self._pixels(around)[:, :, rows, columns])
        return torch.cat(tiles, dim=-1)

    def _pixels(self, hidden: Tensor) -> Tensor:
        decoder = self.decoder
        for up_block in decoder.up_blocks:
            hidden = up_block(hidden)
        patches = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden)))
        return F.pixel_shuffle(_columns_first(patches, self.patch_size), self.patch_size).clamp(-1, 1)


def _columns_first(patches: Tensor, patch_size: int) -> Tensor:
    """Exchange rows and columns inside patches (B, 3 p p, H, W): Wan's channels have columns first, torch's rows."""
    return patches.unflatten(1, (-1, patch_size, patch_size)).transpose(2, 3).flatten(1, 3)


def _in_2d(module: Any) -> Any:
    """Return what stands for a module at one frame; one that is not 3D itself is kept, with its children replaced."""
    for kind, flat in _FLAT.items():
        if isinstance(module, kind):
            return flat(module)
    for name, child in module.named_children():
        setattr(module, name, _in_2d(child))
    return module


def _conv_2d(conv: Any) -> nn.Conv2d:
    """Return a causal convolution's last temporal slice."""
    with torch.device("meta"):
        flat = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size[1:], conv.stride[1:], padding=conv._padding[2::-2]
        )
    flat.weight, flat.bias = nn.Parameter(conv.weight.data[:, :, -1].clone()), conv.bias
    return flat


class _Norm(nn.Module):
    """The norm over channels, with its constant factor inside the weight."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight = nn.Parameter(norm.gamma.data.reshape(-1, 1, 1) * norm.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.weight


class _Resample(nn.Sequential):
    """Halves or doubles the sides; the first frame passes the temporal convolution by."""

    def forward(self, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
        return super().forward(x)


class _Attention(nn.Module):
    """Self-attention with one head over all pixels."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm, self.to_qkv, self.proj = _Norm(block.norm), block.to_qkv, block.proj

    def forward(self, x: Tensor) -> Tensor:
        # Rows have to be contiguous, or torch keeps all of the attention's H W x H W logits:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous().chunk(3, dim=-1)  # (B, H W, C) each
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj(attended.transpose(1, 2).unflatten(2, x.shape[-2:]))


class _Down(nn.Module):
    """The shortcut of Wan 2.2's encoder: means over groups of pixels and channels; the frame before the first is zeros."""

    def __init__(self, down: Any):
        super().__init__()
        self.factor_t, self.factor_s, self.out_channels = down.factor_t, down.factor_s, down.out_channels

    def forward(self, x: Tensor) -> Tensor:
        pixels = F.pixel_unshuffle(x, self.factor_s).unflatten(1, (-1, 1, self.factor_s**2))  # (B, C, 1, f f, h, w)
        frames = F.pad(pixels, (0, 0, 0, 0, 0, 0, self.factor_t - 1, 0)).flatten(1, 3)
        return frames.unflatten(1, (self.out_channels, -1)).mean(dim=2)


class _Up(nn.Module):
    """The shortcut of Wan 2.2's decoder: channels repeated into pixels; of the frames they make, the last counts."""

    def __init__(self, up: Any):
        super().__init__()
        self.repeats, self.factors = up.repeats, (up.out_channels, up.factor_t, up.factor_s**2)
        self.factor_s = up.factor_s

    def forward(self, x: Tensor, first_chunk: bool = True) -> Tensor:
        last = x.repeat_interleave(self.repeats, dim=1).unflatten(1, self.factors)[:, :, -1]  # (B, C, f f, h, w)
        return F.pixel_shuffle(last.flatten(1, 2), self.factor_s)


_FLAT: dict[type, Callable[[Any], nn.Module]] = {
    wan_3d.WanCausalConv3d: _conv_2d,
    wan_3d.WanRMS_norm: _Norm,
    wan_3d.WanResample: lambda resample: _Resample(*resample.resample),
    wan_3d.WanAttentionBlock: _Attention,
    wan_3d.AvgDown3D: _Down,
    wan_3d.DupUp3D: _Up,
}


def load_vae_2d(place: Path, num_channels: int, vae_scale_factor: int, device: str = "cpu") -> WanVae2D:
    """Load a VAE for single pictures; see `load_vae`."""
    return WanVae2D(load_vae(place, num_channels, vae_scale_factor)).to(device).eval()
