"""ComfyUI's rules for a student's file: what it reads wrong, with which settings it draws, and the workflows that it opens.

ComfyUI is no dependency, so no test imports it; docs/export.md says what was held against one.
"""

import json

import pytest

from support.runs import ROOT
from wandistiller.model.config import StudentConfig
from wandistiller.projection.comfyui import comfyui_settings, comfyui_warnings, comfyui_workflow
from wandistiller.wan.settings import RELEASED_LATENTS

RELEASED = {"block": "wan", "hidden_size": 256, "depth": 2, "num_heads": 2, "num_channels": 16, "image_size": 64}
OLDER = "ComfyUI older than 0.19 draws this student wrongly or not at all: it has "
READ_WRONG = {
    "heads of 32": ({"num_heads": 8}, f"{OLDER}head_dim 32 (not 128)"),
    "patches of 1": ({"patch_size": 1, "freq_dim": 128}, f"{OLDER}patch_size 1 (not 2), freq_dim 128 (not 256)"),
    "eps": ({"eps": 1e-3}, f"{OLDER}eps 0.001 (not 1e-06)"),
    "text width": ({"text_encoder_output_dim": 128}, "no text encoder of width 128"),
    "slots": ({"text_max_length": 64}, "this student learnt 64"),
    "channels": ({"num_channels": 4}, "16 or 48 channels"),
    "latents": ({"distillation": {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}}, "learnt others"),
    "latents of 5B": ({"num_channels": 48, "distillation": {"latents_std": [1.0] * 48}}, "learnt others"),
}


@pytest.mark.parametrize("name", READ_WRONG)
def test_each_shape_that_comfyui_reads_wrong_is_warned_of(name):
    changes, message = READ_WRONG[name]
    (warning,) = comfyui_warnings(StudentConfig(**RELEASED | changes))
    assert message in warning


WAN_CONFIGS = [
    path for path in sorted((ROOT / "config").glob("*student_config*.json")) if StudentConfig.load(path).block == "wan"
]


@pytest.mark.parametrize("path", WAN_CONFIGS, ids=lambda path: path.stem)
def test_ready_configs_for_released_teachers_are_read_right(path):
    config = StudentConfig.load(path)
    if config.text_encoder_output_dim != 4096:
        assert len(comfyui_warnings(config)) == 2  # the demo's heads and its text width
        return
    mean, std = RELEASED_LATENTS[config.num_channels]
    taught = config.replace(distillation={"latents_mean": mean, "latents_std": std})
    assert comfyui_warnings(config) == comfyui_warnings(taught) == []


def test_settings_for_comfyui_are_those_of_the_record():
    taught = StudentConfig(**RELEASED, distillation={"shift": 12.0, "num_inference_steps": 40})
    text = comfyui_settings(taught)
    assert all(part in text for part in ("shift 12,", "steps 40,", "cfg 1,", "dpmpp_2m", "length 1"))
    few = taught.replace(distillation={"shift": 12.0, "num_inference_steps": 40, "student_steps": 4})
    assert "steps 4, cfg 1, euler, simple" in comfyui_settings(few)
    assert "EmptyHunyuanLatentVideo of length 1" in text
    assert "Wan22ImageToVideoLatent of length 1" in comfyui_settings(taught.replace(num_channels=48))


# The widgets of each node in their order, as ComfyUI 0.33.0 declares them; after a seed its editor has one of its own.
WIDGETS = {
    "UNETLoader": ["unet_name", "weight_dtype"],
    "CLIPLoader": ["clip_name", "type", "device"],
    "VAELoader": ["vae_name"],
    "ModelSamplingSD3": ["shift"],
    "CLIPTextEncode": ["text"],
    "EmptyHunyuanLatentVideo": ["width", "height", "length", "batch_size"],
    "Wan22ImageToVideoLatent": ["width", "height", "length", "batch_size"],
    "KSampler": ["seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
    "VAEDecode": [],
    "SaveImage": ["filename_prefix"],
}


@pytest.mark.parametrize("channels, source", [(16, "student_config"), (48, "student_config_5B")])
def test_the_editors_workflow_asks_for_what_the_api_is_asked_for(channels, source):
    """As ComfyUI's own editor turned these files into prompts (docs/export.md)."""
    config = StudentConfig.load(ROOT / "config" / f"{source}.json")
    editor = comfyui_workflow(config, "wan_student.safetensors", "a lighthouse in a storm")
    api = json.loads((ROOT / "docs" / "comfyui" / f"wan_student_{channels}_channels_api.json").read_text())
    links = {number: (str(source), slot) for number, source, slot, *_ in editor["links"]}
    prompt = {}
    for node in editor["nodes"]:
        values = dict(zip(WIDGETS[node["type"]], node["widgets_values"], strict=True))
        values.pop("control_after_generate", None)
        joined = {entry["name"]: list(links[entry["link"]]) for entry in node["inputs"]}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values | joined}
        for slot, output in enumerate(node["outputs"]):
            assert all(links[link] == (str(node["id"]), slot) for link in output["links"])
    assert prompt == api
