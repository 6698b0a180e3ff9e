"""What tools/check_comfyui.py asks of a ComfyUI: its command line, and as much of its HTTP API as a workflow needs.

It draws no better than a student whose velocity is 0 everywhere: the noise of the seed stays as it is. SHIFTED adds that to every
latent, so that the error is known; REFUSED is what it answers to every workflow, and DEAD ends it at once.
"""

import argparse
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--cpu", action="store_true", required=True)
parser.add_argument("--listen", required=True)
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--base-directory", type=Path, required=True)
parser.add_argument("--disable-auto-launch", action="store_true")
parser.add_argument("--disable-api-nodes", action="store_true")
parser.add_argument("--database-url")
HISTORY: dict[str, dict] = {}


def draw(base: Path, workflow: dict) -> dict:
    """Return the history of a workflow: what its SaveLatent wrote, or why it could not be run."""
    import torch
    from safetensors.torch import load_file, save_file

    from wandistiller.wan.settings import RELEASED_LATENTS

    nodes = {node["class_type"]: node["inputs"] for node in workflow.values()}
    if "CLIPLoader" in nodes:
        about = {"node_type": "CLIPLoader", "exception_type": "RuntimeError", "exception_message": "an empty file\n"}
        return {"status": {"status_str": "error", "messages": [["execution_error", about]]}, "outputs": {}}
    weights = load_file(base / "models" / "diffusion_models" / nodes["UNETLoader"]["unet_name"])
    channels = weights["patch_embedding.weight"].shape[1]
    factor = {16: 8, 48: 16}[channels]
    latents = nodes["Wan22ImageToVideoLatent" if channels == 48 else "EmptyHunyuanLatentVideo"]
    assert load_file(nodes["WanDistillerCheck"]["path"])["prompt_embeds"].shape[1] == 512
    sampler = nodes["KSampler"]
    assert (sampler["cfg"], sampler["denoise"], sampler["scheduler"]) == (1.0, 1.0, "simple")
    generator = torch.Generator().manual_seed(sampler["seed"])
    noise = torch.randn(
        1, channels, latents["length"], latents["height"] // factor, latents["width"] // factor, generator=generator
    )
    noise += float(os.environ.get("SHIFTED", "0"))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in RELEASED_LATENTS[channels])
    name = f"{nodes['SaveLatent']['filename_prefix']}_00001_.latent"
    save_file({"latent_tensor": noise * std + mean}, base / "output" / name)
    number = next(number for number, node in workflow.items() if node["class_type"] == "SaveLatent")
    saved = {"latents": [{"filename": name, "subfolder": "", "type": "output"}]}
    return {"status": {"status_str": "success", "messages": []}, "outputs": {number: saved}}


class Handler(BaseHTTPRequestHandler):
    """GET /system_stats and /history/ID, and POST /prompt."""

    def do_GET(self):
        if self.path == "/system_stats":
            return self.reply(200, {"system": {"comfyui_version": "stand-in", "pytorch_version": "none"}})
        known = self.path.rsplit("/", 1)[1]
        return self.reply(200, {known: HISTORY[known]} if known in HISTORY else {})

    def do_POST(self):
        if refused := os.environ.get("REFUSED"):
            errors = [{"message": refused, "details": "unet_name"}]
            node_errors = {"1": {"class_type": "UNETLoader", "errors": errors}}
            return self.reply(
                400, {"error": {"message": "Prompt outputs failed validation"}, "node_errors": node_errors}
            )
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = str(len(HISTORY))
        HISTORY[number] = draw(args.base_directory, body["prompt"])
        return self.reply(200, {"prompt_id": number})

    def reply(self, status: int, answer: object):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    args = parser.parse_args()
    if reason := os.environ.get("DEAD"):
        sys.exit(reason)
    assert (args.base_directory / "custom_nodes" / "wandistiller_check.py").is_file()
    if record := os.environ.get("PROCESS"):
        Path(record).write_text(str(os.getpid()))
    ThreadingHTTPServer((args.listen, args.port), Handler).serve_forever()
