"""The keys of a Wan LoRA's file in every layout that is in use: which tensor of the Wan each one changes, and how.

The layouts are diffusers' and PEFT's (`transformer.blocks.0.attn1.to_q.lora_A.weight`), kohya's and musubi-tuner's
(`lora_unet_blocks_0_self_attn_q.lora_down.weight` with `.alpha`), LyCORIS's (`lycoris_blocks_0_self_attn_q.lokr_w1`) and ComfyUI's
(`diffusion_model.blocks.0.self_attn.q.lora_up.weight`, and `.diff`, `.diff_b` and `.diff_m` of distilled LoRAs).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from wandistiller.errors import UserError, shown
from wandistiller.wan.names import WRAPPER, other_wan_kind, to_original

# What the Wan lies in by the names of a key, such as base_model.model., lora_unet_ or pipe.dit.
_PREFIX = re.compile(
    r"(?:(?:base_model|model|diffusion_model|transformer|unet|pipe|dit|module|net|lora|lycoris)[._]+)*"
)
# The parts of each way to change a tensor: a product, a difference, LyCORIS's products of Kronecker and Hadamard
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
METHODS = (
    ("up", "down"),
    ("diff",),
    ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    HADAMARD,
)
# The end of a key, which part of a change it is, and of which tensor of the module; before ".weight" PEFT has its adapter's name.
_ENDS = [
    (r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight$", "down", ("weight",)),
    (r"\.(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight$", "up", ("weight",)),
    (r"\.alpha$", "alpha", ("weight",)),
    (r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)?)$", "magnitude", ("weight",)),
    (r"\.(?:diff|w_norm)$", "diff", ("weight", "table")),
    (r"\.(?:diff_b|b_norm)$", "diff", ("bias",)),
    (r"\.diff_m$", "diff", ("modulation",)),
    *((rf"\.{part}$", part, ("weight",)) for method in METHODS[2:] for part in method),
]


class LoraError(UserError):
    """A LoRA is missing, damaged, of another model, or of another kind."""


def read_keys(path: Path, keys: Iterable[str], names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return for each key of a LoRA's file which part of a change it is, and the canonical name of the tensor that is changed.

    The parts are those of `METHODS`, and "alpha" of a product and "magnitude" of a DoRA.

    Args:
        names: the canonical names of the tensors of the Wan that it is for.

    Raises:
        LoraError: there are none, or one of them belongs to no LoRA of such a Wan; the message names the first.
    """
    modules = _modules(names)
    found = {key: _read_key(key, modules) for key in keys}
    if not found:
        raise LoraError(f"{path}: holds no tensors, so it is no LoRA")
    read = {key: place for key, place in found.items() if place is not None}
    if len(read) < len(found):
        _refuse_strange(path, [key for key in found if key not in read], len(found))
    return read


def _refuse_strange(path: Path, strange: list[str], count: int) -> None:
    """Refuse keys that no text-to-video Wan of this size has, and say whose they are where that is known."""
    kind = other_wan_kind(map(_without_prefix, strange))
    what = f"is a LoRA of {kind} Wan" if kind else "is a LoRA of another model, of a larger Wan or of another kind"
    raise LoraError(
        f"{path}: {what}: {len(strange)} of its {count} keys change nothing of this text-to-video Wan, the first is "
        f"{shown(strange[0])}; give a LoRA, DoRA, LoKr, LoHa or differences that were trained on this Wan"
    )


def _modules(names: Iterable[str]) -> Mapping[str, dict[str, str]]:
    """Return the tensors of each module, as "weight", "bias" and tables, by both spellings of its name with _ for dots."""
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        for spelling in (name, to_original(name)):
            stem, _, kind = spelling.rpartition(".")
            places = {stem: kind}
            if kind not in ("weight", "bias"):  # a modulation table is no module, and its own name stands for it too
                places = {stem: "modulation", spelling: "table"}
            for place, what in places.items():
                modules.setdefault(place.replace(".", "_"), {})[what] = name
    return modules


def _without_prefix(key: str) -> str:
    """Return a key without the names of what the Wan lies in, of which tools write several."""
    return _PREFIX.sub("", WRAPPER.sub("", key), count=1)


def _read_key(key: str, modules: Mapping[str, dict[str, str]]) -> tuple[str, str] | None:
    """Return part and tensor of a key; None where no module has that name, or nothing that could be changed so."""
    bare = _without_prefix(key)
    for pattern, part, kinds in _ENDS:
        if match := re.search(pattern, bare):
            tensors = modules.get(bare[: match.start()].replace(".", "_"), {})
            return next(((part, tensors[kind]) for kind in kinds if kind in tensors), None)
    return None
