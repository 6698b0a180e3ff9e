"""A Wan's VAE: where it lies, what its config.json says of its latents, and the pictures it makes of them.

diffusers is imported where the VAE is loaded.
"""

import math
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wandistiller.errors import UserError
from wandistiller.files.checked_json import STAGES, WHOLE, TeacherFileError, read_json, setting
from wandistiller.files.hub import fetch, is_hub_id, local_path
from wandistiller.files.weights import SUFFIXES, admit, stored_tensors, weight_files
from wandistiller.wan.names import parts_folder
from wandistiller.wan.record_kinds import latents_kinds
from wandistiller.wan.vae_files import harmless_reason, vae_architecture, vae_tensors

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

MAX_STATISTICS_ERROR = 1e-3  # published figures have four decimals
# Mean and standard deviation of the released VAEs' latents by their number of channels, copied from diffusers
# (autoencoder_kl_wan.py for Wan2.1, scripts/convert_wan_to_diffusers.py for Wan2.2).
# fmt: off
RELEASED_LATENTS = {
    16: (
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
         3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    ),
    48: (
        [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
         0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
         -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
         -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667],
        [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
         0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
         0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
         0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744],
    ),
}
# fmt: on


@dataclass(frozen=True)
class VaeLocation:
    """Where a VAE lies: a folder or hub id, and the subfolder of it that holds the VAE, if any; or one file of weights."""

    location: str
    subfolder: str | None

    def __str__(self) -> str:
        return f"{self.location}/{self.subfolder}" if self.subfolder else self.location

    @property
    def is_local(self) -> bool:
        return Path(self.location).exists()

    def folder(self, pattern: str = "*") -> Path:
        """Return the VAE's folder, or its file, on this disk; of one on the hub the files that match `pattern` are fetched."""
        folder = Path(self.location)
        if not self.is_local:
            folder = fetch(self.location, [f"vae/{pattern}"], "a local folder with vae/, as --vae_path")
        return folder / self.subfolder if self.subfolder else folder

    def config_path(self) -> Path:
        """Return what tells of the VAE's latents: its config.json (of one on the hub without its weights), or the one file."""
        folder = self.folder("config.json")
        return folder if folder.is_file() else folder / "config.json"


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


def find_vae(vae_path: str | None, teacher_path: str, num_channels: int | None = None) -> VaeLocation:
    """Find the VAE by `--vae_path`, or else the teacher's own beside it.

    Args:
        num_channels: latent channels, by which one of several files in ComfyUI's vae/ is chosen.
    """
    advice = (
        "give --vae_path a diffusers AutoencoderKLWan folder, such as the vae/ folder of Wan-AI/Wan2.1-T2V-1.3B-Diffusers "
        "(Wan2.1 and A14B) or of Wan-AI/Wan2.2-TI2V-5B-Diffusers, or a file such as wan_2.1_vae.safetensors"
    )
    location = vae_path or teacher_path
    folder = local_path(location)
    if (folder / "vae" / "config.json").is_file():
        return VaeLocation(str(folder), "vae")
    if vae_path and (folder / "config.json").is_file():
        return VaeLocation(str(folder), None)
    if not folder.exists() and is_hub_id(location):
        return VaeLocation(location, "vae")
    files = _files_of(folder, is_vae=vae_path is not None)
    fitting = [path for path in files if num_channels in (None, _channels_of(path))] if len(files) > 1 else files
    if len(fitting) == 1:
        return VaeLocation(str(fitting[0]), None)
    if len(fitting) > 1:
        names = " and ".join(str(path) for path in fitting[:2])
        raise UserError(f"{location}: holds several VAEs, {names}; give --vae_path one of them")
    if vae_path:
        raise UserError(f"--vae_path {vae_path}: holds no VAE (no config.json there or in vae/); {advice}")
    reason = " beside it (no vae/config.json)" if folder.exists() else ": there is no such folder"
    raise UserError(f"the teacher {teacher_path} has no VAE{'' if teacher_path == 'mock' else reason}; {advice}")


def _files_of(place: Path, is_vae: bool) -> list[Path]:
    """Return the files that may be the VAE: the given one, a checkpoint that holds one, or by their names those in a folder."""
    if place.is_file():
        if place.suffix in SUFFIXES and (is_vae or any(map(_is_of_vae, stored_tensors(place)))):
            return [place]
        place = parts_folder(place)
    found = {path for folder in (place, place / "vae") for path in folder.glob("*") if path.suffix in SUFFIXES}
    return sorted(path for path in found if re.search(r"wan.*vae", path.name, re.IGNORECASE))


def _is_of_vae(name: str) -> bool:
    return re.search(r"(^|\.)decoder\.conv(1|_in)\.weight$", name) is not None


def _channels_of(path: Path) -> int:
    return _architecture_of([path], path)["z_dim"]


def _architecture_of(files: list[Path], where: Path) -> dict:
    return vae_architecture({name: stored.shape for name, stored in vae_tensors(files, where).items()}, where)


def read_vae_config(path: Path, num_channels: int) -> VaeConfig:
    """Read what a VAE tells of its latents: its config.json, or the header of its one file, which has the released VAEs' statistics.

    Raises:
        TeacherFileError: it contradicts itself, or is not that of a VAE with latents of `num_channels`.
    """
    values = _architecture_of([path], path) if path.suffix in SUFFIXES else read_json(path)
    if (name := values.get("_class_name")) not in (None, "AutoencoderKLWan"):
        raise TeacherFileError(f"{path}: is that of {reprlib.repr(name)}; a Wan's VAE is an AutoencoderKLWan")
    z_dim = setting(values, "z_dim", WHOLE, path)
    if z_dim not in (None, num_channels):
        raise TeacherFileError(f"{path}: z_dim is {z_dim}; the teacher's latents have {num_channels} channels")
    mean, std = (setting(values, name, kind, path) for name, kind in latents_kinds(num_channels).items())
    if path.suffix in SUFFIXES:
        values["patch_size"] = _patch_size(values["in_channels"], path)
        mean, std = RELEASED_LATENTS.get(num_channels, (None, None))
    return VaeConfig(_read_scale_factor(values, path), mean, std)


def _patch_size(in_channels: int, where: Path) -> int:
    """Return the side p of the patches that the pixels' 3 channels are folded from: 3 p^2 channels."""
    side = math.isqrt(in_channels // 3)
    if 3 * side**2 != in_channels or not side:
        raise TeacherFileError(f"{where}: takes {in_channels} channels, which are no pixels of 3 in square patches")
    return side


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


def load_vae(
    location: VaeLocation, num_channels: int, vae_scale_factor: int, device: str = "cpu"
) -> "AutoencoderKLWan":
    """Load the AutoencoderKLWan in float32 around the tensors of its files, checked to be the one that these latents belong to.

    Raises:
        UserError: it cannot be loaded, or has other channels or another scale factor.
    """
    place = location.folder()
    files = [place] if place.is_file() else weight_files(place)
    found = vae_tensors(files, place)
    told = vae_architecture({name: stored.shape for name, stored in found.items()}, place)
    about = read_vae_config(location.config_path(), told["z_dim"])
    if place.is_dir():
        _check_agrees(read_json(place / "config.json"), told, place / "config.json")
    patch_size = _patch_size(told["in_channels"], place)
    factor = _scale_factor(len(told["dim_mult"]), patch_size)
    if (told["z_dim"], factor) != (num_channels, vae_scale_factor):
        raise UserError(
            f"{location}: is a VAE of {told['z_dim']} channels and factor {factor}; the student's latents have "
            f"{num_channels} channels and factor {vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    statistics = {"latents_mean": about.latents_mean, "latents_std": about.latents_std}
    settings = told | {name: value for name, value in statistics.items() if value} | {"scale_factor_spatial": factor}
    vae: Any = _unfilled_vae(settings | {"patch_size": patch_size if patch_size > 1 else None})
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    weights, _ = admit(found, expected, place, what="Wan VAE", harmless=harmless_reason)
    vae.load_state_dict({name: weight.read().float() for name, weight in weights.items()}, assign=True)
    return vae.to(device).eval()


def _check_agrees(values: dict, told: dict, where: Path) -> None:
    """Hold a config.json against what the tensors tell, before anything is built."""
    for key, value in (told | {"attn_scales": []}).items():
        if (given := values.get(key)) not in (None, value):
            raise TeacherFileError(f"{where}: {key} is {reprlib.repr(given)}, the tensors beside it have {value}")


def _unfilled_vae(settings: dict) -> "AutoencoderKLWan":
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        return AutoencoderKLWan(**settings)


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
