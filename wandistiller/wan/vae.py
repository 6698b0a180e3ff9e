"""What the config.json of an AutoencoderKLWan says of its latents."""

import reprlib
from dataclasses import dataclass
from pathlib import Path

from wandistiller.files.checked_json import POSITIVE, STAGES, WHOLE, CheckpointError, numbers, read_json, setting
from wandistiller.files.hub import fetch


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
        CheckpointError: it contradicts itself, or is not that of a VAE with latents of `num_channels`.
    """
    values = read_json(path)
    if (name := values.get("_class_name")) not in (None, "AutoencoderKLWan"):
        raise CheckpointError(f"{path}: is that of {reprlib.repr(name)}; a Wan's VAE is an AutoencoderKLWan")
    z_dim = setting(values, "z_dim", WHOLE, path)
    if z_dim not in (None, num_channels):
        raise CheckpointError(f"{path}: z_dim is {z_dim}; the teacher's latents have {num_channels} channels")
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
        raise CheckpointError(
            f"{path}: scale_factor_spatial is {recorded}, but its {len(stages)} stages (dim_mult) and patches of "
            f"{patch_size} make it {factor}"
        )
    return factor
