"""Hold a ComfyUI against this code: its own nodes load exported students, and its own KSampler draws with them on a CPU.

    python tools/check_comfyui.py ~/ComfyUI --python ~/ComfyUI/venv/bin/python --output comfyui_check

ComfyUI is started from its folder on a port of 127.0.0.1 with all that it reads and writes in a temporary folder, and is ended
again. A node of this repository hands the text embeddings over. Compared are latents, relative to those that are sampled here from the same noise;
the last line is one JSON document. Without --student these are drawn with: the demo teacher in its own shape, and two students of
random weights in the shape that ComfyUI takes as given, of 16 and of 48 channels.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from wandistiller.command_line import run_command
from wandistiller.errors import UserError, shortened
from wandistiller.flags import FlagParser, TeacherFlags, number

if TYPE_CHECKING:
    from torch import Tensor

    from wandistiller.model.config import StudentConfig
    from wandistiller.model.transformer import WanLiteStudent

NODE = ROOT / "tools" / "comfyui_check_node.py"
DEMO_TEACHER = ROOT / "data" / "demo_teacher"
PROMPT = "a large red circle on a white background"
SAMPLERS = ["euler", "uni_pc", "dpmpp_2m"]
DTYPES = ["fp32", "bf16", "fp8"]
RANDOM_SHAPE = {"block": "wan", "hidden_size": 256, "depth": 2, "num_heads": 2, "ffn_dim": 512, "image_size": 64}
FOLDERS = ["models/diffusion_models", "models/text_encoders", "models/vae", "custom_nodes", "input", "output", "user"]


class ComfyError(UserError):
    """ComfyUI did not start, or did not draw what it was asked to."""

    exit_code = 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the folder of ComfyUI and the flags."""
    parser = FlagParser("check_comfyui.py", __doc__.split("\n")[0])
    parser.add_argument("comfyui_folder", type=Path, help="the folder with ComfyUI's main.py")
    group = parser.group("ComfyUI")
    group.flag("--python", "the interpreter that has what ComfyUI requires (this one)", sys.executable)
    group.flag("--start_timeout", "seconds until it must answer", 300, type=number(int, low=1))
    group = parser.group("What is drawn")
    group.flag("--student", "folder of a trained student, in place of those that need none", type=Path)
    group.flag("--prompt", "for a student whose text encoder is here", PROMPT)
    group.flag("--num_inference_steps", "(as recorded)", type=number(int, low=1, high=1000))
    group.flag("--seed", "of the noise", 0, type=number(int, low=0))
    parser.group("Output").flag("--output", "a folder for the pictures, where a VAE is here", type=Path)
    return parser.parse(argv)


# ---- a ComfyUI that runs ----


@dataclass(frozen=True)
class Server:
    """A running ComfyUI.

    Attributes:
        base: the folder of its models, nodes, and of what it writes.
    """

    address: str
    base: Path
    process: subprocess.Popen
    log: Path

    def ask(self, path: str, body: object = None) -> Any:
        """Return what the server answers to a GET, or to a POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:  # nosec B310
            return json.load(answer)

    def run(self, workflow: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
        """Run a workflow in the API's format and return its outputs by node; a refusal is a `ComfyError`."""
        try:
            prompt_id = self.ask("/prompt", {"prompt": workflow})["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ComfyError(f"the workflow is refused: {refusal(error.read().decode(errors='replace'))}") from None
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            self.check_is_alive()
            if entry := self.ask(f"/history/{prompt_id}").get(prompt_id):
                if entry["status"]["status_str"] != "success":
                    raise ComfyError(failure(entry["status"]["messages"]))
                return entry["outputs"]
            time.sleep(0.1)
        raise ComfyError(f"the workflow was not done after {timeout_s:g} s")

    def check_is_alive(self) -> None:
        """Raise where the process has ended, with the last lines that it wrote."""
        if (code := self.process.poll()) is not None:
            tail = " / ".join(self.log.read_text(errors="replace").splitlines()[-4:])
            raise ComfyError(f"ComfyUI ended with exit code {code}: {tail}")


def refusal(text: str) -> str:
    """Return what a refused workflow's answer says of it: the error, and those of its nodes."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        answer = json.loads(text)
        details = [
            f"{node['class_type']}: {error['message']} ({error['details']})"
            for node in answer["node_errors"].values()
            for error in node["errors"]
        ]
        return shortened("; ".join([answer["error"]["message"], *details]))
    return shortened(text)


def failure(messages: list) -> str:
    """Return which node failed and with which error."""
    for kind, about in messages:
        if kind == "execution_error":
            lines = str(about["exception_message"]).split("\n")
            lines = [line.strip() for line in lines if line.strip()]
            return shortened(f"{about['node_type']}: {about['exception_type']}: {' '.join(lines[:3])}")
    return "the workflow failed"


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def comfyui(folder: Path, python: str, base: Path, start_timeout: float) -> Iterator[Server]:
    """Run ComfyUI with everything that it reads and writes in `base`, and end its process, and no other, in the end."""
    if not (folder / "main.py").is_file():
        raise UserError(f"{folder}: holds no main.py; give the folder of a ComfyUI")
    for name in FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(NODE, base / "custom_nodes" / "wandistiller_check.py")
    port, log = free_port(), base / "comfyui.log"
    command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(base)]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", f"sqlite:///{base / 'comfyui.db'}"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment)
    server = Server(f"http://127.0.0.1:{port}", base, process, log)
    try:
        wait_until_it_answers(server, start_timeout)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_it_answers(server: Server, timeout_s: float) -> None:
    """Wait until the server answers; raise where it ends before, or takes too long."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        server.check_is_alive()
        with contextlib.suppress(OSError, ValueError):
            server.ask("/system_stats")
            return
        time.sleep(0.3)
    raise ComfyError(f"ComfyUI did not answer within {timeout_s:g} s; what it wrote is in {server.log}")


# ---- what both sides draw with ----


@dataclass(frozen=True)
class Case:
    """A student with what it is asked to draw.

    Attributes:
        prompt_embeds: (1, n, text_dim), text tokens alone.
        vae: None where there is none that its pictures could be decoded with.
    """

    name: str
    student: "WanLiteStudent"
    prompt_embeds: "Tensor"
    noise: "Tensor"
    shift: float
    steps: int
    vae: Any = None

    @property
    def config(self) -> "StudentConfig":
        return self.student.config


def prepare_cases(flags: argparse.Namespace) -> list[Case]:
    """Return the students to draw with: that of --student, or those that need no training."""
    if flags.student is None:
        return [demo_case(flags), *(random_case(channels, flags.seed) for channels in (16, 48))]
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.students.parts import teacher_paths
    from wandistiller.students.record import StudentRecord, load_student_config

    config = load_student_config(flags.student)
    record = StudentRecord.of(config)
    steps = flags.num_inference_steps or record.steps
    teacher = teacher_paths(config, TeacherFlags())[0]
    return [case_of(flags, WanLiteStudent.from_pretrained(flags.student), teacher, record.shift, steps)]


def demo_case(flags: argparse.Namespace) -> Case:
    """Return the demo teacher as a student of its own shape, unguided: it draws, and no run has to come first."""
    from wandistiller.projection.project import project_teacher
    from wandistiller.wan.layouts import open_wan_files
    from wandistiller.wan.settings import resolve_settings

    settings = resolve_settings(open_wan_files(DEMO_TEACHER))
    student, _ = project_teacher(DEMO_TEACHER, None)
    student.config = student.config.replace(image_size=64)
    steps = flags.num_inference_steps or settings.num_inference_steps
    return case_of(flags, student, str(DEMO_TEACHER), settings.shift, steps)


def case_of(flags: argparse.Namespace, student: "WanLiteStudent", teacher: str, shift: float, steps: int) -> Case:
    """Return a case whose text encoder and VAE are found as drawing finds them."""
    from wandistiller.students.parts import load_drawing_parts
    from wandistiller.wan.text_encoder import embed_texts

    config = student.config
    parts = load_drawing_parts(config, teacher, TeacherFlags(), "cpu")
    with tempfile.TemporaryDirectory() as cache:
        prompt_embeds = embed_texts([flags.prompt], parts.encoder, config, cache, "cpu").read(0)[None].clone()
    name = "demo teacher" if flags.student is None else flags.student.resolve().name
    return Case(name, student, prompt_embeds, comfyui_noise(config, flags.seed), shift, steps, parts.vae)


def random_case(channels: int, seed: int) -> Case:
    """Return a small student with random weights that every version reads: heads of 128 channels, text of width 4096."""
    import torch

    from wandistiller.model.config import StudentConfig
    from wandistiller.model.transformer import WanLiteStudent

    text = {"text_encoder_output_dim": 4096, "text_max_length": 512, "freq_dim": 256, "eps": 1e-6, "patch_size": 2}
    generator = torch.Generator().manual_seed(seed)
    student = WanLiteStudent(StudentConfig(**RANDOM_SHAPE | text, num_channels=channels))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            scale = 0.02 if parameter.ndim > 1 else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    prompt_embeds = 0.1 * torch.randn(1, 12, 4096, generator=generator)
    noise = comfyui_noise(student.config, seed)
    return Case(f"random, {channels} channels", student, prompt_embeds, noise, 5.0, 20)


def comfyui_noise(config: "StudentConfig", seed: int) -> "Tensor":
    """Return the noise of ComfyUI's KSampler: one draw of the whole latent video, here of one frame."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, config.num_channels, config.latent_size, config.latent_size, generator=generator)


def sample_here(case: Case, sampler: str) -> "Tensor":
    """Return the latents that this code draws: by Euler's method, or for the others by the teacher's UniPC."""
    import torch

    from wandistiller.sampling.sampler import SamplingOptions, StudentField, sample

    lengths = torch.tensor([case.prompt_embeds.shape[1]])
    options = SamplingOptions(
        shift=case.shift, num_inference_steps=case.steps, sampler="euler" if sampler == "euler" else "unipc"
    )
    return sample(StudentField(case.student.eval()), case.noise, case.prompt_embeds, lengths, options)


def euler_on_their_levels(case: Case) -> "Tensor":
    """Return Euler's latents on the noise levels of ComfyUI's scheduler "simple": every (1000 / steps)-th of a thousand."""
    import torch

    from wandistiller.sampling.flow import shift_sigma
    from wandistiller.sampling.sampler import StudentField

    levels = [1000 - int(step * 1000 / case.steps) for step in range(case.steps)]
    sigmas = [*shift_sigma(torch.tensor(levels) / 1000, case.shift), torch.tensor(0.0)]
    latents, lengths = case.noise, torch.tensor([case.prompt_embeds.shape[1]])
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            velocity = StudentField(case.student.eval()).velocity(latents, sigma[None], case.prompt_embeds, lengths)
            latents = latents + (following - sigma) * velocity
    return latents


# ---- drawing in ComfyUI ----


def write_inputs(case: Case, number: int, base: Path) -> dict[str, str]:
    """Write the student in every precision, and the text as ComfyUI gives it; return the file's name by precision."""
    import torch

    from wandistiller.files.safetensors_files import write_tensors
    from wandistiller.projection.exports import write_original_file

    names = {dtype: f"student_{number}_{dtype}.safetensors" for dtype in DTYPES}
    for dtype, name in names.items():
        tensors = {key: tensor.detach().clone() for key, tensor in case.student.state_dict().items()}
        write_original_file(tensors, case.config, base / "models" / "diffusion_models" / name, dtype)
    padded = torch.zeros(1, case.config.text_max_length, case.prompt_embeds.shape[2])
    padded[:, : case.prompt_embeds.shape[1]] = case.prompt_embeds
    write_tensors(base / "input" / f"text_{number}.safetensors", {"prompt_embeds": padded}, {})
    return names


def check_workflow(case: Case, file: str, sampler: str, seed: int, text: Path) -> dict[str, Any]:
    """Return the workflow of docs/comfyui for a student, with our node for text encoder and VAE, and latents for a picture."""
    documented = ROOT / "docs" / "comfyui" / f"wan_student_{case.config.num_channels}_channels_api.json"
    workflow = json.loads(documented.read_text(encoding="utf-8"))
    numbers = {node["class_type"]: number for number, node in workflow.items()}
    side = case.config.image_size
    settings = {"unet_name": file, "shift": case.shift, "width": side, "height": side, "seed": seed}
    settings |= {"steps": case.steps, "sampler_name": sampler}
    for node in workflow.values():
        node["inputs"] |= {name: value for name, value in settings.items() if name in node["inputs"]}
    ours = {numbers["CLIPTextEncode"]: ["text", 0], numbers["VAELoader"]: ["text", 1]}
    for kind in ("CLIPTextEncode", "CLIPLoader", "VAELoader", "VAEDecode", "SaveImage"):
        workflow.pop(numbers[kind])
    for node in workflow.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = ours.get(value[0], value)
    workflow["text"] = {"class_type": "WanDistillerCheck", "inputs": {"path": str(text)}}
    saved = {"samples": [numbers["KSampler"], 0], "filename_prefix": f"{Path(file).stem}_{sampler}"}
    return workflow | {"saved": {"class_type": "SaveLatent", "inputs": saved}}


def sample_there(server: Server, case: Case, workflow: dict[str, Any]) -> "Tensor":
    """Return the latents that ComfyUI draws, in model space: it saves them as the released VAE takes them."""
    import torch
    from safetensors.torch import load_file

    from wandistiller.wan.settings import RELEASED_LATENTS

    place = server.run(workflow)["saved"]["latents"][0]
    file = server.base / "output" / place["subfolder"] / place["filename"]
    latents = load_file(file)["latent_tensor"][:, :, 0].float()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in RELEASED_LATENTS[case.config.num_channels])
    return (latents - mean) / std


def relative_error(actual: "Tensor", expected: "Tensor") -> float:
    return float((actual - expected).norm() / expected.norm())


def compare(server: Server, case: Case, number: int, flags: argparse.Namespace) -> dict[str, Any]:
    """Draw a case in every precision and with every sampler; return the errors, or why ComfyUI refused the file."""
    text, files = server.base / "input" / f"text_{number}.safetensors", write_inputs(case, number, server.base)
    ours = {sampler: sample_here(case, sampler) for sampler in SAMPLERS}
    pictures = {f"here, {sampler}": ours[sampler] for sampler in ("euler", "uni_pc")}
    results: dict[str, Any] = {"student": case.name, "steps": case.steps, "shift": case.shift, "errors": {}}
    for dtype, sampler in [("fp32", sampler) for sampler in SAMPLERS] + [("bf16", "euler"), ("fp8", "euler")]:
        try:
            theirs = sample_there(server, case, check_workflow(case, files[dtype], sampler, flags.seed, text))
        except ComfyError as error:
            server.check_is_alive()
            return results | {"refused": str(error)}
        errors = results["errors"]
        errors[f"{dtype}, {sampler}/simple"] = relative_error(theirs, ours[sampler])
        if (dtype, sampler) == ("fp32", "euler"):
            errors["fp32, euler/simple, on its noise levels"] = relative_error(theirs, euler_on_their_levels(case))
        pictures[f"ComfyUI, {dtype}, {sampler}"] = theirs
    if case.vae is not None:
        results["levels_of_255"] = compare_pictures(case, pictures, flags.output, number)
    return results


def compare_pictures(case: Case, latents: dict[str, "Tensor"], output: Path | None, number: int) -> dict[str, float]:
    """Decode all latents with the student's own VAE; return mean differences from UniPC's here, and save the pictures."""
    import numpy as np

    from wandistiller.files.pictures import labelled_grid, save_png
    from wandistiller.wan.settings import RELEASED_LATENTS

    statistics = RELEASED_LATENTS[case.config.num_channels]
    drawn = {name: case.vae.pictures(values, *statistics)[0] for name, values in latents.items()}
    if output is not None:
        save_png(labelled_grid([list(drawn.values())], [list(drawn)]), output / f"student_{number}.png", {})
    expected = drawn.pop("here, uni_pc").astype(int)
    return {name: float(np.abs(picture.astype(int) - expected).mean()) for name, picture in drawn.items()}


def check_documented(server: Server) -> dict[str, str]:
    """Post the workflows of docs/comfyui beside empty files of the right names: its answer to each, before it loads one."""
    models, answers = server.base / "models", {}
    folders = {"unet_name": "diffusion_models", "clip_name": "text_encoders", "vae_name": "vae"}
    for file in sorted((ROOT / "docs" / "comfyui").glob("*_api.json")):
        workflow = json.loads(file.read_text(encoding="utf-8"))
        for node in workflow.values():
            for name in folders.keys() & node["inputs"].keys():
                (models / folders[name] / node["inputs"][name]).touch()
        try:
            server.run(workflow)
            answers[file.name] = "ran"
        except (
            ComfyError
        ) as error:  # an empty file is no text encoder; that it was opened says that the workflow was taken
            answers[file.name] = str(error) if str(error).startswith("the workflow is refused") else "accepted"
    return answers


def print_results(results: list[dict[str, Any]]) -> None:
    """Print a line for each error, and for each refusal."""
    for result in results:
        print(f"{result['student']}, {result['steps']} steps, shift {result['shift']:g}")
        if "refused" in result:
            print(f"  not drawn: {result['refused']}")
        for name, error in result["errors"].items():
            print(f"  {name:<45}{error:.2g}")
        for name, levels in result.get("levels_of_255", {}).items():
            print(f"  {name + ', levels of 255 from UniPC here':<55}{levels:.2f}")


def main(argv: list[str] | None = None) -> int:
    """Start ComfyUI, draw, compare and end it."""
    flags = parse_args(argv)
    if not flags.comfyui_folder.is_dir():
        raise UserError(f"{flags.comfyui_folder}: there is no such folder; give the folder of a ComfyUI")
    if flags.output is not None:
        flags.output.mkdir(parents=True, exist_ok=True)
    cases = prepare_cases(flags)
    with (
        tempfile.TemporaryDirectory(prefix="wandistiller-comfyui-", ignore_cleanup_errors=True) as base,
        comfyui(flags.comfyui_folder, flags.python, Path(base), flags.start_timeout) as server,
    ):
        about = server.ask("/system_stats")["system"]
        print(f"ComfyUI {about.get('comfyui_version')}, torch {about.get('pytorch_version')}")
        results = [compare(server, case, number, flags) for number, case in enumerate(cases)]
        documented = check_documented(server)
    print_results(results)
    print(json.dumps({"comfyui": about.get("comfyui_version"), "workflows": documented, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
