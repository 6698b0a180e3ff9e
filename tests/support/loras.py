"""Wan LoRAs on disk in every layout that is in use, written apart from the code under test, and what they mean.

A LoRA is a dict of canonical names: of matrices to pairs (down, up), of anything to whole differences.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.wan_folders import to_original

ATTENTIONS = [
    f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")
]
LINEARS = [*ATTENTIONS, "ffn.net.0.proj", "ffn.net.2"]  # of a block: what kohya's, musubi's and diffusers' LoRAs change
Pairs = dict[str, tuple[Tensor, Tensor]]


def random_pairs(model, names: list[str] | None = None, rank: int = 3, seed: int = 0, size: float = 0.3) -> Pairs:
    """Random products for linear layers of a diffusers transformer, of those of all blocks if no names are given."""
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.named_parameters())
    layers = range(model.config.num_layers)
    pairs = {}
    for name in names or [f"blocks.{layer}.{linear}" for layer in layers for linear in LINEARS]:
        rows, columns = weights[f"{name}.weight"].shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        pairs[name] = down, size * torch.randn(rows, rank, generator=generator)
    return pairs


def random_differences(model, names: list[str], seed: int = 1, size: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters())
    return {name: size * torch.randn(tensors[name].shape, generator=generator) for name in names}


def merged(model, pairs: Pairs, factor: float = 1.0, differences: dict[str, Tensor] | None = None, scale: float = 1.0):
    """The state dict of a transformer with a LoRA in it, by the definition."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, (down, up) in pairs.items():
        tensors[f"{name}.weight"] += scale * factor * up @ down
    for name, difference in (differences or {}).items():
        tensors[name] += scale * difference
    return tensors


def diffusers_keys(pairs: Pairs, prefix: str = "transformer.") -> dict[str, Tensor]:
    keys = {f"{prefix}{name}.lora_A.weight": down for name, (down, _) in pairs.items()}
    return keys | {f"{prefix}{name}.lora_B.weight": up for name, (_, up) in pairs.items()}


def kohya_keys(pairs: Pairs, alpha: float) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in pairs.items():
        stem = "lora_unet_" + to_original(f"{name}.").removesuffix(".").replace(".", "_")
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return tensors


def comfyui_keys(
    pairs: Pairs,
    alpha: float | None = None,
    words: tuple[str, str] = ("lora_down", "lora_up"),
    differences: dict[str, Tensor] | None = None,
    prefix: str = "diffusion_model.",
) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in pairs.items():
        stem = prefix + to_original(f"{name}.").removesuffix(".")
        tensors |= {f"{stem}.{words[0]}.weight": down, f"{stem}.{words[1]}.weight": up}
        tensors |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    for name, difference in (differences or {}).items():
        key = prefix + to_original(name)
        if key.endswith("modulation"):
            key = key.removesuffix("modulation") + "diff_m"
        tensors[key.replace(".weight", ".diff").replace(".bias", ".diff_b")] = difference
    return tensors


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
