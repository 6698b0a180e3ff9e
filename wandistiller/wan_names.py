"""The names of Wan's tensors: original and ComfyUI spellings -> one canonical set (diffusers'), and what is no T2V Wan."""

import re

COMFYUI_PREFIX = "model.diffusion_model."

# Original -> diffusers (diffusers:scripts/convert_wan_to_diffusers.py). In a block the original's norm3 is diffusers' norm2.
_ORIGINAL_TO_CANONICAL = [
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"^(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"^(blocks\.\d+)\.self_attn\.", r"\1.attn1."),
    (r"^(blocks\.\d+)\.cross_attn\.", r"\1.attn2."),
    (r"^(blocks\.\d+\.attn[12])\.([qkv])\.", r"\1.to_\2."),
    (r"^(blocks\.\d+\.attn[12])\.o\.", r"\1.to_out.0."),
    (r"^(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"^(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
]
_ORIGINAL_TO_CANONICAL = [(re.compile(pattern), name) for pattern, name in _ORIGINAL_TO_CANONICAL]

# Tensors that only other members of the Wan family have, in either spelling.
_OTHER_KINDS = [
    (re.compile(r"vace_"), "a VACE (editing)"),
    (re.compile(r"face_adapter|face_encoder|motion_encoder|pose_patch_embedding"), "an Animate"),
    (re.compile(r"casual_audio_encoder|audio_injector|audio_proj"), "a speech-to-video (S2V)"),
    (re.compile(r"^control_adapter|^ref_conv"), "a Fun control"),
    (re.compile(r"^img_emb\.|image_embedder|\.k_img\.|\.add_k_proj\."), "an image-to-video (I2V)"),
]


def uses_original_names(names: list[str]) -> bool:
    """Original Wan is told by its head's modulation table; diffusers calls that `scale_shift_table`."""
    return any(name.removeprefix(COMFYUI_PREFIX) == "head.modulation" for name in names)


def to_canonical(name: str, original: bool) -> str:
    """The canonical (diffusers) name of a tensor as it stands in a file."""
    name = name.removeprefix(COMFYUI_PREFIX)
    if original:
        for pattern, replacement in _ORIGINAL_TO_CANONICAL:
            name = pattern.sub(replacement, name)
    return name


def other_wan_kind(names: list[str]) -> str | None:
    """Which other kind of Wan these tensors belong to ("an image-to-video (I2V)", ...), or None for text-to-video."""
    bare = [name.removeprefix(COMFYUI_PREFIX) for name in names]
    for pattern, kind in _OTHER_KINDS:
        if any(pattern.search(name) for name in bare):
            return kind
    return None
