"""Draw what you type with a trained student, and with its teacher beside it, in a page of the browser.

    python playground.py --student outputs/demo

It needs Gradio (`pip install ".[playground]"`). It listens on this machine alone unless --host says otherwise.
"""

import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.flags import ComputeFlags, TeacherFlags, flag, group, number, parse_flags, path
from wandistiller.model.config import CONFIG_NAME
from wandistiller.model.image_sizes import ImageSize
from wandistiller.prompts.prompts import unusable
from wandistiller.students.drawing import check_picture_size, untrained_warnings
from wandistiller.students.record import StudentRecord, load_student_config, trained_sizes

if TYPE_CHECKING:
    import numpy as np
    from starlette.requests import Request
    from starlette.responses import Response

    from wandistiller.evaluation.pair import Artist, Pair

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_SEED = 2**62
# The browser is told to load nothing from elsewhere.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)


@group()
class Flags(TeacherFlags, ComputeFlags):
    """The flags of this command, as `--help` describes them."""

    student: str | None = flag("folder of a trained student (left out: the newest one of --outputs)", type=path)
    outputs: str = flag("folder that holds folders of trained students", "outputs", type=path)
    prompt_cache: str = flag("folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)
    host: str = flag("address to listen on; 0.0.0.0 lets everyone in who reaches this machine", "127.0.0.1")
    port: int | None = flag("port to listen on (the first free one from 7860 on)", type=number(int, low=1, high=65535))


class Studio:
    """Draws with a student, and with its teacher, which is loaded the first time it is asked for."""

    def __init__(self, pair: "Pair"):
        self.pair = pair
        self.artists: dict[str, Artist] = {}
        self.is_drawing = False

    def draw(self, who: str, prompt: str, seed: int, size: ImageSize) -> "np.ndarray":
        """Return the picture (H, W, 3) uint8 of a prompt; what is no prompt, seed or size is refused."""
        pair = self.pair
        if reason := unusable(prompt):
            raise UserError(f"the prompt {reason}; write what to draw")
        if not 0 <= seed <= MAX_SEED:
            raise UserError(f"seed is {seed}; allowed: 0 to {MAX_SEED}")
        check_picture_size((size.height, size.width), pair.config, pair.config.patch_size or 1, ("height", "width"))
        embeds, negative = pair.embed([prompt])
        if who not in self.artists:
            self.artists[who] = pair.artist(who, negative=negative if who == "teacher" else None)
        self.is_drawing = True
        try:
            return self.artists[who].draw(embeds, [0], [seed], pair.settings.latent_shape(pair.config, size))[0]
        finally:
            self.is_drawing = False


def build_page(studio: Studio) -> Any:
    """Return the page: what to draw, and the two pictures."""
    import gradio

    config = studio.pair.config
    record, own = StudentRecord.of(config), trained_sizes(config)[0]

    def draw(prompt: str, seed: float, width: float, height: float, with_teacher: bool) -> list:
        if None in (seed, width, height):
            raise gradio.Error("give seed, width and height", print_exception=False)
        size = ImageSize(int(width), int(height))
        for warning in untrained_warnings(config, record.steps or 1, (size.height, size.width)):
            gradio.Warning(warning)
        try:
            return [
                studio.draw(who, prompt, int(seed), size) if who == "student" or with_teacher else None
                for who in ("student", "teacher")
            ]
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return gradio.Interface(
        draw,
        [
            gradio.Textbox(label="Prompt"),
            gradio.Number(0, label="Seed", precision=0),
            gradio.Number(own.width, label="Width", precision=0),
            gradio.Number(own.height, label="Height", precision=0),
            gradio.Checkbox(label="Teacher too", info="takes memory and time"),
        ],
        [
            gradio.Image(label=f"student, {record.steps} steps", format="png"),
            gradio.Image(label=f"teacher, {record.num_inference_steps} steps", format="png"),
        ],
        title="WanDistiller playground",
        flagging_mode="never",
        analytics_enabled=False,
        api_name="draw",
        concurrency_limit=1,
    )


def newest_student(outputs: str) -> str:
    """Return the folder of the student that was saved last."""
    configs = sorted(Path(outputs).glob(f"*/{CONFIG_NAME}"), key=lambda file: file.stat().st_mtime)
    if not configs:
        raise UserError(f"--outputs {outputs}: holds no folder of a trained student; give --student")
    return str(configs[-1].parent)


async def own_page_only(request: "Request", answer: Any) -> "Response":
    """Answer the page alone and take no upload.

    A browser sends along which page a request comes from (Origin), and any page may send a simple POST to this machine.
    """
    from starlette.responses import PlainTextResponse

    origin = request.headers.get("origin")
    is_foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if is_foreign or "/upload" in request.url.path:  # refused without reading what it sends
        text = "the playground answers its own page alone"
        return PlainTextResponse(text, status_code=403, headers={"connection": "close"})
    response = await answer(request)
    response.headers["content-security-policy"] = POLICY
    return response


def guards(host: str) -> dict[str, Any]:
    """Return what the server asks before it answers. A name that somebody lets lead here (DNS rebinding) is told by the Host."""
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK) if host in LOOPBACK else ["*"])
    origins = Middleware(BaseHTTPMiddleware, dispatch=own_page_only)
    return {"middleware": [hosts, origins], "docs_url": None, "redoc_url": None}


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    about = "Draw what you type with a student and its teacher, in a page of the browser; Ctrl-C ends it."
    flags = parse_flags(Flags, "playground.py", about, argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError('playground.py needs Gradio, which is not installed: pip install ".[playground]"')
    student = flags.student or newest_student(flags.outputs)
    load_student_config(student)
    with tempfile.TemporaryDirectory(prefix="playground-") as scratch:
        # Gradio reads these as it is imported: no telemetry, and a folder of its own for what it writes.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": scratch}
        import gradio

        from wandistiller.evaluation.pair import Pair

        studio = Studio(Pair(student, flags, flags, flags.prompt_cache))
        page = build_page(studio)
        # System fonts, since Gradio's own come from another server:
        theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        options = {"server_name": flags.host, "server_port": flags.port, "share": False, "theme": theme, "quiet": True}
        options |= {"allowed_paths": [], "app_kwargs": guards(flags.host)}
        try:
            _, url, _ = page.launch(**options, prevent_thread_lock=True)
        except OSError as error:  # a port that is taken, or an address that is not here
            raise UserError(f"--host {flags.host} --port {flags.port}: cannot listen there ({error})") from None
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the scratch folder goes then too
        print(f"Open {url} in a browser; Ctrl-C ends it", flush=True)
        if flags.host not in LOOPBACK:
            print("Warning: everyone who reaches this machine at that address can draw with it, without a password")
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
    if studio.is_drawing:  # its thread would be waited for, and a drawing may take hours
        sys.stdout.flush()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
