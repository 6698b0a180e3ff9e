"""The names of Wan's tensors and settings: original and ComfyUI spellings become canonical ones (diffusers'), and back."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from wandistiller.errors import UserError
from wandistiller.files.weights import Stored, is_weight_file, stored_tensors
from wandistiller.model.config import StudentConfig
from wandistiller.wan.record_kinds import SAMPLING_KINDS

# What the names of each part of an all-in-one checkpoint begin with (ComfyUI's supported_models.py and its own loaders)
_PARTS = {
    "VAE": ("first_stage_model.", "vae."),
    "transformer": ("model.diffusion_model.", "diffusion_model.", "model."),
    "text encoder": ("text_encoders.", "cond_stage_model.", "text_encoder."),
}
PATCH_KERNEL = "patch_embedding.weight"
# The names of torch.compile's, FSDP's and checkpointing's wrappers, wherever they stand; LoRAs may have _ for dots
WRAPPER = re.compile(r"(?:^|(?<=[._]))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]")

# These map the stem of an original name to diffusers' (scripts/convert_wan_to_diffusers.py), in the model and in a block.
_IN_MODEL = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_IN_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IN_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",  # of a block's three norms only the one before cross-attention has weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{f"self_attn.{original}": f"attn1.{canonical}" for original, canonical in _IN_ATTENTION.items()},
    **{f"cross_attn.{original}": f"attn2.{canonical}" for original, canonical in _IN_ATTENTION.items()},
}
_TO_CANONICAL = (_IN_MODEL, _IN_BLOCK)
_TO_ORIGINAL = tuple({canonical: original for original, canonical in table.items()} for table in _TO_CANONICAL)

# Other members of the Wan family, by their tensors in either spelling, their classes and their `model_type`.
_OTHER_KINDS = {
    "a VACE (editing)": r"vace",
    "an Animate": r"animate|face_adapter|face_encoder|motion_encoder|pose_patch_embedding",
    "a speech-to-video (S2V)": r"s2v|casual_audio_encoder|audio_injector|audio_proj",
    "a Fun control": r"^control_adapter|^ref_conv",
    "a first-last-frame-to-video (FLF2V)": r"flf2v",
    "an image-to-video (I2V)": r"^i2v|ImageToVideo|^img_emb[._]|image_embedder|[._][kv]_img\b|add_[kv]_proj",
}

# Models of a Wan's shape with trained weights of their own, by what only they hold
_RELATIVES = {
    r"to_gate_compress": "a FastWan with sparse attention (VSA); use its FullAttn variant",
    r"^fps_(embedding|projection)": "a SkyReels-V2-DF, which is told its frames per second; use SkyReels-V2-T2V",
    r"attn_op\.|\.proj_l\b": "a TurboWan with sparse linear attention; use the Wan that it was made from",
    r"delta_embedding": "an AnyFlow, whose steps are told their length; use the Wan that it was made from",
    r"lora_|lokr_|hada_": "a LoRA, or a Wan with one beside its weights; give a LoRA as --teacher_lora",
    r"quant|zero|scale|qweight|absmax|nf4": "weights in a quantisation that is not read; get bf16, fp8_scaled or GGUF",
}


def own_names(
    anchor: str, rename: Callable[[str], str], found: Mapping[str, Stored], where: object
) -> dict[str, Stored]:
    """Return tensors by the names that a model has for them; those of other parts in an all-in-one checkpoint keep theirs.

    The prefix of the model's part of the file is taken off, whichever that is, and so are the names of torch.compile's, FSDP's
    and checkpointing's wrappers, wherever they stand.

    Args:
        anchor: a pattern of the name of a tensor that the part has once.
        rename: returns the model's own name of a tensor's original one, and leaves its own as they are.

    Raises:
        UserError: there are two such parts.
    """
    names = {name: WRAPPER.sub("", name) for name in found}
    matches = (re.fullmatch(rf"((?:.*\.)?)(?:{anchor})", name) for name in names.values())
    prefixes = sorted({match[1] for match in matches if match})
    if len(prefixes) > 1:
        raise UserError(f"{where}: holds two models, as {prefixes[0]!r} and {prefixes[1]!r}; give a file of one")
    prefix = prefixes[0] if prefixes else ""
    # ComfyUI keeps what belongs to a text encoder beside its "transformer."
    outer = prefix.removesuffix("transformer.")
    own = {
        rename(name.removeprefix(prefix if name.startswith(prefix) else outer)): found[key]
        for key, name in names.items()
    }
    if len(own) < len(found):
        raise UserError(f"{where}: holds the same tensor under two names; give a file of one model")
    return own


def renamed(name: str, rules: Iterable[tuple[str, Any]]) -> str:
    """Return a name after patterns in it were replaced, one after another."""
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name


def other_part(name: str, own: str) -> str | None:
    """Return why a tensor does no harm that belongs to another part of the same file than the `own` one; None for a stranger."""
    part = next((part for part, prefixes in _PARTS.items() if part != own and name.startswith(prefixes)), None)
    return f"of the {part} in the same file" if part else None


def harmless_reason(name: str) -> str | None:
    """Return why a tensor in a Wan's file does no harm though it is none of the transformer's; None where it is a stranger."""
    if re.match(r"(rope\.)?freqs(_cos|_sin)?$", name):
        return "a table of positions, which follows from the shape"
    return other_part(name, "transformer")


def relative_of_wan(name: str) -> str | None:
    """Return the model of Wan's shape that a stranger suggests, and its substitute."""
    return next((relative for pattern, relative in _RELATIVES.items() if re.search(pattern, name)), None)


def to_canonical(name: str) -> str:
    """Return the canonical name, diffusers', of a tensor's original one."""
    return _renamed(name, *_TO_CANONICAL)


def to_original(name: str) -> str:
    """Return the original name of a tensor from its canonical one, as the inverse of `to_canonical`."""
    return _renamed(name, *_TO_ORIGINAL)


def _renamed(name: str, in_model: dict[str, str], in_block: dict[str, str]) -> str:
    """Replace the stem of a name; it ends at a dot, so that what follows (.weight, .scale_weight) is kept."""
    block = "".join(re.findall(r"^blocks\.\d+\.", name))
    inside = name.removeprefix(block)
    for stem, other in (in_block if block else in_model).items():
        if inside == stem or inside.startswith(f"{stem}."):
            return block + other + inside.removeprefix(stem)
    return name


def refuse_other_kind(names: Iterable[str], where: object) -> None:
    """Refuse a checkpoint whose tensors, class or `model_type` are those of another kind of Wan than text-to-video."""
    if kind := other_wan_kind(names):
        raise UserError(
            f"{where}: this is {kind} checkpoint; WanDistiller projects text-to-video models only "
            "(Wan2.1-T2V-1.3B/14B, Wan2.2-T2V-A14B, Wan2.2-TI2V-5B)"
        )


def other_wan_kind(names: Iterable[str]) -> str | None:
    """Return the other kind of Wan that a name tells, such as "an image-to-video (I2V)"; None for text-to-video."""
    text = "\n".join(names)
    return next((kind for kind, pattern in _OTHER_KINDS.items() if re.search(pattern, text, re.I | re.M)), None)


COMFYUI_FOLDERS = ("diffusion_models", "unet", "checkpoints")  # of ComfyUI's models/, for transformers


def part_files(place: Path, anchor: str, file_name: str, folders: Iterable[str]) -> list[Path]:
    """Return the files that hold a part of a Wan: `place` itself, or by their names those beside it or where its parts lie.

    Args:
        anchor: a pattern of the name of a tensor that the part has.
        file_name: a pattern of the names that its files have.
        folders: of ComfyUI's models/ that they lie in.
    """
    if place.is_file():
        if is_weight_file(place) and any(re.search(rf"(^|\.)({anchor})$", key) for key in stored_tensors(place)):
            return [place]
        places = {place.parent, *(folder.parent for folder in place.parents if folder.name in COMFYUI_FOLDERS)}
    else:
        places = {comfyui_models(place) or place}
    found = {path for place in places for path in place.glob("*")}
    found |= {path for place in places for folder in folders for path in (place / folder).rglob("*")}
    return sorted(path for path in found if is_weight_file(path) and re.search(file_name, path.name, re.IGNORECASE))


def comfyui_models(folder: Path) -> Path | None:
    """Return the models/ folder of ComfyUI that a folder is or holds, if any."""
    places = (folder, folder / "models")
    return next((place for place in places if any((place / name).is_dir() for name in COMFYUI_FOLDERS)), None)


# "Low" of low VRAM, low light or low steps is no noise level.
_SIDE = re.compile(
    r"(?<![a-z])(high|low)(?![a-z]|[ _-]?(?:v?ram|res|light(?!ning|x2v)|step|denoise|qual|detail|motion))|(high|low)[ _-]?noise"
)


def side_of(place: str | Path) -> str | None:
    """Return the expert of two, "high" or "low", that the name of a file or of its folder tells; None where it tells none."""
    place = Path(place)
    for name in (place.name, place.parent.name):
        # A capital begins a word, as in HighNoise.
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()
        sides = {match[1] or match[2] for match in _SIDE.finditer(words)}
        if sides:
            return sides.pop() if len(sides) == 1 else None
    return None


def title_of(metadata: Mapping[str, str]) -> str:
    """Return a file's own title: a GGUF's name, that of the model specification, or of a trainer's output."""
    return " ".join(metadata.get(key, "") for key in ("general.name", "modelspec.title", "ss_output_name"))


def transformer_settings(config: StudentConfig) -> dict:
    """Return the config.json of a diffusers WanTransformer3DModel with this shape (models/transformers/transformer_wan.py)."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.num_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "out_channels": config.num_channels,
        "patch_size": [1, config.patch_size, config.patch_size],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_encoder_output_dim,
    }


def teacher_record(config: StudentConfig) -> dict:
    """Return the record of a student as a teacher, for those that distil it or draw with it; empty where it has none.

    Its guidance is 1, since the guided velocity is what it learnt. A student of few steps is asked at the noise levels of these alone.
    """
    if not (record := config.distillation):
        return {}
    kept = {name: record.get(name) for name in (*SAMPLING_KINDS, "latents_mean", "latents_std", "world")}
    kept |= {"guidance_scale": 1.0, "guidance_scale_2": None}
    if steps := record.get("student_steps"):
        kept |= {"num_inference_steps": steps, "teacher_sampler": "euler"}
    return {name: value for name, value in kept.items() if value is not None}
