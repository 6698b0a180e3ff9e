"""ComfyUI workflows that draw with a student: as its editor opens them, and as its HTTP API runs them.

    workflow = Workflow.of(config, "wan_student.safetensors")
    api_workflow(workflow)  # for POST /prompt
    ui_workflow(workflow)   # to drop on the editor

Both are made of one list of nodes. `docs/comfyui/` holds those of two ready configs, and `tools/check_comfyui.py` runs them.
"""

from dataclasses import dataclass, field
from typing import Any

from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.projection.comfyui import comfyui_sampler
from wandistiller.sampling.recorded import StudentRecord, trained_sizes

TEXT_ENCODER = "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
VAES = {16: "wan_2.1_vae.safetensors", 48: "wan2.2_vae.safetensors"}
_HUB = "https://huggingface.co/Comfy-Org"
# Where the editor offers to fetch the released files from
_URLS = {
    TEXT_ENCODER: f"{_HUB}/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/text_encoders/{TEXT_ENCODER}",
    **{name: f"{_HUB}/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/vae/{name}" for name in VAES.values()},
}
# What is typed where a student's record does not say: Wan's own steps and shift at small sizes
STEPS, SHIFT = 50, 5.0


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


@dataclass(frozen=True)
class Node:
    """One node: its class in ComfyUI, what is typed in it, and which output of which node goes to which of its inputs.

    Attributes:
        links: by the name of the input: its type and the class of the node that it comes from.
        unseen: widgets that only the editor has, by the widget after which they stand.
    """

    kind: str
    position: tuple[int, int]
    widgets: dict[str, Any] = field(default_factory=dict)
    links: dict[str, tuple[str, str]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    unseen: dict[str, Any] = field(default_factory=dict)
    directory: str | None = None


def nodes(workflow: Workflow) -> list[Node]:
    """Return the nodes; cfg 1 asks for no negative prompt, so that the positive one stands in its place."""
    size = {"width": workflow.size.width, "height": workflow.size.height, "length": 1, "batch_size": 1}
    sampling = {
        "steps": workflow.steps,
        "cfg": 1.0,
        "sampler_name": workflow.sampler,
        "scheduler": "simple",
        "denoise": 1.0,
    }
    model = {"unet_name": workflow.file, "weight_dtype": "default"}
    text = {"clip_name": TEXT_ENCODER, "type": "wan", "device": "default"}
    is_large = workflow.num_channels == 48
    latents = "Wan22ImageToVideoLatent" if is_large else "EmptyHunyuanLatentVideo"
    conditions = {name: ("CONDITIONING", "CLIPTextEncode") for name in ("positive", "negative")}
    drawn_with = {"model": ("MODEL", "ModelSamplingSD3"), **conditions, "latent_image": ("LATENT", latents)}
    decoded = {"samples": ("LATENT", "KSampler"), "vae": ("VAE", "VAELoader")}
    return [
        Node("UNETLoader", (0, 0), model, outputs=("MODEL",)),
        Node("CLIPLoader", (0, 150), text, outputs=("CLIP",), directory="text_encoders"),
        Node("VAELoader", (0, 320), {"vae_name": VAES[workflow.num_channels]}, outputs=("VAE",), directory="vae"),
        Node("ModelSamplingSD3", (380, 0), {"shift": workflow.shift}, {"model": ("MODEL", "UNETLoader")}, ("MODEL",)),
        Node("CLIPTextEncode", (380, 150), {"text": workflow.prompt}, {"clip": ("CLIP", "CLIPLoader")}, ("CONDITIONING",)),
        Node(latents, (380, 400), size, {"vae": ("VAE", "VAELoader")} if is_large else {}, ("LATENT",)),
        Node(
            "KSampler",
            (820, 0),
            {"seed": workflow.seed, **sampling},
            drawn_with,
            ("LATENT",),
            unseen={"seed": "fixed"},  # control_after_generate
        ),
        Node("VAEDecode", (1180, 0), {}, decoded, ("IMAGE",)),
        Node("SaveImage", (1180, 160), {"filename_prefix": "wandistiller"}, {"images": ("IMAGE", "VAEDecode")}),
    ]  # fmt: skip


def api_workflow(workflow: Workflow) -> dict[str, dict[str, Any]]:
    """Return the workflow as POST /prompt takes it: nodes by number."""
    listed = nodes(workflow)
    numbers = {node.kind: str(number) for number, node in enumerate(listed, start=1)}
    return {
        numbers[node.kind]: {
            "class_type": node.kind,
            "inputs": {**node.widgets, **{name: [numbers[source], 0] for name, (_, source) in node.links.items()}},
        }
        for node in listed
    }


def ui_workflow(workflow: Workflow) -> dict[str, Any]:
    """Return the workflow as ComfyUI's editor saves one, to be opened or dropped there."""
    listed = nodes(workflow)
    numbers = {node.kind: number for number, node in enumerate(listed, start=1)}
    # A link is its number, the node and slot that it comes from, those that it goes to, and its type:
    links = [
        [0, numbers[source], 0, numbers[node.kind], slot, kind]
        for node in listed
        for slot, (kind, source) in enumerate(node.links.values())
    ]
    for number, link in enumerate(links, start=1):
        link[0] = number
    return {
        "last_node_id": len(listed),
        "last_link_id": len(links),
        "nodes": [_drawn(node, number, links) for number, node in enumerate(listed, start=1)],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _drawn(node: Node, number: int, links: list[list]) -> dict[str, Any]:
    """Return a node as the editor saves it."""
    arriving = {link[4]: link[0] for link in links if link[3] == number}
    leaving = [link[0] for link in links if link[1] == number]
    values: list[Any] = []
    for name, value in node.widgets.items():
        values += [value, *([node.unseen[name]] if name in node.unseen else [])]
    properties: dict[str, Any] = {"Node name for S&R": node.kind}
    if node.directory:
        name = values[0]
        properties["models"] = [{"name": name, "url": _URLS[name], "directory": node.directory}]
    return {
        "id": number,
        "type": node.kind,
        "pos": list(node.position),
        "size": [340, 200]
        if node.kind == "CLIPTextEncode"
        else [320, max(60, 40 + 26 * max(len(values), len(arriving)))],
        "flags": {},
        "order": number - 1,
        "mode": 0,
        "inputs": [
            {"name": name, "type": kind, "link": arriving[slot]}
            for slot, (name, (kind, _)) in enumerate(node.links.items())
        ],
        "outputs": [{"name": kind, "type": kind, "links": leaving, "slot_index": 0} for kind in node.outputs],
        "properties": properties,
        "widgets_values": values,
    }
