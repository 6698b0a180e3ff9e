"""ComfyUI workflows that draw with a student: as its editor opens them, and as its HTTP API runs them.

    workflow = Workflow.of(config, "wan_student.safetensors")
    api_workflow(workflow)  # for POST /prompt
    ui_workflow(workflow)   # to drop on the editor

`docs/comfyui/` holds those of two ready configs, and `tools/check_comfyui.py` runs them.
"""

from dataclasses import dataclass
from typing import Any

from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.projection.comfyui import LATENTS, comfyui_sampler
from wandistiller.students.record import StudentRecord, trained_sizes

TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAES = {16: "wan_2.1_vae.safetensors", 48: "wan2.2_vae.safetensors"}
_HUB = "https://huggingface.co/Comfy-Org"
# The released files: their folder in models/, and where the editor offers to fetch them from.
_FILES = {
    TEXT_ENCODER: ("text_encoders", f"{_HUB}/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/text_encoders"),
    **{name: ("vae", f"{_HUB}/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/vae") for name in VAES.values()},
}
# Wan's own steps and shift at small sizes, for a student whose record names none
STEPS, SHIFT = 50, 5.0
# What the editor has of each class beside its inputs: the type of its output, and where the node stands.
_IN_EDITOR = {
    "UNETLoader": ("MODEL", (0, 0)),
    "CLIPLoader": ("CLIP", (0, 150)),
    "VAELoader": ("VAE", (0, 320)),
    "ModelSamplingSD3": ("MODEL", (380, 0)),
    "CLIPTextEncode": ("CONDITIONING", (380, 150)),
    **dict.fromkeys(LATENTS.values(), ("LATENT", (380, 400))),
    "KSampler": ("LATENT", (820, 0)),
    "VAEDecode": ("IMAGE", (1180, 0)),
    "SaveImage": (None, (1180, 160)),
}


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """What a workflow draws, and with which files.

    Attributes:
        file: name of the student's file in `models/diffusion_models`.
        num_channels: latent channels, 16 or 48.
    """

    file: str
    num_channels: int
    size: ImageSize
    shift: float
    steps: int
    sampler: str
    prompt: str = "a lighthouse in a storm"
    seed: int = 0

    @classmethod
    def of(cls, config: StudentConfig, file: str, **changes: Any) -> "Workflow":
        """Return the workflow of a student, with the settings that its record holds."""
        record = StudentRecord.of(config)
        settings: dict[str, Any] = {
            "num_channels": config.num_channels,
            "size": trained_sizes(config)[0],
            "shift": SHIFT if record.shift is None else record.shift,
            "steps": record.steps or STEPS,
            "sampler": comfyui_sampler(config),
        }
        return cls(file=file, **settings | changes)


def api_workflow(workflow: Workflow) -> dict[str, dict[str, Any]]:
    """Return the workflow as POST /prompt takes it: nodes by number; an input [node, 0] is the output of that node.

    cfg 1 asks for no negative prompt, so that the positive one stands in its place.
    """
    model, clip, vae, shifted, text, latents, drawn, picture = ([str(number), 0] for number in range(1, 9))
    size = {"width": workflow.size.width, "height": workflow.size.height, "length": 1, "batch_size": 1}
    sampling = {"seed": workflow.seed, "steps": workflow.steps, "cfg": 1.0, "sampler_name": workflow.sampler}
    sampling |= {"scheduler": "simple", "denoise": 1.0}
    nodes = [
        ("UNETLoader", {"unet_name": workflow.file, "weight_dtype": "default"}),
        ("CLIPLoader", {"clip_name": TEXT_ENCODER, "type": "wan", "device": "default"}),
        ("VAELoader", {"vae_name": VAES[workflow.num_channels]}),
        ("ModelSamplingSD3", {"shift": workflow.shift, "model": model}),
        ("CLIPTextEncode", {"text": workflow.prompt, "clip": clip}),
        (LATENTS[workflow.num_channels], size | ({"vae": vae} if workflow.num_channels == 48 else {})),
        ("KSampler", sampling | {"model": shifted, "positive": text, "negative": text, "latent_image": latents}),
        ("VAEDecode", {"samples": drawn, "vae": vae}),
        ("SaveImage", {"filename_prefix": "wandistiller", "images": picture}),
    ]
    return {str(number): {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in enumerate(nodes, start=1)}


def ui_workflow(workflow: Workflow) -> dict[str, Any]:
    """Return the workflow as ComfyUI's editor saves one, to be opened or dropped there."""
    nodes = api_workflow(workflow)
    links: list[list] = []  # number, from node and slot, to node and slot, type
    for number, node in nodes.items():
        for slot, (source, _) in enumerate(_joined(node).values()):
            kind = _IN_EDITOR[nodes[source]["class_type"]][0]
            links.append([len(links) + 1, int(source), 0, int(number), slot, kind])
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": [_in_editor(node, int(number), links) for number, node in nodes.items()],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _joined(node: dict[str, Any]) -> dict[str, list]:
    """Return the inputs of a node that come from other nodes."""
    return {name: value for name, value in node["inputs"].items() if isinstance(value, list)}


def _in_editor(node: dict[str, Any], number: int, links: list[list]) -> dict[str, Any]:
    """Return a node as the editor saves it."""
    kind = node["class_type"]
    output, position = _IN_EDITOR[kind]
    arriving = [link for link in links if link[3] == number]
    leaving = [link[0] for link in links if link[1] == number]
    values: list[Any] = []
    for name, value in node["inputs"].items():
        if not isinstance(value, list):
            values += [value, "fixed"] if name == "seed" else [value]  # the editor's own widget, control_after_generate
    properties: dict[str, Any] = {"Node name for S&R": kind}
    if values and values[0] in _FILES:
        directory, address = _FILES[values[0]]
        properties["models"] = [{"name": values[0], "url": f"{address}/{values[0]}", "directory": directory}]
    height = max(60, 40 + 26 * max(len(values), len(arriving)))
    return {
        "id": number,
        "type": kind,
        "pos": list(position),
        "size": [340, 200] if kind == "CLIPTextEncode" else [320, height],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [
            {"name": name, "type": link[5], "link": link[0]} for name, link in zip(_joined(node), arriving, strict=True)
        ],
        "outputs": [{"name": output, "type": output, "links": leaving, "slot_index": 0}] if output else [],
        "properties": properties,
        "widgets_values": values,
    }
