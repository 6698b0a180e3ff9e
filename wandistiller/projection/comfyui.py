"""A student's file in ComfyUI: the metadata that it reads, its fixed values, and the settings to draw with.

This was compared with Comfy-Org/ComfyUI 0.3.64, 0.8.0 and 0.33.0, which also ran (docs/export.md):
comfy/model_detection.py (detect_unet_config), sd.py (load_diffusion_model), supported_models.py (WAN21_T2V, WAN22_T2V),
ldm/wan/model.py (WanModel), text_encoders/wan.py and latent_formats.py (Wan21, Wan22). Version 0.8.0 still takes as given what no
tensor tells, and from 0.19.3 on the metadata of the file tell it; the code of 0.19.3 and of 0.38 was read, not run.
"""

import json
from collections.abc import Iterator

from wandistiller.model.config import StudentConfig
from wandistiller.students.record import StudentRecord
from wandistiller.wan.vae import MAX_STATISTICS_ERROR, RELEASED_LATENTS

READS_METADATA = "0.19"  # 0.8.0 does not read it and 0.19.3 does; the versions between were not looked at
# What no tensor tells: the value that ComfyUI takes where it reads no metadata
_GIVEN = {"head_dim": 128, "patch_size": 2, "freq_dim": 256, "eps": 1e-6}
# The node that makes empty latents, by their channels
LATENTS = {16: "EmptyHunyuanLatentVideo", 48: "Wan22ImageToVideoLatent"}


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


def comfyui_warnings(config: StudentConfig) -> list[str]:
    """Return why ComfyUI would not draw a wan student or draw it wrongly, a sentence each; empty where it draws it right."""
    lost = [
        f"{name} {getattr(config, name):g} (not {given:g})"
        for name, given in _GIVEN.items()
        if getattr(config, name) != given
    ]
    warnings = []
    if lost:
        warnings.append(
            f"ComfyUI older than {READS_METADATA} draws this student wrongly or not at all: it has {', '.join(lost)}"
        )
    if (width := config.text_encoder_output_dim) != 4096:
        warnings.append(f"ComfyUI has no text encoder of width {width} for this student, only Wan's of 4096")
    if (slots := config.text_max_length) != 512:
        warnings.append(f"ComfyUI draws otherwise: it pads prompts to 512 tokens, and this student learnt {slots}")
    if config.num_channels not in RELEASED_LATENTS:
        warnings.append(f"ComfyUI knows Wan latents of 16 or 48 channels, this student's have {config.num_channels}")
    elif any(abs(ours - own) > MAX_STATISTICS_ERROR for ours, own in _learnt_and_released(config)):
        warnings.append("ComfyUI normalises latents as the released VAE's, this student learnt others")
    return warnings


def _learnt_and_released(config: StudentConfig) -> Iterator[tuple[float, float]]:
    """Yield each mean and std of the student's latents beside that of the released VAE."""
    record, (mean, std) = StudentRecord.of(config), RELEASED_LATENTS[config.num_channels]
    yield from zip(record.latents_mean or mean, mean, strict=True)
    yield from zip(record.latents_std or std, std, strict=True)


def comfyui_sampler(config: StudentConfig) -> str:
    """Return ComfyUI's sampler that comes nearest to how the student is sampled here.

    Euler's method is the same everywhere. ComfyUI's uni_pc is another algorithm than diffusers' UniPC, and dpmpp_2m draws nearer
    to it (docs/export.md).
    """
    return {"unipc": "dpmpp_2m", "renoise": "lcm"}.get(StudentRecord.of(config).sampler, "euler")


def comfyui_settings(config: StudentConfig) -> str:
    """Return the nodes and values that draw as the student was taught; without the shift ComfyUI would take 8.

    Its scheduler "simple" has the noise levels of a student of few steps where 1000 is a multiple of these (within 0.001 of other
    numbers), and those of UniPC within 0.008; "normal" and "beta" have others.
    """
    record = StudentRecord.of(config)
    steps = f"steps {record.steps}, " if record.steps else ""
    sampler = f"KSampler with {steps}cfg 1, {comfyui_sampler(config)}, simple"
    shift = f"ModelSamplingSD3 with shift {record.shift:g}, " if record.shift is not None else ""
    return f"Load Diffusion Model, {shift}{sampler}; {LATENTS.get(config.num_channels, LATENTS[16])} of length 1; Load CLIP of type wan"
