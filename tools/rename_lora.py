"""Give a LoRA that diffusers or peft trained on an exported student the original names, by which ComfyUI knows its layers.

    python tools/rename_lora.py --lora pytorch_lora_weights.safetensors --output lora_for_comfyui.safetensors

ComfyUI passes over a LoRA of diffusers' Wan names with a line in its log. The values stay as they are; a strength that PEFT's or
diffusers' settings tell, which ComfyUI does not read, becomes an alpha of each layer.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from wandistiller.command_line import run_command
from wandistiller.errors import UserError, shown
from wandistiller.files.output_folder import check_writable
from wandistiller.flags import FlagParser, path

if TYPE_CHECKING:
    from torch import Tensor

COMFYUI_PREFIX = "diffusion_model."
# The layer's name in the model, and what of it a tensor is; peft puts the name of an adapter in between
LORA_NAME = re.compile(
    r"(?:transformer\.|base_model\.model\.)?(.+?)\.(lora_[AB]|lora_down|lora_up|alpha)(?:\.default)?(\.weight)?"
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the two files."""
    parser = FlagParser("rename_lora.py", __doc__.split("\n")[0])
    group = parser.group("Files")
    group.flag("--lora", "a safetensors file of diffusers' names", required=True, type=path)
    group.flag("--output", "a new safetensors file", required=True, type=path)
    return parser.parse(argv)


def with_original_names(tensors: "Mapping[str, Tensor]", settings: Mapping, where: str) -> "dict[str, Tensor]":
    """Return the tensors of a LoRA under original names.

    Args:
        settings: of PEFT, which tell its strength.

    Raises:
        UserError: one is no part of a LoRA on a Wan of diffusers' names.
    """
    import torch

    from wandistiller.wan.lora import peft_factor
    from wandistiller.wan.names import to_original

    renamed = {}
    for name, tensor in tensors.items():
        match = LORA_NAME.fullmatch(name)
        layer = to_original(match[1]) if match else name
        if match is None or layer == match[1]:
            raise UserError(
                f"{where}: {shown(name)} is not of a LoRA with diffusers' names of a Wan, such as "
                "transformer.blocks.0.attn1.to_q.lora_A.weight; one with original names needs no renaming"
            )
        renamed[f"{COMFYUI_PREFIX}{layer}.{match[2]}{match[3] or ''}"] = tensor
        if match[2] == "lora_A" and (factor := peft_factor(settings, f"{match[1]}.weight", len(tensor))) != 1.0:
            # An alpha of the file's own counts instead, as for every reader.
            renamed.setdefault(f"{COMFYUI_PREFIX}{layer}.alpha", torch.tensor(factor * len(tensor)))
    if not renamed:
        raise UserError(f"{where}: holds no tensors")
    return renamed


def main(argv: list[str] | None = None) -> int:
    """Read a LoRA and write it under its other names; a file that is there stays."""
    flags = parse_args(argv)
    target = Path(flags.output)
    if target.exists() or target.is_symlink():
        raise UserError(f"--output {target}: is there already; give another name")
    check_writable(target.parent, "--output")

    from wandistiller.files.tensor_files import read_header, write_tensors
    from wandistiller.wan.lora import peft_settings

    stored, metadata = read_header(Path(flags.lora))
    layers = {f"{match[1]}.weight" for name in stored if (match := LORA_NAME.fullmatch(name))}
    settings = peft_settings(Path(flags.lora), metadata, layers)
    tensors = with_original_names({name: one.read() for name, one in stored.items()}, settings, flags.lora)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(target, tensors, {"format": "pt"})
    print(f"Wrote {target}: {len(tensors)} tensors; it goes to ComfyUI's models/loras")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
