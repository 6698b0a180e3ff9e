"""The page of playground.py, in Gradio: a studio's students, what to draw, the pictures, and what was drawn before.

    build_page(studio).launch(**launch_options("127.0.0.1", 7860))

Pictures reach the browser inside the page, so that no file is served; nothing is taken in but what the page asks, and the browser is
told to load nothing from elsewhere.
"""

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from wandistiller.errors import UserError
from wandistiller.reports.studio import Answer, Picture, Request, Studio, told_record
from wandistiller.students.record import StudentRecord, trained_sizes

if TYPE_CHECKING:
    import gradio

PAGE = Path(__file__).with_name("page")
MAX_HISTORY, MAX_HISTORY_BYTES = 20, 200e6
SMALL_SIDE = 128  # pixels up to which a picture is shown larger than it is
NOTHING_YET = '<p class="empty">Type a prompt and press Draw.</p>'
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def prepare_gradio(scratch: str) -> None:
    """Set what Gradio reads as it is imported: no telemetry, and a folder of its own for what it writes."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = scratch


class History:
    """What was drawn in this window, the newest first; the oldest leave where there are many or they are large."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Answer]] = []
        self.count = 0

    def add(self, answer: Answer) -> None:
        self.count += 1
        self.entries.insert(0, (f"{self.count}: {settings_text(answer)}", answer))
        while len(self.entries) > 1 and (
            len(self.entries) > MAX_HISTORY or sum(_size(kept) for _, kept in self.entries) > MAX_HISTORY_BYTES
        ):
            self.entries.pop()

    @property
    def labels(self) -> list[str]:
        return [label for label, _ in self.entries]

    def find(self, label: str | None) -> Answer | None:
        return dict(self.entries).get(label or "")


def _size(answer: Answer) -> int:
    return sum(len(picture.png) for row in answer.rows for picture in row.pictures)


def settings_text(answer: Answer) -> str:
    """Return what was asked for, in one line."""
    asked, (height, width) = answer.request, answer.size
    last = asked.seed + asked.num_noises - 1
    seeds = f"seed {asked.seed}" if asked.num_noises == 1 else f"seeds {asked.seed} to {last}"
    steps = f"{answer.rows[-1].steps} steps"
    teacher = ", with the teacher" if asked.with_teacher else ""
    prompt = asked.prompt if len(asked.prompt) <= 80 else f"{asked.prompt[:77]}..."
    return f"{prompt} | {asked.student}, {seeds}, {steps}, {width} x {height}{teacher}"


def answer_html(answer: Answer) -> str:
    """Return the pictures of an answer as HTML, with everything that was typed escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def uri(picture: Picture) -> str:
        return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"

    page = Environment(loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined)
    return page.get_template("answer.html").render(answer=answer, uri=uri, small=max(answer.size) <= SMALL_SIDE)


def message_html(sentences: Sequence[str], is_error: bool = False) -> str:
    """Return sentences to be read, which a screen reader reads out; nothing for none."""
    if not sentences:
        return ""
    kind, role = (" error", "alert") if is_error else ("", "status")
    return (
        f'<div class="message{kind}" role="{role}">'
        + "".join(f"<p>{escape(text)}</p>" for text in sentences)
        + "</div>"
    )


def read_request(student: str, prompt: str, numbers: Sequence[float | None], with_teacher: bool) -> Request:
    """Return what was typed as a request.

    Args:
        numbers: seed, noises, steps, width and height; an empty field is None.
    """
    names = ("seed", "number of noises", "number of steps", "width", "height")
    for name, number in zip(names, numbers, strict=True):
        if number is not None and number != int(number):
            raise UserError(f"The {name} is {number:g}; give a whole number.")
    seed, noises, steps, width, height = (None if number is None else int(number) for number in numbers)
    for name, number in (("width", width), ("height", height)):
        if number is not None and number < 1:
            raise UserError(f"The {name} is {number}; give a number of pixels above 0.")
    return Request(
        student=student,
        prompt=prompt or "",
        seed=seed or 0,
        num_noises=1 if noises is None else noises,
        steps=steps,
        width=width,
        height=height,
        with_teacher=with_teacher,
    )


def build_page(studio: Studio) -> "gradio.Blocks":
    """Return the page of a studio's students."""
    import gradio

    names = list(studio.folders)
    with gradio.Blocks(title="WanDistiller playground", analytics_enabled=False) as page:
        gradio.Markdown("# Playground\nTeacher and student draw the same prompt from the same noise.")
        history = gradio.State(History)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                student = gradio.Dropdown(names, value=names[0], label="Student", interactive=True, elem_id="student")
                prompt = gradio.Textbox(
                    label="Prompt", lines=1, max_lines=6, placeholder="what to draw; Enter draws", elem_id="prompt"
                )
                with gradio.Row():
                    seed = _number("Seed", "seed", 0)
                    noises = _number("Noises", "noises", 1)
                    steps = _number("Steps", "steps")
                with gradio.Row():
                    width, height = _number("Width", "width"), _number("Height", "height")
                teacher = gradio.Checkbox(
                    label="Teacher too", info="loads it the first time, which takes memory and time", elem_id="teacher"
                )
                button = gradio.Button("Draw", variant="primary", elem_id="draw")
            with gradio.Column(scale=5, min_width=300):
                message = gradio.HTML("", elem_id="message", padding=False)
                pictures = gradio.HTML(NOTHING_YET, elem_id="pictures", padding=False)
                past = gradio.Radio(
                    [], label="Drawn before; choosing one brings it back", visible=False, elem_id="past"
                )
                with gradio.Accordion("About this student", open=False):
                    record = gradio.Markdown(elem_id="record")
        settings = [student, prompt, seed, noises, steps, width, height, teacher]
        _connect(studio, page, (settings, [message, pictures, history, past], record, button))
    return page


def _number(label: str, name: str, value: int | None = None):
    import gradio

    # The bounds are checked where a request is drawn, in a sentence; Gradio's own answer to a wrong number is none.
    return gradio.Number(label=label, value=value, min_width=80, elem_id=name)


def _connect(studio: Studio, page: "gradio.Blocks", parts: tuple) -> None:
    """Say what happens when something on the page is used."""
    import gradio

    settings, shown_parts, record, button = parts
    student, prompt, *_, steps, width, height, _ = settings
    message, pictures, history, past = shown_parts

    def draw(name, text, *rest):
        *numbers, with_teacher, drawn = rest
        try:
            answer = studio.draw(read_request(name, text, numbers, with_teacher))
        except UserError as error:
            return message_html([shown_sentence(error)], is_error=True), gradio.skip(), drawn, gradio.skip()
        drawn.add(answer)
        choices = gradio.update(choices=drawn.labels, value=drawn.labels[0], visible=True)
        return message_html(answer.notes), answer_html(answer), drawn, choices

    def choose(name):
        try:
            config = studio.config(name)
            told = told_record(studio.folders[name])
        except UserError as error:
            return message_html([shown_sentence(error)], is_error=True), "", None, None, None
        own = trained_sizes(config)[0]
        return "", told, StudentRecord.of(config).steps, own.width, own.height

    def bring_back(label, drawn):
        answer = drawn.find(label)
        if answer is None:
            return [gradio.skip()] * (2 + len(settings))
        asked, (tall, wide) = answer.request, answer.size
        values = [asked.student, asked.prompt, asked.seed, asked.num_noises]
        values += [answer.rows[-1].steps, wide, tall, asked.with_teacher]
        return [message_html(answer.notes), answer_html(answer), *values]

    private: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "studio"}
    for event in (button.click, prompt.submit):
        event(draw, [*settings, history], shown_parts, show_progress_on=[pictures], trigger_mode="once", **private)
    chosen = [message, record, steps, width, height]
    page.load(choose, [student], chosen, show_progress="hidden", **private)
    student.input(choose, [student], chosen, show_progress="hidden", **private)
    past.input(bring_back, [past, history], [message, pictures, *settings], show_progress="hidden", **private)


def shown_sentence(error: UserError) -> str:
    """Return an error as a sentence of the page."""
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def launch_options(host: str, port: int | None) -> dict[str, Any]:
    """Return what Gradio is started with: this machine alone unless `host` says otherwise, no file, no other server, no share."""
    import gradio
    from starlette.middleware import Middleware

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
        "app_kwargs": {"middleware": [Middleware(OwnPageOnly, host=host)], "docs_url": None, "redoc_url": None},
        "theme": gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css": (PAGE / "playground.css").read_text(encoding="utf-8"),
    }


class OwnPageOnly:
    """ASGI middleware that answers the page alone, takes no upload, and tells the browser to load nothing from elsewhere.

    A browser sends along which page a request comes from (Origin), and any page may send a simple POST to this machine. A name
    that somebody lets lead to this machine (DNS rebinding) is told from ours by the Host.
    """

    def __init__(self, app, host: str):
        self.app, self.host = app, host

    def refuses(self, scope) -> bool:
        """Return whether a request is an upload, or was made by another page than ours."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        is_foreign_host = self.host in LOOPBACK and urlsplit(f"//{host}").hostname not in LOOPBACK
        is_foreign_page = origin is not None and urlsplit(origin).netloc != host
        return is_foreign_host or is_foreign_page or "/upload" in scope["path"]

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        if scope["type"] != "http":
            return await (self.app(scope, receive, send) if scope["type"] == "lifespan" else _refuse_socket(send))
        if self.refuses(scope):  # without reading what it sends
            await send({"type": "http.response.start", "status": 403, "headers": [(b"connection", b"close")]})
            return await send({"type": "http.response.body", "body": b"the playground answers its own page alone"})
        return await self.app(scope, receive, with_policy)


async def _refuse_socket(send) -> None:
    await send({"type": "websocket.close", "code": 1008})  # Gradio's page uses none
