"""The page of playground.py, in Gradio: a studio's students, what to draw, and the pictures.

    build_page(studio).launch(**launch_options("127.0.0.1", 7860))

Pictures reach the browser inside the page, so that no file is served; nothing is taken in but what the page asks, and the browser is
told to load nothing from elsewhere.
"""

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wandistiller.errors import UserError
from wandistiller.reports.cards import in_words
from wandistiller.reports.studio import Answer, Picture, Request, Studio
from wandistiller.students.record import StudentRecord, trained_sizes

if TYPE_CHECKING:
    import gradio
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

PAGE = Path(__file__).with_name("page")
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def prepare_gradio(scratch: str) -> None:
    """Set what Gradio reads as it is imported: no telemetry, and a folder of its own for what it writes."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = scratch


def answer_html(answer: Answer | None, error: UserError | None = None) -> str:
    """Return the pictures and notes of an answer, or an error, as HTML, with everything that was typed escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def uri(picture: Picture) -> str:
        return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"

    page = Environment(loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined)
    return page.get_template("answer.html").render(answer=answer, error=error, uri=uri)


def build_page(studio: Studio) -> "gradio.Blocks":
    """Return the page of a studio's students."""
    import gradio

    names = list(studio.folders)
    with gradio.Blocks(title="WanDistiller playground", analytics_enabled=False) as page:
        gradio.Markdown("# Playground\nTeacher and student draw the same prompt from the same noise.")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                student = gradio.Dropdown(names, value=names[0], label="Student", interactive=True, elem_id="student")
                prompt = gradio.Textbox(
                    label="Prompt", lines=1, max_lines=6, placeholder="what to draw; Enter draws", elem_id="prompt"
                )
                with gradio.Row():
                    numbers = [_number(name) for name in ("seed", "noises", "steps")]
                with gradio.Row():
                    numbers += [_number(name) for name in ("width", "height")]
                teacher = gradio.Checkbox(
                    label="Teacher too", info="loads it the first time, which takes memory and time", elem_id="teacher"
                )
                button = gradio.Button("Draw", variant="primary", elem_id="draw")
            with gradio.Column(scale=5, min_width=300):
                pictures = gradio.HTML(answer_html(None), elem_id="pictures", padding=False)
                with gradio.Accordion("About this student", open=False):
                    record = gradio.Markdown(elem_id="record")
        _connect(studio, page, [student, prompt, *numbers, teacher], button, pictures, record)
    return page


def _number(name: str):
    import gradio

    # The bounds are checked where a request is drawn, in a sentence; Gradio's own answer to a wrong number is none.
    value = {"seed": 0, "noises": 1}.get(name)
    return gradio.Number(label=name.capitalize(), value=value, precision=0, min_width=80, elem_id=name)


def _connect(studio: Studio, page: "gradio.Blocks", settings: list, button, pictures, record) -> None:
    """Say what happens when something on the page is used."""
    student, prompt, _, _, steps, width, height, _ = settings

    def draw(name, text, seed, noises, steps, width, height, with_teacher):
        given = {"seed": seed, "noises": noises, "steps": steps, "width": width, "height": height}
        typed = {field: number for field, number in given.items() if number is not None}
        try:
            answer = studio.draw(Request(student=name, prompt=text or "", with_teacher=with_teacher, **typed))
        except UserError as error:
            return answer_html(None, error)
        return answer_html(answer)

    def choose(name):
        try:
            config = studio.config(name)
        except UserError as error:
            return answer_html(None, error), "", None, None, None
        own = trained_sizes(config)[0]
        return answer_html(None), in_words(config), StudentRecord.of(config).steps, own.width, own.height

    private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "studio"}
    for event in (button.click, prompt.submit):
        event(draw, settings, pictures, show_progress_on=[pictures], trigger_mode="once", **private)
    for event in (page.load, student.input):
        event(choose, [student], [pictures, record, steps, width, height], show_progress="hidden", **private)


def launch_options(host: str, port: int | None) -> dict[str, Any]:
    """Return what Gradio is started with: this machine alone unless `host` says otherwise, no file, no other server, no share."""
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A name that somebody lets lead to this machine (DNS rebinding) is told from ours by the Host:
    hosts = list(LOOPBACK) if host in LOOPBACK else ["*"]
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
        Middleware(BaseHTTPMiddleware, dispatch=own_page_only),
    ]
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "inbrowser": False,
        "quiet": True,
        "footer_links": [],
        "run_history": False,
        "mcp_server": False,
        "ssr_mode": False,
        "pwa": False,
        "enable_monitoring": False,
        "allowed_paths": [],
        "app_kwargs": {"middleware": middleware, "docs_url": None, "redoc_url": None},
        "theme": gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css": (PAGE / "playground.css").read_text(encoding="utf-8"),
    }


async def own_page_only(request: "HttpRequest", answer) -> "Response":
    """Answer the page alone, take no upload, and tell the browser to load nothing from elsewhere.

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
