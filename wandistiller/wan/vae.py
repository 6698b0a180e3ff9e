"""What the config.json of an AutoencoderKLWan says of its latents."""

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.checked_json import POSITIVE, STAGES, WHOLE, TeacherFileError, numbers, read_json, setting
from wandistiller.files.hub import fetch

if TYPE_CHECKING:
    pass


from wandistiller.model.config import StudentConfig


@dataclass(frozen=True)
class VaeConfig:
    """A VAE's latents; what the file leaves out is None.

    Attributes:
        vae_scale_factor: pixels per latent pixel.
        latents_mean, latents_std: per channel; model space is (z - mean) / std.
    """

    vae_scale_factor: int | None
    latents_mean: list[float] | None
    latents_std: list[float] | None


def vae_config_path(location: str, subfolder: str | None) -> Path:
    """The config.json of the VAE that `pictures.find_vae` found; one on the hub is fetched, without its weights."""
    folder = Path(location)
    if not folder.exists():
        folder = fetch(location, ["vae/config.json"], "a local folder with vae/, as --vae_path")
    return folder / (subfolder or "") / "config.json"


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
    return VaeConfig(
        _scale_factor(values, path),
        setting(values, "latents_mean", numbers(num_channels), path),
        setting(values, "latents_std", numbers(num_channels, POSITIVE), path),
    )


def _scale_factor(values: dict, path: Path) -> int | None:
    """A halving per stage but the last, times its patch; what is recorded must agree (diffusers: autoencoder_kl_wan.py)."""
    recorded = setting(values, "scale_factor_spatial", WHOLE, path)
    patch_size = setting(values, "patch_size", WHOLE, path) or 1
    stages = setting(values, "dim_mult", STAGES, path)
    if stages is None:
        return recorded
    factor = 2 ** (len(stages) - 1) * patch_size
    if recorded not in (None, factor):
        raise TeacherFileError(
            f"{path}: scale_factor_spatial is {recorded}, but its {len(stages)} stages (dim_mult) and patches of "
            f"{patch_size} make it {factor}"
        )
    return factor


def find_vae(vae_path: str | None, teacher_path: str) -> tuple[str, str | None]:
    """Where the VAE is: (folder or hub id, subfolder); `vae_path` goes before the teacher's own vae/ folder."""
    advice = (
        "give --vae_path a diffusers AutoencoderKLWan folder, such as the vae/ folder of Wan-AI/Wan2.1-T2V-1.3B-Diffusers "
        "(Wan2.1 and A14B) or of Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    )
    location = vae_path or teacher_path
    folder = Path(location)
    if (folder / "vae" / "config.json").is_file():
        return str(folder), "vae"
    if vae_path and (folder / "config.json").is_file():
        return str(folder), None
    if not folder.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", location) and location.count("/") == 1:
        return location, "vae"
    if vae_path:
        raise UserError(f"--vae_path {vae_path}: holds no VAE (no config.json there or in vae/); {advice}")
    reason = " beside it (no vae/config.json)" if folder.exists() else ": there is no such folder"
    raise UserError(f"the teacher {teacher_path} has no VAE{'' if teacher_path == 'mock' else reason}; {advice}")


def load_vae(location: str, subfolder: str | None, num_channels: int, vae_scale_factor: int, device: str = "cpu"):
    """The AutoencoderKLWan in float32, checked to be the one these latents belong to.

    Raises:
        UserError: it cannot be loaded, or has other channels or another scale factor.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    where = f"{location}/{subfolder}" if subfolder else location
    try:
        vae = AutoencoderKLWan.from_pretrained(
            location, subfolder=subfolder, dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False
        )
    except Exception as err:  # diffusers, huggingface_hub and safetensors each wrap a bad file in their own types
        reason = " ".join(str(err).split())[:200]
        raise UserError(f"{where}: the VAE cannot be loaded ({type(err).__name__}: {reason}); see --vae_path") from err
    factor = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    if (vae.config.z_dim, factor) != (num_channels, vae_scale_factor):
        raise UserError(
            f"{where}: is a VAE of {vae.config.z_dim} channels and factor {factor}; the student's latents have "
            f"{num_channels} channels and factor {vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    return vae.to(device).eval()


@torch.inference_mode()
def decode(
    vae, latents: Tensor, latents_mean: Sequence[float] | None, latents_std: Sequence[float] | None
) -> np.ndarray:
    """Pictures (B, H, W, 3) of latents (B, C, h, w) in model space; statistics left out are the VAE's own."""
    device = next(vae.parameters()).device
    mean = torch.tensor(latents_mean or vae.config.latents_mean, device=device)[:, None, None]
    std = torch.tensor(latents_std or vae.config.latents_std, device=device)[:, None, None]
    raw_latents = latents.to(device, torch.float32) * std + mean
    pixels = vae.decode(raw_latents[:, :, None], return_dict=False)[0][:, :, 0]  # (B, 3, H, W) in [-1, 1]
    pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
    return (pixels * 255).round().astype(np.uint8)


_MAX_STATISTICS_ERROR = 1e-3  # published figures have four decimals


def vae_folder(location: str, subfolder: str | None) -> Path:
    """The VAE's folder on this disk, from what `pictures.find_vae` found; one on the hub is fetched."""
    folder = Path(location)
    if not folder.exists():
        folder = fetch(location, ["vae/*"], "a local folder with vae/, as --vae_path")
    return folder / subfolder if subfolder else folder


def check_statistics(vae_config, config: StudentConfig, where: Path) -> None:
    """Refuse a VAE of other latents than the student's: WanPipeline takes mean and std from the VAE's config."""
    record = config.distillation or {}
    for name in ("latents_mean", "latents_std"):
        ours, theirs = record.get(name), vae_config[name]
        if ours and _differ(ours, theirs):
            raise UserError(
                f"{where}: has other {name} than the latents this student learnt; give --vae_path its teacher's own VAE"
            )


def _differ(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return any(abs(a - b) > _MAX_STATISTICS_ERROR for a, b in zip(ours, theirs, strict=True))
