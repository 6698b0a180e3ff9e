"""What ComfyUI makes of a student's file: which of it is read, what is taken as given, and with which settings it draws.

Held against Comfy-Org/ComfyUI 0.3.64 and 0.33.0: comfy/model_detection.py (detect_unet_config), sd.py (load_diffusion_model),
supported_models.py (WAN21_T2V, WAN22_T2V), ldm/wan/model.py (WanModel), text_encoders/wan.py, latent_formats.py (Wan21, Wan22).
What no tensor tells is still taken as given by 0.8.0; from 0.19.3 on the metadata of the file say it (both, and 0.38, only read).
"""

import json

from wandistiller.model.config import StudentConfig
from wandistiller.sampling.recorded import StudentRecord
from wandistiller.wan.settings import RELEASED_LATENTS

HEAD_DIM = 128
READS_METADATA = "0.19"  # 0.8.0 does not, 0.19.3 does; those between were not looked at
# What is taken as given where no tensor is asked, by key of a student's config, and what another would do: in the model of
# versions that read no metadata, and in what every version has around it (its text encoder).
_GIVEN_BY_OLDER = {"patch_size": (2, "not load"), "freq_dim": (256, "not load"), "eps": (1e-6, "draw otherwise")}
_GIVEN = {
    "text_encoder_output_dim": (4096, "find no text encoder for it"),
    "text_max_length": (512, "draw otherwise"),
}
_MAX_STATISTICS_ERROR = 1e-3  # published figures have four decimals


def comfyui_metadata(config: StudentConfig) -> dict[str, str]:
    """What a file's metadata tells of the shape that no tensor does: arguments of ComfyUI's WanModel."""
    patch = config.patch_size
    settings = {
        "num_heads": config.num_heads,
        "text_dim": config.text_encoder_output_dim,
        "freq_dim": config.freq_dim,
        "eps": config.eps,
        "patch_size": [1, patch, patch],
        "out_dim": config.num_channels,  # else counted from the head, for patches of 2
    }
    return {"config": json.dumps({"transformer": settings})}


def comfyui_warnings(config: StudentConfig, *, reads_metadata: bool = False) -> list[str]:
    """Why ComfyUI would refuse a wan student or draw it wrongly, a sentence each; empty where it draws it right.

    It recognises a Wan by head.modulation, and reads width, FFN, depth and channels from the tensors. The number of heads
    is not in any: where the metadata is not read, it is taken to be the width // 128.

    Args:
        reads_metadata: of versions that read `comfyui_metadata` alone; else of the older ones too.
    """
    warnings = [] if reads_metadata else _warnings_of_older(config)
    for name, (given, outcome) in _GIVEN.items():
        if (value := getattr(config, name)) != given:
            warnings.append(f"ComfyUI takes {name} {given:g} as given, this student has {value:g}: it would {outcome}")
    if config.num_channels not in RELEASED_LATENTS:
        warnings.append(f"ComfyUI knows Wan latents of 16 or 48 channels, this student's have {config.num_channels}")
    elif not _has_released_latents(config):
        warnings.append("ComfyUI normalises latents as the released VAE's, this student learnt others")
    return warnings


def _warnings_of_older(config: StudentConfig) -> list[str]:
    heads, older, warnings = config.hidden_size // HEAD_DIM, f"ComfyUI older than {READS_METADATA}", []
    if config.num_heads != heads:
        warnings.append(
            f"{older} takes hidden_size // {HEAD_DIM} = {heads} for the number of heads, this student has "
            f"{config.num_heads} (of {config.head_dim} channels): it would {'draw wrongly' if heads else 'not load'}"
        )
    for name, (given, outcome) in _GIVEN_BY_OLDER.items():
        if (value := getattr(config, name)) != given:
            warnings.append(f"{older} takes {name} {given:g} as given, this student has {value:g}: it would {outcome}")
    return warnings


def _has_released_latents(config: StudentConfig) -> bool:
    """Whether mean and std of the student's latents, where it records them, are those of the released VAE."""
    record, (mean, std) = StudentRecord.of(config), RELEASED_LATENTS[config.num_channels]
    for values, released in ((record.latents_mean or mean, mean), (record.latents_std or std, std)):
        if any(abs(value - given) > _MAX_STATISTICS_ERROR for value, given in zip(values, released, strict=True)):
            return False
    return True


def comfyui_settings(config: StudentConfig) -> str:
    """The nodes and values that draw as the student was taught; ComfyUI's own shift for Wan is 8.

    Of its schedulers "simple" has the noise levels of `sampling.wan_scheduler` (within 0.008), "normal" and "beta" have others.
    """
    record = StudentRecord.of(config)
    steps = f"steps {record.steps}, " if record.steps else ""
    sampler = f"KSampler with {steps}cfg 1, {'euler' if record.sampler == 'euler' else 'uni_pc'}, simple"
    shift = f"ModelSamplingSD3 with shift {record.shift:g}, " if record.shift is not None else ""
    latent = "Wan22ImageToVideoLatent" if config.num_channels == 48 else "EmptyHunyuanLatentVideo"
    return f"Load Diffusion Model, {shift}{sampler}; {latent} of length 1; Load CLIP of type wan"
