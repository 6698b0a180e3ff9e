"""The demo teacher's video autoencoder: a small AutoencoderKLWan, trained on crops, then on clips, then measured.

It has the layout of Wan2.2's VAE (2x2 pixel patches, residual down and up blocks): its linear shortcuts carry colour
from the first step on, so that a VAE this small does not sit on the plateau where it paints everything in one colour.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import demo_world as world
import numpy as np
import torch
import torch.nn.functional as F
from demo_optim import MuonWithAdam, warmup_cosine
from torch import Tensor
from tqdm import tqdm

LATENT_CHANNELS = 16
KL_WEIGHT = 5e-5
EDGE_WEIGHT = 4.0  # pixels near an edge count more: most of a picture is flat, and learnt in no time
CROP = 32


def new_vae():
    """Make a small untrained AutoencoderKLWan: 8x in space, 4x in time, 16 latent channels."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    with torch.no_grad():  # start with little posterior noise: at unit noise the decoder learns to ignore the latents
        vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0
        vae.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    return vae


@contextlib.contextmanager
def first_frame_as_2d() -> Iterator[None]:
    """Run causal 3D convolutions over a lone first frame as 2D ones: the same numbers at a third of the work.

    The causal padding in front of the first frame is zeros, so only the kernel's last time slice meets the picture.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    original = WanCausalConv3d.forward

    def forward(self, x, cache_x=None):
        if x.shape[2] > 1 or cache_x is not None or self.stride[0] > 1:
            return original(self, x, cache_x)
        padding = (self._padding[2], self._padding[0])
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=padding).unsqueeze(2)

    WanCausalConv3d.forward = forward
    try:
        yield
    finally:
        WanCausalConv3d.forward = original


def _decode_unclamped(vae, latents: Tensor) -> Tensor:
    """Decode as AutoencoderKLWan.decode without its final clamp, which would stop the gradient of overshooting pixels."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    features = vae.post_quant_conv(latents)
    chunks = []
    for t in range(features.shape[2]):
        vae._conv_idx = [0]
        frame = features[:, :, t : t + 1]
        chunks.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=t == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, dim=2), patch_size=vae.config.patch_size)


def random_pictures(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw training stills, uint8 (count, 1, 64, 64, 3)."""
    return np.stack([world.render(world.sample_scene(rng), rng) for _ in range(count)])


def random_clips(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw training clips, uint8 (count, 5, 64, 64, 3)."""
    return np.stack([world.render(world.sample_moving_scene(rng), rng, world.NUM_FRAMES) for _ in range(count)])


def _batch(frames: np.ndarray, crop: int, rng: np.random.Generator, device: torch.device) -> Tensor:
    """Crop each picture or clip at its own place: float (B, 3, T, crop, crop) in [-1, 1]."""
    corners = rng.integers(0, world.IMAGE_SIZE - crop + 1, (len(frames), 2))
    crops = np.stack([f[:, y : y + crop, x : x + crop] for f, (y, x) in zip(frames, corners, strict=True)])
    return torch.from_numpy(world.to_tensor_range(crops)).to(device)


def _near_edges(pixels: Tensor, reach: int = 3) -> Tensor:
    """Return 1 where the picture changes within `reach` pixels, else 0: (B, 1, T, H, W)."""
    frames = pixels.transpose(1, 2).flatten(0, 1)
    window = 2 * reach + 1
    highest, lowest = F.max_pool2d(frames, window, 1, reach), -F.max_pool2d(-frames, window, 1, reach)
    changes = (highest - lowest).amax(1, keepdim=True) > 0.1
    return changes.float().unflatten(0, (len(pixels), -1)).transpose(1, 2)


def _loss(vae, pixels: Tensor) -> Tensor:
    posterior = vae.encode(pixels).latent_dist
    error = _decode_unclamped(vae, posterior.sample()) - pixels
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
    weight = 1 + (EDGE_WEIGHT - 1) * _near_edges(pixels)
    # Absolute error keeps edges crisp, squared error keeps colours exact.
    return (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * kl


def train_vae(*, crop_steps: int, clip_steps: int, full_steps: int, seed: int, device: torch.device):
    """Train on crops of stills, then on clips among stills, then on whole pictures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = new_vae().to(device).train()
    total = crop_steps + clip_steps + full_steps
    matrices = [p for p in vae.parameters() if p.ndim >= 4 and min(p.shape[0], p[0].numel()) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in vae.parameters() if id(p) not in chosen]
    optimizer = MuonWithAdam(
        [{"params": matrices, "muon": True, "lr": 4e-3}, {"params": others, "muon": False, "lr": 2e-3}]
    )
    pool_size = max(32, min(12000, 8 * total))
    stills = random_pictures(rng, pool_size)
    clips = random_clips(rng, pool_size // 8)
    progress = tqdm(range(total), desc="vae", mininterval=5)
    for step in progress:
        if crop_steps <= step < crop_steps + clip_steps and step % 2:
            pixels = _batch(clips[rng.integers(len(clips), size=6)], CROP, rng, device)
        elif step < crop_steps + clip_steps:
            pixels = _batch(stills[rng.integers(len(stills), size=32)], CROP, rng, device)
        else:
            pixels = _batch(stills[rng.integers(len(stills), size=10)], world.IMAGE_SIZE, rng, device)
        optimizer.set_lr_factor(warmup_cosine(step, total, warmup=min(30, total)))
        with first_frame_as_2d():
            loss = _loss(vae, pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == total - 1:
            progress.set_postfix(loss=f"{loss.item():.4f}", stills_db=f"{still_psnr(vae, seed, 16):.1f}")
    return record_latent_statistics(vae.eval(), seed, count=min(512, pool_size))


@torch.no_grad()
def encode(vae, frames: np.ndarray, batch: int = 64) -> Tensor:
    """Encode uint8 (N, T, H, W, 3) to raw latents (N, C, T', h, w), the posterior's mean."""
    device = next(vae.parameters()).device
    parts = []
    with first_frame_as_2d():
        for start in range(0, len(frames), batch):
            pixels = torch.from_numpy(world.to_tensor_range(frames[start : start + batch])).to(device)
            parts.append(vae.encode(pixels).latent_dist.mode())
    return torch.cat(parts)


def normalise(vae, latents: Tensor) -> Tensor:
    """Turn raw latents into the transformer's: zero mean and unit deviation per channel, by the VAE's own config."""
    mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def record_latent_statistics(vae, seed: int, count: int):
    """Write latents_mean and latents_std, measured over stills and clips, into the VAE's config as Wan does."""
    rng = np.random.default_rng(seed + 1)
    stills, clips = encode(vae, random_pictures(rng, count)), encode(vae, random_clips(rng, count // 8))
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in (stills, clips)], dim=1)
    mean, std = values.mean(1), values.std(1)
    vae.register_to_config(latents_mean=[round(v, 4) for v in mean.tolist()])
    vae.register_to_config(latents_std=[round(v, 4) for v in std.tolist()])
    return vae


@torch.no_grad()
def _psnr(vae, frames: np.ndarray) -> float:
    device = next(vae.parameters()).device
    pixels = torch.from_numpy(world.to_tensor_range(frames)).to(device)
    error = (vae.decode(vae.encode(pixels).latent_dist.mode()).sample - pixels) / 2
    per_picture = error.square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * torch.log10(per_picture)).mean())


def still_psnr(vae, seed: int, count: int) -> float:
    """Return the mean reconstruction PSNR in dB over fresh stills."""
    with first_frame_as_2d():
        return _psnr(vae, random_pictures(np.random.default_rng(seed + 2), count))


def clip_psnr(vae, seed: int, count: int) -> float:
    """Return the mean reconstruction PSNR in dB over fresh clips."""
    return _psnr(vae, random_clips(np.random.default_rng(seed + 3), count))


def load_vae(folder: Path, device: torch.device):
    """Load the VAE of a pipeline folder or a work folder, in fp32."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float32).to(device).eval()
