"""A Wan's VAE: where it lies, what its config.json says of its latents, and the pictures it makes of them.

diffusers is imported where the VAE is loaded.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.checked_json import STAGES, WHOLE, TeacherFileError, read_json, setting
from wandistiller.files.hub import fetch, is_hub_id
from wandistiller.model.record import latents_kinds

MAX_STATISTICS_ERROR = 1e-3  # published figures have four decimals


@dataclass(frozen=True)
class VaeLocation:
    """Where a VAE lies: a folder or hub id, and the subfolder of it that holds the VAE, if any."""

    location: str
    subfolder: str | None

    def __str__(self) -> str:
        return f"{self.location}/{self.subfolder}" if self.subfolder else self.location

    @property
    def is_local(self) -> bool:
        return Path(self.location).exists()

    def folder(self, pattern: str = "*") -> Path:
        """Return the VAE's folder on this disk; of one on the hub the files that match `pattern` are fetched."""
        folder = Path(self.location)
        if not self.is_local:
            folder = fetch(self.location, [f"vae/{pattern}"], "a local folder with vae/, as --vae_path")
        return folder / (self.subfolder or "")

    def config_path(self) -> Path:
        """Return the VAE's config.json; one on the hub is fetched without its weights."""
        return self.folder("config.json") / "config.json"


@dataclass(frozen=True)
class VaeConfig:
    """What a VAE's config.json says of its latents; what the file leaves out is None.

    Attributes:
        vae_scale_factor: pixels per latent pixel.
        latents_mean, latents_std: statistics per channel; model space is (z - mean) / std.
    """

    vae_scale_factor: int | None
    latents_mean: list[float] | None
    latents_std: list[float] | None


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel; None where they are not known."""

    mean: Sequence[float] | None
    std: Sequence[float] | None


def find_vae(vae_path: str | None, teacher_path: str) -> VaeLocation:
    """Find the VAE by `--vae_path`, or else the teacher's own in its vae/ folder."""
    advice = (
        "give --vae_path a diffusers AutoencoderKLWan folder, such as the vae/ folder of Wan-AI/Wan2.1-T2V-1.3B-Diffusers "
        "(Wan2.1 and A14B) or of Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    )
    location = vae_path or teacher_path
    folder = Path(location)
    if (folder / "vae" / "config.json").is_file():
        return VaeLocation(str(folder), "vae")
    if vae_path and (folder / "config.json").is_file():
        return VaeLocation(str(folder), None)
    if not folder.exists() and is_hub_id(location):
        return VaeLocation(location, "vae")
    if vae_path:
        raise UserError(f"--vae_path {vae_path}: holds no VAE (no config.json there or in vae/); {advice}")
    reason = " beside it (no vae/config.json)" if folder.exists() else ": there is no such folder"
    raise UserError(f"the teacher {teacher_path} has no VAE{'' if teacher_path == 'mock' else reason}; {advice}")


def read_vae_config(path: Path, num_channels: int) -> VaeConfig:
    """Read a VAE's config.json.

    Raises:
        TeacherFileError: it contradicts itself, or is not that of a VAE with latents of `num_channels`.
    """
    values = read_json(path)
    if (name := values.get("_class_name")) not in (None, "AutoencoderKLWan"):
        raise TeacherFileError(f"{path}: is that of {reprlib.repr(name)}; a Wan's VAE is an AutoencoderKLWan")
    z_dim = setting(values, "z_dim", WHOLE, path)
    if z_dim not in (None, num_channels):
        raise TeacherFileError(f"{path}: z_dim is {z_dim}; the teacher's latents have {num_channels} channels")
    mean, std = (setting(values, name, kind, path) for name, kind in latents_kinds(num_channels).items())
    return VaeConfig(_read_scale_factor(values, path), mean, std)


def _read_scale_factor(values: dict, path: Path) -> int | None:
    """Return the scale factor that a config.json means; the factor it records must agree with its stages and patches."""
    recorded = setting(values, "scale_factor_spatial", WHOLE, path)
    patch_size = setting(values, "patch_size", WHOLE, path) or 1
    stages = setting(values, "dim_mult", STAGES, path)
    if stages is None:
        return recorded
    factor = _scale_factor(len(stages), patch_size)
    if recorded not in (None, factor):
        raise TeacherFileError(
            f"{path}: scale_factor_spatial is {recorded}, but its {len(stages)} stages (dim_mult) and patches of "
            f"{patch_size} make it {factor}"
        )
    return factor


def _scale_factor(num_stages: int, patch_size: int) -> int:
    """Return the pixels per latent pixel: every stage but the last halves the side (diffusers: autoencoder_kl_wan.py)."""
    return 2 ** (num_stages - 1) * patch_size


def check_statistics(learnt: LatentStatistics, found: LatentStatistics, where: Path) -> None:
    """Refuse a VAE of other latents than a student learns: WanPipeline takes mean and std from the VAE's config."""
    for name in ("mean", "std"):
        ours, theirs = getattr(learnt, name), getattr(found, name)
        if ours and _differ(ours, theirs):
            raise UserError(
                f"{where}: has other latents_{name} than the latents this student learnt; give --vae_path its teacher's own "
                "VAE"
            )


def _differ(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return any(abs(a - b) > MAX_STATISTICS_ERROR for a, b in zip(ours, theirs, strict=True))


def load_vae(location: VaeLocation, num_channels: int, vae_scale_factor: int, device: str = "cpu"):
    """Load the AutoencoderKLWan in float32, checked to be the one that these latents belong to.

    Raises:
        UserError: it cannot be loaded, or has other channels or another scale factor.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    try:
        vae = AutoencoderKLWan.from_pretrained(
            location.location,
            subfolder=location.subfolder,
            dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
        )
    except Exception as err:  # diffusers, huggingface_hub and safetensors each wrap a bad file in their own types
        reason = " ".join(str(err).split())[:200]
        raise UserError(
            f"{location}: the VAE cannot be loaded ({type(err).__name__}: {reason}); see --vae_path"
        ) from err
    factor = _scale_factor(len(vae.config.dim_mult), vae.config.patch_size or 1)
    if (vae.config.z_dim, factor) != (num_channels, vae_scale_factor):
        raise UserError(
            f"{location}: is a VAE of {vae.config.z_dim} channels and factor {factor}; the student's latents have "
            f"{num_channels} channels and factor {vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    for name, kind in latents_kinds(num_channels).items():
        setting(vae.config, name, kind, f"{location}, config.json")
    return vae.to(device).eval()


@torch.inference_mode()
def decode(
    vae, latents: Tensor, latents_mean: Sequence[float] | None, latents_std: Sequence[float] | None
) -> np.ndarray:
    """Return the pictures (B, H, W, 3) of latents (B, C, h, w) in model space.

    Args:
        latents_mean, latents_std: statistics that put the latents into model space; None stands for the VAE's own.
    """
    device = next(vae.parameters()).device
    mean = torch.tensor(latents_mean or vae.config.latents_mean, device=device)[:, None, None]
    std = torch.tensor(latents_std or vae.config.latents_std, device=device)[:, None, None]
    raw_latents = latents.to(device, torch.float32) * std + mean
    pixels = vae.decode(raw_latents[:, :, None], return_dict=False)[0][:, :, 0]  # (B, 3, H, W) in [-1, 1]
    pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
    return (pixels * 255).round().astype(np.uint8)
