"""ComfyUI's rules for a student's file: what it reads wrong, with which settings it draws, and the workflows that it opens.

ComfyUI is no dependency, so no test imports it: tools/check_comfyui.py holds these rules against a ComfyUI.

pytest tests/projection/test_comfyui.py
"""

import json

import pytest

from support.runs import ROOT
from wandistiller.model.config import StudentConfig
from wandistiller.projection.comfyui import comfyui_settings, comfyui_warnings
from wandistiller.projection.comfyui_workflow import Workflow, api_workflow, ui_workflow
from wandistiller.wan.settings import RELEASED_LATENTS

RELEASED = {"block": "wan", "hidden_size": 256, "depth": 2, "num_heads": 2, "num_channels": 16, "image_size": 64}
READ_WRONG = {
    "heads of 32": ({"num_heads": 8}, "hidden_size // 128 = 2 for the number of heads, this student has 8"),
    "heads of 64": ({"num_heads": 4}, "hidden_size // 128 = 2 for the number of heads, this student has 4"),
    "no head at all": ({"hidden_size": 96, "num_heads": 1}, "it would not load"),
    "patches of 1": (
        {"patch_size": 1},
        "older than 0.19 takes patch_size 2 as given, this student has 1: it would not load",
    ),
    "freq_dim": ({"freq_dim": 128}, "freq_dim 256 as given, this student has 128: it would not load"),
    "eps": ({"eps": 1e-3}, "eps 1e-06 as given, this student has 0.001: it would draw otherwise"),
    "text width": (
        {"text_encoder_output_dim": 128},
        "text_encoder_output_dim 4096 as given, this student has 128: it would find no text encoder for it, and versions older "
        "than 0.19 would not load the file (size mismatch for text_embedding.0.weight)",
    ),
    "slots": ({"text_max_length": 64}, "text_max_length 512 as given"),
    "channels": ({"num_channels": 4}, "16 or 48 channels"),
    "latents": ({"distillation": {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}}, "learnt others"),
    "latents of 5B": ({"num_channels": 48, "distillation": {"latents_std": [1.0] * 48}}, "learnt others"),
}


@pytest.mark.parametrize("name", READ_WRONG)
def test_each_shape_that_comfyui_reads_wrong_is_warned_of(name):
    changes, message = READ_WRONG[name]
    warnings = comfyui_warnings(StudentConfig(**RELEASED | changes))
    assert len(warnings) == 1 and message in warnings[0]
    told = name in {"heads of 32", "heads of 64", "no head at all", "patches of 1", "freq_dim", "eps"}
    assert comfyui_warnings(StudentConfig(**RELEASED | changes), reads_metadata=True) == ([] if told else warnings)


WAN_CONFIGS = [path for path in sorted((ROOT / "config").glob("*.json")) if StudentConfig.load(path).block == "wan"]


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


@pytest.mark.parametrize("channels, source", [(16, "student_config"), (48, "student_config_5B")])
def test_the_workflows_of_the_docs_are_those_of_the_ready_configs(channels, source):
    workflow = Workflow.of(StudentConfig.load(ROOT / "config" / f"{source}.json"), "wan_student.safetensors")
    for kind, made in (("api", api_workflow(workflow)), ("ui", ui_workflow(workflow))):
        file = ROOT / "docs" / "comfyui" / f"wan_student_{channels}_channels_{kind}.json"
        assert json.loads(file.read_text(encoding="utf-8")) == made


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


@pytest.mark.parametrize("channels", [16, 48])
def test_the_editors_workflow_asks_for_what_the_api_is_asked_for(channels):
    """As ComfyUI's own editor turned these files into prompts (docs/export.md)."""
    folder = ROOT / "docs" / "comfyui"
    editor, api = (
        json.loads((folder / f"wan_student_{channels}_channels_{kind}.json").read_text()) for kind in ("ui", "api")
    )
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
