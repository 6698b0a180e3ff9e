"""A Wan's VAE: where it lies, what it says of its latents, and diffusers' AutoencoderKLWan of it (in 2D: vae_2d.py).

It may be a folder as diffusers writes it, or one file with diffusers' or the original release's names, also inside a whole
checkpoint. diffusers' own converter (loaders/single_file_utils.py) knows the names of Wan2.1's VAE alone and takes its config for all,
so names and sizes are told by the tensors here. diffusers is imported where the VAE is loaded.
"""

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wandistiller.errors import UserError
from wandistiller.files.hub import place_of
from wandistiller.files.json_files import STAGES, WHOLE, read_json, setting
from wandistiller.files.weights import Stored, admit, all_tensors, is_weight_file, weight_files
from wandistiller.wan.names import other_part, own_names, part_files, renamed
from wandistiller.wan.record_kinds import latents_kinds

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


_HUB_FILES = ["vae/*.json", "vae/*.safetensors", "Wan2.?_VAE.*"]
ANCHOR = r"decoder\.conv(?:1|_in)\.weight"  # a tensor that it has once, by its original and by diffusers' name
# The original names (Wan2.1:wan/modules/vae.py, Wan2.2:wan/modules/vae2_2.py) become diffusers', one rule after another.
_RENAMES: list[tuple[str, Any]] = [
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
    # Wan2.2 has a list for each stage: its residual blocks, and then what halves or doubles the sides.
    (r"downsamples\.(\d+)\.downsamples\.2\.", r"down_blocks.\1.downsampler."),
    (r"downsamples\.(\d+)\.downsamples\.", r"down_blocks.\1.resnets."),
    (r"upsamples\.(\d+)\.upsamples\.3\.", r"up_blocks.\1.upsampler."),
    (r"upsamples\.(\d+)\.upsamples\.", r"up_blocks.\1.resnets."),
    # Wan2.1 has one list for all, whose stages of the decoder are three residual blocks and an upsampler.
    (r"downsamples\.", "down_blocks."),
    (r"upsamples\.(\d+)\.", lambda match: "up_blocks.{}.{}.".format(*_of_stage(int(match[1])))),
]


def _of_stage(number: int) -> tuple[int, str]:
    stage, place = divmod(number, 4)
    return stage, "upsamplers.0" if place == 3 else f"resnets.{place}"


def find_vae(vae_path: str | None, teacher_path: str, num_channels: int | None = None) -> Path:
    """Return the folder or the file of the VAE that `--vae_path` names, or of the teacher's own; one on the hub is fetched.

    Args:
        num_channels: latent channels, by which one of several files in ComfyUI's vae/ is chosen.
    """
    advice = (
        "give --vae_path the vae/ folder of a pipeline, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers (also for A14B) or "
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers, or a file such as wan_2.1_vae.safetensors"
    )
    location = vae_path or teacher_path
    folder = place_of(location, _HUB_FILES, "a local folder with vae/, as --vae_path")
    if (folder / "vae" / "config.json").is_file():
        return folder / "vae"
    if vae_path and (folder / "config.json").is_file():
        return folder
    if vae_path and folder.is_file():
        files = [folder] if is_weight_file(folder) else []
    else:
        files = part_files(folder, ANCHOR, "wan.*vae", ("vae",))
    if len(files) > 1 and num_channels:
        files = [path for path in files if _read_structure(vae_tensors(path), path)["z_dim"] == num_channels]
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{location}: holds several VAEs, {files[0]} and {files[1]}; give --vae_path one of them")
    who = "--vae_path" if vae_path else "the teacher"
    raise UserError(f"{who} {location}: has no VAE, no vae/config.json and no file of one beside it; {advice}")


def vae_tensors(place: Path) -> dict[str, Stored]:
    """Return the tensors of a folder or file by diffusers' names; those of other parts in a whole checkpoint keep their own."""
    files = [place] if place.is_file() else weight_files(place)
    return own_names(ANCHOR, partial(renamed, rules=_RENAMES), all_tensors(files), place)


def count_vae_parameters(teacher_path: str, num_channels: int) -> int:
    """Count the parameters of the VAE beside a teacher by its headers; 0 where there is none."""
    try:
        found = vae_tensors(find_vae(None, teacher_path, num_channels))
    except UserError:
        return 0
    own = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # of a whole checkpoint the VAE alone
    return sum(math.prod(stored.shape) for name, stored in found.items() if name.startswith(own))


def _read_structure(found: Mapping[str, Stored], where: object) -> dict:
    """Return the arguments of diffusers' AutoencoderKLWan that the tensors tell.

    Raises:
        UserError: they are none of a Wan's VAE.
    """
    shapes = {name: stored.shape for name, stored in found.items()}
    try:
        base_dim, in_channels = shapes["encoder.conv_in.weight"][:2]
        decoder_base_dim = shapes["decoder.conv_in.weight"][0] * base_dim // shapes["encoder.conv_out.weight"][1]
        num_stages = len({match[1] for name in shapes if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))})
        stages = [f"decoder.up_blocks.{number}." for number in reversed(range(num_stages))]
        patch_size = math.isqrt(in_channels // 3)  # the pixels' 3 channels are folded from patches of this side
        if 3 * patch_size**2 != in_channels:
            raise ValueError
        in_last = re.compile(r"decoder\.up_blocks\.0\.resnets\.\d+\.conv1\.weight")
        return {
            "base_dim": base_dim,
            "decoder_base_dim": decoder_base_dim,
            "z_dim": shapes["post_quant_conv.weight"][0],
            "dim_mult": [shapes[f"{stage}resnets.0.conv1.weight"][0] // decoder_base_dim for stage in stages],
            "num_res_blocks": sum(map(bool, map(in_last.match, shapes))) - 1,
            "temperal_downsample": [
                any(name.startswith(stage) and ".time_conv." in name for name in shapes) for stage in stages[1:]
            ],
            "is_residual": "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes,
            "in_channels": in_channels,
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "patch_size": patch_size,
            "scale_factor_spatial": 2 ** (num_stages - 1) * patch_size,  # every stage but the last halves the side
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise UserError(
            f"{where}: holds no VAE of a Wan (encoder, decoder and their convolutions were looked for)"
        ) from None


def read_vae_config(place: Path, num_channels: int) -> dict[str, Any]:
    """Read what a VAE says of its latents: in its folder's config.json, or by its one file, which has the released statistics.

    Returns:
        "vae_scale_factor" (pixels per latent pixel), "latents_mean" and "latents_std" (per channel), without what it leaves out.

    Raises:
        UserError: it contradicts itself, or is not that of a VAE with latents of `num_channels`.
    """
    path = place if place.is_file() else place / "config.json"
    values = _read_structure(vae_tensors(path), path) if place.is_file() else read_json(path)
    if (name := values.get("_class_name")) not in (None, "AutoencoderKLWan"):
        raise UserError(f"{path}: is that of {reprlib.repr(name)}; a Wan's VAE is an AutoencoderKLWan")
    z_dim = setting(values, "z_dim", WHOLE, path)
    if z_dim not in (None, num_channels):
        raise UserError(f"{path}: z_dim is {z_dim}; the teacher's latents have {num_channels} channels")
    mean, std = (setting(values, name, kind, path) for name, kind in latents_kinds(num_channels).items())
    if place.is_file():
        mean, std = RELEASED_LATENTS.get(num_channels, (None, None))
    factor = setting(values, "scale_factor_spatial", WHOLE, path)
    if stages := setting(values, "dim_mult", STAGES, path):
        factor = 2 ** (len(stages) - 1) * (setting(values, "patch_size", WHOLE, path) or 1)
    told = {"vae_scale_factor": factor, "latents_mean": mean, "latents_std": std}
    return {name: value for name, value in told.items() if value is not None}


def check_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, vae: Mapping[str, Any], where: Path
) -> None:
    """Refuse a VAE of other latents than these statistics, by its config: WanPipeline takes mean and std from there."""
    for name, ours in (("latents_mean", mean), ("latents_std", std)):
        theirs = vae.get(name)
        if ours and theirs and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > MAX_STATISTICS_ERROR:
            raise UserError(
                f"{where}: has other {name} than the latents this student learnt; give --vae_path its teacher's own VAE"
            )


def load_vae(place: Path, num_channels: int, vae_scale_factor: int) -> Any:
    """Load the AutoencoderKLWan in float32 around the tensors of its files, checked to be the one that these latents belong to.

    Raises:
        UserError: it cannot be loaded, or has other channels or another scale factor.
    """
    from diffusers import AutoencoderKLWan

    found = vae_tensors(place)
    structure = _read_structure(found, place)
    config = place / "config.json"
    values = read_json(config) if place.is_dir() else {}
    for key, value in (structure | {"attn_scales": []}).items():
        if (given := values.get(key)) not in (None, value):
            raise UserError(f"{config}: {key} is {reprlib.repr(given)}, the tensors beside it have {value}")
    about = read_vae_config(place, structure["z_dim"])
    about.pop("vae_scale_factor", None)
    factor = structure["scale_factor_spatial"]
    if (structure["z_dim"], factor) != (num_channels, vae_scale_factor):
        raise UserError(
            f"{place}: is a VAE of {structure['z_dim']} channels and factor {factor}; the student's latents have "
            f"{num_channels} channels and factor {vae_scale_factor}; give --vae_path the teacher's own VAE"
        )
    if structure["patch_size"] == 1:
        structure["patch_size"] = None  # as diffusers has it
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(**structure | about)
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    weights, _ = admit(found, expected, place, what="Wan VAE", harmless=partial(other_part, own="VAE"))
    vae.load_state_dict({name: weight.read().float() for name, weight in weights.items()}, assign=True)
    return vae.eval()
