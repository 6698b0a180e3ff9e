"""A node for ComfyUI that stands in for text encoder and VAE: `tools/check_comfyui.py` copies it into the folder it starts with.

It hands out text embeddings that were computed elsewhere, as ComfyUI's own text encoder of Wan gives them, with zeros after a
prompt's last token.
"""

from safetensors.torch import load_file


class WanDistillerCheck:
    """Text embeddings from a file, and nothing in place of a VAE."""

    RETURN_TYPES = ("CONDITIONING", "VAE")
    FUNCTION = "read"
    CATEGORY = "wandistiller"

    @classmethod
    def INPUT_TYPES(cls):
        """Say that the node takes the path of a safetensors file that holds `prompt_embeds`."""
        return {"required": {"path": ("STRING", {"default": ""})}}

    def read(self, path):
        """Return the embeddings in the form that samplers take."""
        return [[load_file(path)["prompt_embeds"], {}]], None


NODE_CLASS_MAPPINGS = {"WanDistillerCheck": WanDistillerCheck}
