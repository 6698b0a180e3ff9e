"""tools/rename_lora.py gives a LoRA the names by which ComfyUI finds its layers, and changes no value.

The names are written down by hand. ComfyUI 0.33.0 was given both (docs/export.md).
"""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.runs import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import rename_lora

NAMES = {
    "transformer.blocks.0.attn1.to_q.lora_A.weight": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "transformer.blocks.0.attn1.to_out.0.lora_B.weight": "diffusion_model.blocks.0.self_attn.o.lora_B.weight",
    "transformer.blocks.11.ffn.net.0.proj.lora_down.weight": "diffusion_model.blocks.11.ffn.0.lora_down.weight",
    "transformer.blocks.11.ffn.net.2.alpha": "diffusion_model.blocks.11.ffn.2.alpha",
    "base_model.model.blocks.1.attn2.to_k.lora_B.default.weight": "diffusion_model.blocks.1.cross_attn.k.lora_B.weight",
    "transformer.condition_embedder.time_proj.lora_A.weight": "diffusion_model.time_projection.1.lora_A.weight",
}


def rename(run_main, tmp_path, tensors: dict[str, torch.Tensor]):
    save_file(tensors, tmp_path / "a.safetensors")
    flags = ["--lora", tmp_path / "a.safetensors", "--output", tmp_path / "new" / "b.safetensors"]
    return run_main(rename_lora.main, *flags)


def test_names_change_and_values_stay(run_main, tmp_path):
    tensors = {name: torch.randn(2, index + 1) for index, name in enumerate(NAMES)}
    rename(run_main, tmp_path, tensors).ok()
    renamed = load_file(tmp_path / "new" / "b.safetensors")
    assert renamed.keys() == set(NAMES.values())
    assert all(torch.equal(renamed[NAMES[name]], tensor) for name, tensor in tensors.items())


def test_a_strength_that_the_metadata_tell_becomes_an_alpha(run_main, tmp_path):
    tensors = {name: torch.zeros(4, 4) for name in list(NAMES)[:2]}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": '{"transformer.lora_alpha": 16, "transformer.r": 4}'})
    run_main(rename_lora.main, "--lora", file, "--output", tmp_path / "b.safetensors").ok()
    renamed = load_file(tmp_path / "b.safetensors")
    assert float(renamed["diffusion_model.blocks.0.self_attn.q.alpha"]) == 16 and len(renamed) == 3
    own = tensors | {"transformer.blocks.0.attn1.to_q.alpha": torch.tensor(2.0)}
    save_file(own, file, {"lora_adapter_metadata": '{"transformer.lora_alpha": 16, "transformer.r": 4}'})
    run_main(rename_lora.main, "--lora", file, "--output", tmp_path / "c.safetensors").ok()
    assert float(load_file(tmp_path / "c.safetensors")["diffusion_model.blocks.0.self_attn.q.alpha"]) == 2


@pytest.mark.parametrize("name", ["diffusion_model.blocks.0.self_attn.q.lora_A.weight", "blocks.0.attn1.to_q.weight"])
def test_what_is_no_such_lora_is_refused_by_name(run_main, tmp_path, name):
    outcome = rename(run_main, tmp_path, {name: torch.zeros(1)})
    assert outcome.code == 2 and name in outcome.err and not (tmp_path / "new").exists()
