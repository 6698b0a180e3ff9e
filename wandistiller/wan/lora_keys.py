"""The keys of a Wan LoRA's file in every layout that is in use: which tensor of the Wan each one changes, and how.

The layouts are diffusers' and PEFT's (`transformer.blocks.0.attn1.to_q.lora_A.weight`), kohya's and musubi-tuner's
(`lora_unet_blocks_0_self_attn_q.lora_down.weight` with `.alpha`), LyCORIS's (`lycoris_blocks_0_self_attn_q.lokr_w1`) and ComfyUI's
(`diffusion_model.blocks.0.self_attn.q.lora_up.weight`, and `.diff`, `.diff_b` and `.diff_m` of distilled LoRAs).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wandistiller.errors import UserError, shown
from wandistiller.wan.names import other_wan_kind, to_original

_PREFIXES = (
    "base_model.model.",
    *("model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "dit.", "module.", "model.", "net."),
    *("lora_unet_", "lora_transformer_", "lycoris_"),
)
_WRAPPER = re.compile(r"(?:^|(?<=[._]))_orig_mod[._]")  # torch.compile's, wherever it stands
# The parts of LyCORIS's products: Kronecker's of two matrices, Hadamard's of two products
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# What the end of a key says; between the name and ".weight" PEFT has the name of its adapter.
_ENDS = {
    "down": re.compile(r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight$"),
    "up": re.compile(r"\.(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight$"),
    "up_bias": re.compile(r"\.lora_B(?:\.\w+)?\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
    "magnitude": re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)?)$"),
    "diff": re.compile(r"\.(?:diff|w_norm)$"),
    "diff_b": re.compile(r"\.(?:diff_b|b_norm)$"),
    "diff_m": re.compile(r"\.diff_m$"),
    **{name: re.compile(rf"\.{name}$") for name in (*KRONECKER, *HADAMARD)},
}
# Other ways to change a matrix, by what only their keys hold
_OTHER_METHODS = {
    "OFT": ("oft_", "boft_"),
    "LoCon (with lora_mid)": ("lora_mid",),
    "Tucker decomposition": ("lokr_t", "hada_t"),
}
_IMAGE_KEYS = re.compile(r"[._][kv]_img\b|img_emb|add_[kv]_proj|image_embedder")


class LoraError(UserError):
    """A LoRA is missing, damaged, of another model, or of another kind."""


@dataclass(frozen=True)
class LoraKey:
    """What one key stands for.

    Attributes:
        part: "down", "up" and "alpha" of a product, a part of LyCORIS's, "magnitude" of a DoRA, or "diff" for a whole difference.
        tensor: the canonical name of the tensor that is changed.
        is_scaled: whether the product's factor counts for a difference too, as PEFT has it for the bias of lora_B.
    """

    part: str
    tensor: str
    is_scaled: bool = False


def read_keys(path: Path, keys: Iterable[str], names: Iterable[str]) -> dict[str, LoraKey]:
    """Return what each key of a LoRA's file stands for.

    Args:
        names: the canonical names of the tensors of the Wan that it is for.

    Raises:
        LoraError: there are none, or one of them belongs to no LoRA of such a Wan; the message names the first.
    """
    keys = list(keys)
    if not keys:
        raise LoraError(f"{path}: holds no tensors, so it is no LoRA")
    _refuse_other_methods(path, keys)
    modules = _modules(names)
    found, strange = {}, []
    for key in keys:
        read = _read_key(key, modules)
        if read is None:
            strange.append(key)
        else:
            found[key] = read
    if strange:
        _refuse_strange(path, strange, len(keys))
    return found


def _refuse_other_methods(path: Path, keys: list[str]) -> None:
    for method, marks in _OTHER_METHODS.items():
        for key in keys:
            if any(f".{mark}" in key for mark in marks):
                raise LoraError(
                    f"{path}: is a {method} (it holds {shown(key)}), which is not merged here; allowed: LoRA, DoRA, LoKr, "
                    "LoHa and differences (diff, diff_b)"
                )


def _refuse_strange(path: Path, strange: list[str], count: int) -> None:
    """Refuse keys that no text-to-video Wan of this size has, and say whose they are where that is known."""
    stems = [_without_prefix(key) for key in strange]
    kind = "an image-to-video (I2V)" if any(map(_IMAGE_KEYS.search, stems)) else other_wan_kind(stems)
    what = f"is a LoRA of {kind} Wan" if kind else "is a LoRA of another model, or of a larger Wan"
    raise LoraError(
        f"{path}: {what}: {len(strange)} of its {count} keys change nothing of this text-to-video Wan, the first is "
        f"{shown(strange[0])}; give a LoRA that was trained on this Wan"
    )


def _modules(names: Iterable[str]) -> Mapping[str, dict[str, str]]:
    """Return the tensors of each module, as "weight", "bias" and "table", by both spellings of its name with _ for dots."""
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, kind = name, "table"  # a modulation table is no module, and its own name stands for it
        for spelling in (stem, to_original(stem)):
            modules.setdefault(spelling.replace(".", "_"), {})[kind] = name
    return modules


def _without_prefix(key: str) -> str:
    """Return a key without the names of what the Wan lies in, of which tools write several."""
    key = _WRAPPER.sub("", key)
    while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix)), None):
        key = key.removeprefix(prefix).lstrip("_")
    return key


def _read_key(key: str, modules: Mapping[str, dict[str, str]]) -> LoraKey | None:
    """Return what a key stands for; None where no module has that name, or nothing that could be changed so."""
    bare = _without_prefix(key)
    for part, pattern in _ENDS.items():
        if match := pattern.search(bare):
            return _changed(part, bare[: match.start()].replace(".", "_"), modules)
    return None


def _changed(part: str, stem: str, modules: Mapping[str, dict[str, str]]) -> LoraKey | None:
    if part == "diff_m":
        tensors = modules.get(f"{stem}_modulation", {})
        return LoraKey("diff", tensors["table"]) if "table" in tensors else None
    tensors = modules.get(stem, {})
    if part not in ("diff", "diff_b", "up_bias"):
        return LoraKey(part, tensors["weight"]) if "weight" in tensors else None
    if part == "diff":
        name = tensors.get("weight") or tensors.get("table")
        return LoraKey("diff", name) if name else None
    return LoraKey("diff", tensors["bias"], is_scaled=part == "up_bias") if "bias" in tensors else None
