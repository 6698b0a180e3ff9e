"""A student's file in ComfyUI: the metadata that it reads, its fixed values, and the settings to draw with.

This was compared with Comfy-Org/ComfyUI 0.3.64, 0.8.0 and 0.33.0, which `tools/check_comfyui.py` also runs:
comfy/model_detection.py (detect_unet_config), sd.py (load_diffusion_model), supported_models.py (WAN21_T2V, WAN22_T2V),
ldm/wan/model.py (WanModel), text_encoders/wan.py and latent_formats.py (Wan21, Wan22). Version 0.8.0 still takes as given what no
tensor tells, and from 0.19.3 on the metadata of the file tell it; the code of 0.19.3 and of 0.38 was read, not run.
"""

import json
from collections.abc import Mapping

from wandistiller.model.config import StudentConfig
from wandistiller.students.record import StudentRecord
from wandistiller.wan.settings import RELEASED_LATENTS

HEAD_DIM = 128
READS_METADATA = "0.19"  # 0.8.0 does not read it and 0.19.3 does; the versions between were not looked at
# ComfyUI's fixed value for a key of a student's config, and what it does with a student of another value.
_GIVEN_BY_OLDER = {"patch_size": (2, "not load"), "freq_dim": (256, "not load"), "eps": (1e-6, "draw otherwise")}
_GIVEN = {  # outside the model, so that no metadata changes them
    "text_encoder_output_dim": (
        4096,
        f"find no text encoder for it, and versions older than {READS_METADATA} would not load the file (size mismatch for "
        "text_embedding.0.weight)",
    ),
    "text_max_length": (512, "draw otherwise"),
}
_MAX_STATISTICS_ERROR = 1e-3  # published figures have four decimals


def comfyui_metadata(config: StudentConfig) -> dict[str, str]:
    """Return metadata that tell what no tensor does: arguments of ComfyUI's WanModel."""
    patch = config.patch_size
    settings = {
        "num_heads": config.num_heads,
        "text_dim": config.text_encoder_output_dim,
        "freq_dim": config.freq_dim,
        "eps": config.eps,
        "patch_size": [1, patch, patch],
        "out_dim": config.num_channels,  # without it the channels are counted from the head, as if patches were of 2
    }
    return {"config": json.dumps({"transformer": settings})}


def comfyui_warnings(config: StudentConfig, *, reads_metadata: bool = False) -> list[str]:
    """Return why ComfyUI would refuse a wan student or draw it wrongly, a sentence each; empty where it draws it right.

    ComfyUI recognises a Wan by head.modulation, and reads width, FFN, depth and channels from the tensors. No tensor tells the
    number of heads: versions that do not read the metadata take it to be the width // 128.

    Args:
        reads_metadata: warn only of versions that read `comfyui_metadata`, and not of older ones.
    """
    warnings = [] if reads_metadata else _warnings_of_older(config)
    warnings += _warnings_of("ComfyUI", _GIVEN, config)
    if config.num_channels not in RELEASED_LATENTS:
        warnings.append(f"ComfyUI knows Wan latents of 16 or 48 channels, this student's have {config.num_channels}")
    elif not _has_released_latents(config):
        warnings.append("ComfyUI normalises latents as the released VAE's, this student learnt others")
    return warnings


def _warnings_of_older(config: StudentConfig) -> list[str]:
    """Return the warnings that hold for versions which read no metadata."""
    heads, older, warnings = config.hidden_size // HEAD_DIM, f"ComfyUI older than {READS_METADATA}", []
    if config.num_heads != heads:
        warnings.append(
            f"{older} takes hidden_size // {HEAD_DIM} = {heads} for the number of heads, this student has "
            f"{config.num_heads} (of {config.head_dim} channels): it would {'draw wrongly' if heads else 'not load'}"
        )
    return warnings + _warnings_of(older, _GIVEN_BY_OLDER, config)


def _warnings_of(who: str, given: Mapping[str, tuple[float, str]], config: StudentConfig) -> list[str]:
    return [
        f"{who} takes {name} {fixed:g} as given, this student has {getattr(config, name):g}: it would {outcome}"
        for name, (fixed, outcome) in given.items()
        if getattr(config, name) != fixed
    ]


def taken_as_given(config: StudentConfig) -> dict[str, tuple[float, float]]:
    """Return the settings that ComfyUI gets wrong without metadata: its own value of each, and the student's."""
    given = {"head_dim": HEAD_DIM, **{name: value for name, (value, _) in _GIVEN_BY_OLDER.items()}}
    return {name: (value, getattr(config, name)) for name, value in given.items() if getattr(config, name) != value}


def _has_released_latents(config: StudentConfig) -> bool:
    """Return whether the recorded mean and std of the student's latents are those of the released VAE."""
    record, (mean, std) = StudentRecord.of(config), RELEASED_LATENTS[config.num_channels]
    for values, released in ((record.latents_mean or mean, mean), (record.latents_std or std, std)):
        if any(abs(value - given) > _MAX_STATISTICS_ERROR for value, given in zip(values, released, strict=True)):
            return False
    return True


# The node that makes empty latents, by their channels, and the one that reads an exported file, by its format.
LATENTS = {16: "EmptyHunyuanLatentVideo", 48: "Wan22ImageToVideoLatent"}
LOADERS = {"original": "Load Diffusion Model", "gguf": "Unet Loader (GGUF)"}


def comfyui_sampler(config: StudentConfig) -> str:
    """Return ComfyUI's sampler that comes nearest to how the student is sampled here.

    Euler's method is the same everywhere. ComfyUI's uni_pc is another algorithm than diffusers' UniPC, and dpmpp_2m draws nearer
    to it (`python tools/check_comfyui.py`, docs/export.md).
    """
    return "dpmpp_2m" if StudentRecord.of(config).sampler == "unipc" else "euler"


def comfyui_settings(config: StudentConfig, loader: str = LOADERS["original"]) -> str:
    """Return the nodes and values that draw as the student was taught; without the shift ComfyUI would take 8.

    Its scheduler "simple" has the noise levels of `sampling.sampler.wan_scheduler` within 0.008; "normal" and "beta" have
    others.
    """
    record = StudentRecord.of(config)
    steps = f"steps {record.steps}, " if record.steps else ""
    sampler = f"KSampler with {steps}cfg 1, {comfyui_sampler(config)}, simple"
    shift = f"ModelSamplingSD3 with shift {record.shift:g}, " if record.shift is not None else ""
    return f"{loader}, {shift}{sampler}; {LATENTS.get(config.num_channels, LATENTS[16])} of length 1; Load CLIP of type wan"
