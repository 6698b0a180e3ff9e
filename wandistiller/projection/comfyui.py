"""A student's file in ComfyUI: the metadata that it reads, its fixed values, and the settings and workflow to draw with.

This was compared with Comfy-Org/ComfyUI 0.3.64, 0.8.0 and 0.33.0, which also ran (docs/export.md):
comfy/model_detection.py (detect_unet_config), sd.py (load_diffusion_model), supported_models.py (WAN21_T2V, WAN22_T2V),
ldm/wan/model.py (WanModel), text_encoders/wan.py and latent_formats.py (Wan21, Wan22). Version 0.8.0 still takes as given what no
tensor tells, and from 0.19.3 on the metadata of the file tell it; the code of 0.19.3 and of 0.38 was read, not run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandistiller.model.config import StudentConfig
from wandistiller.students.record import StudentRecord, trained_sizes
from wandistiller.wan.vae import MAX_STATISTICS_ERROR, RELEASED_LATENTS

READS_METADATA = "0.19"  # 0.8.0 does not read it and 0.19.3 does; the versions between were not looked at
# What no tensor tells: the value that ComfyUI takes where it reads no metadata
_GIVEN = {"head_dim": 128, "patch_size": 2, "freq_dim": 256, "eps": 1e-6}
# The node that makes empty latents, by their channels, and the one that reads an exported file, by its format.
LATENTS = {16: "EmptyHunyuanLatentVideo", 48: "Wan22ImageToVideoLatent"}
LOADERS = {"original": "Load Diffusion Model", "gguf": "Unet Loader (GGUF)"}
# Wan's own steps and shift at small sizes, for a student whose record names none
STEPS, SHIFT = 50, 5.0


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


def needs_metadata(config: StudentConfig) -> list[str]:
    """Return what ComfyUI gets wrong of a student without its metadata, such as "eps 1e-05 (not 1e-06)"."""
    return [
        f"{name} {getattr(config, name):g} (not {given:g})"
        for name, given in _GIVEN.items()
        if getattr(config, name) != given
    ]


def comfyui_warnings(config: StudentConfig) -> list[str]:
    """Return why ComfyUI would not draw a wan student or draw it wrongly, a sentence each; empty where it draws it right."""
    warnings = []
    if lost := needs_metadata(config):
        warnings.append(
            f"ComfyUI older than {READS_METADATA} draws this student wrongly or not at all: it has {', '.join(lost)}"
        )
    if (record := StudentRecord.of(config)).sampler == "renoise":
        levels = ", ".join(f"{level / 1000:g}" for level in record.teacher_levels or ())
        warnings.append(f"ComfyUI's KSampler has other noise levels: give SamplerCustom, lcm, the sigmas {levels}, 0")
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


def comfyui_settings(config: StudentConfig, loader: str = LOADERS["original"]) -> str:
    """Return the nodes and values that draw as the student was taught; without the shift ComfyUI would take 8.

    Its scheduler "simple" has the noise levels of a student of few steps where 1000 is a multiple of these (within 0.001 of other
    numbers), and those of UniPC within 0.008; "normal" and "beta" have others.
    """
    record = StudentRecord.of(config)
    steps = f"steps {record.steps}, " if record.steps else ""
    sampler = f"KSampler with {steps}cfg 1, {comfyui_sampler(config)}, simple"
    shift = f"ModelSamplingSD3 with shift {record.shift:g}, " if record.shift is not None else ""
    return f"{loader}, {shift}{sampler}; {LATENTS.get(config.num_channels, LATENTS[16])} of length 1; Load CLIP of type wan"


def comfyui_workflow(config: StudentConfig, file: str, prompt: str) -> dict[str, Any]:
    """Return a workflow that draws with a student of 16 or 48 channels, as ComfyUI's editor saves and opens one.

    cfg 1 asks for no negative prompt, so that the positive one stands in its place.

    Args:
        file: name of the student's file in `models/diffusion_models`.
    """
    template = Path(__file__).with_name(f"comfyui_workflow_{config.num_channels}.json")
    workflow = json.loads(template.read_text(encoding="utf-8"))
    widgets = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    record, size = StudentRecord.of(config), trained_sizes(config)[0]
    widgets["UNETLoader"][0] = file
    widgets["ModelSamplingSD3"][0] = SHIFT if record.shift is None else record.shift
    widgets["CLIPTextEncode"][0] = prompt
    widgets[LATENTS[config.num_channels]][:2] = size.width, size.height
    widgets["KSampler"][2] = record.steps or STEPS
    widgets["KSampler"][4] = comfyui_sampler(config)
    return workflow
