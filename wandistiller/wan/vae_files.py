"""The tensors of a Wan's VAE in any layout: diffusers' names, the original release's, and the architecture that they tell.

diffusers' own converter (loaders/single_file_utils.py) knows the original names of Wan2.1's VAE alone and takes its config for all;
here both are renamed by what the tensors are, and every size is read off them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from wandistiller.files.checked_json import TeacherFileError
from wandistiller.files.weights import Stored, all_tensors
from wandistiller.wan.names import TEXT_ENCODER_PREFIXES, TRANSFORMER_PREFIXES, with_prefix_of, without_wrappers

Shapes = Mapping[str, tuple[int, ...]]
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_OUTSIDE = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    **{f"{side}.head.0": f"{side}.norm_out" for side in ("encoder", "decoder")},
    **{f"{side}.head.2": f"{side}.conv_out" for side in ("encoder", "decoder")},
}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}


def vae_tensors(files: list[Path], where: object) -> dict[str, Stored]:
    """Return a VAE's tensors by diffusers' names; those of other parts in an all-in-one checkpoint keep their own."""
    found = all_tensors(files)
    bare = {without_wrappers(name): stored for name, stored in found.items()}
    bare = with_prefix_of(r"decoder\.conv(1|_in)\.weight", bare, where)
    if "decoder.conv1.weight" in bare:
        bare = _renamed(bare)
    return bare


def _renamed(found: dict[str, Stored]) -> dict[str, Stored]:
    resamplers = {name.partition(mark)[0] for name in found for mark in (".resample.", ".time_conv.") if mark in name}
    return {_to_diffusers(name, resamplers): stored for name, stored in found.items()}


def _to_diffusers(name: str, resamplers: set[str]) -> str:
    """Return diffusers' name of an original one.

    Args:
        resamplers: original names of the modules that halve or double the sides.
    """
    for stem, other in _OUTSIDE.items():
        if name.startswith(f"{stem}."):
            return other + name.removeprefix(stem)
    if match := re.match(r"(encoder|decoder)\.middle\.([012])\.", name):
        return _residual(f"{match[1]}.{_MIDDLE[match[2]]}.", name[match.end() :])
    # Wan2.1 has all modules in one list, Wan2.2 a list of its own for each stage:
    match = re.match(r"((encoder|decoder)\.(?:down|up)samples\.(\d+))(?:\.(?:down|up)samples\.(\d+))?\.", name)
    if match is None:
        return name
    module, inside = match[0][:-1], name[match.end() :]
    number = int(match[3])
    blocks = f"{match[2]}.{'down' if match[2] == 'encoder' else 'up'}_blocks"
    if match[4] is not None:
        resampler = "downsampler" if match[2] == "encoder" else "upsampler"
        own = resampler if module in resamplers else f"resnets.{match[4]}"
        return _residual(f"{blocks}.{number}.{own}.", inside)
    if match[2] == "encoder":
        return _residual(f"{blocks}.{number}.", inside)
    ends = [other for other in range(number) if f"decoder.upsamples.{other}" in resamplers]
    own = "upsamplers.0" if module in resamplers else f"resnets.{number - (ends[-1] + 1 if ends else 0)}"
    return _residual(f"{blocks}.{len(ends)}.{own}.", inside)


def _residual(place: str, inside: str) -> str:
    stem, _, end = inside.rpartition(".")
    return f"{place}{_RESIDUAL.get(stem, stem)}.{end}"


def vae_architecture(shapes: Shapes, where: object) -> dict:
    """Return the arguments of diffusers' AutoencoderKLWan that the tensors tell, by diffusers' names.

    Raises:
        TeacherFileError: they are none of a Wan's VAE.
    """
    try:
        base_dim, in_channels = shapes["encoder.conv_in.weight"][:2]
        stages = _encoder_stages(shapes)
        dims, num_blocks, is_temporal = zip(*stages, strict=True)
        dim_mult = [dim // base_dim for dim in dims]
        decoder_dim = shapes["decoder.conv_in.weight"][0]
        return {
            "base_dim": base_dim,
            "decoder_base_dim": decoder_dim // dim_mult[-1],
            "z_dim": shapes["post_quant_conv.weight"][0],
            "dim_mult": dim_mult,
            "num_res_blocks": num_blocks[0],
            "temperal_downsample": list(is_temporal[:-1]),
            "is_residual": _is_residual(shapes),
            "in_channels": in_channels,
            "out_channels": shapes["decoder.conv_out.weight"][0],
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        raise TeacherFileError(
            f"{where}: holds no VAE of a Wan (encoder, decoder and their convolutions were looked for)"
        ) from None


def _is_residual(shapes: Shapes) -> bool:
    return "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes


def _encoder_stages(shapes: Shapes) -> list[tuple[int, int, bool]]:
    """Return (channels, residual blocks, whether frames are halved after it) of each stage of the encoder."""
    counted = (re.match(r"encoder\.down_blocks\.(\d+)\.", name) for name in shapes)
    numbers = range(len({match[1] for match in counted if match}))
    if _is_residual(shapes):
        return [_residual_stage(shapes, f"encoder.down_blocks.{number}.") for number in numbers]
    stages, channels, blocks = [], 0, 0
    for place in (f"encoder.down_blocks.{number}." for number in numbers):
        if f"{place}resample.1.weight" in shapes:
            stages.append((channels, blocks, f"{place}time_conv.weight" in shapes))
            blocks = 0
        else:
            channels, blocks = shapes[f"{place}conv1.weight"][0], blocks + 1
    return [*stages, (channels, blocks, False)]


def _residual_stage(shapes: Shapes, place: str) -> tuple[int, int, bool]:
    blocks = sum(name.startswith(f"{place}resnets.") and name.endswith("conv1.weight") for name in shapes)
    return shapes[f"{place}resnets.0.conv1.weight"][0], blocks, f"{place}downsampler.time_conv.weight" in shapes


def harmless_reason(name: str) -> str | None:
    """Return why a tensor in a VAE's file does no harm though it is none of the VAE's; None where it is a stranger."""
    if name.startswith((*TEXT_ENCODER_PREFIXES, *TRANSFORMER_PREFIXES)):
        return "of the transformer or text encoder in the same file"
    return None
