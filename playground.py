"""Draw what you type with a trained student, and with its teacher beside it, in a page of the browser.

    python playground.py --outputs outputs
    python playground.py --student outputs/demo

It needs Gradio (`pip install ".[playground]"`). It listens on this machine alone unless --host says otherwise.
"""

import importlib.util
import sys
import tempfile
from dataclasses import dataclass, fields

from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.flags import FlagParser, add_teacher_flags, number, path


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this command, as `--help` describes them; None leaves a value to the student's record."""

    outputs: str | None
    student: str | None
    teacher_path: str | None
    teacher_path_low: str | None
    teacher_lora: list[tuple[str, float]] | None
    teacher_lora_low: list[tuple[str, float]] | None
    text_encoder_path: str | None
    vae_path: str | None
    prompt_cache: str
    device: str | None
    dtype: str | None
    host: str
    port: int | None


def parse_args(argv: list[str] | None = None) -> Flags:
    parser = FlagParser(
        "playground.py",
        "Draw what you type with a student and its teacher, in a page of the browser. Flags are accepted with underscores or "
        "hyphens.",
        "Exit codes: 0 ended by Ctrl-C, 2 a mistake in flags, config or files, 1 anything else.",
    )
    model = parser.group("Model")
    model.flag("--outputs", "folder that holds folders of trained students", "outputs", type=path)
    model.flag("--student", "folder of a trained student, which is shown first", type=path)
    add_teacher_flags(model)
    model.flag("--prompt_cache", "folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)

    performance = parser.group("Performance")
    performance.flag("--device", "cpu, cuda, cuda:1, ... (cuda if there is one)")
    performance.flag("--dtype", "of matrix products (bf16 on cuda, else fp32)", choices=["fp32", "bf16"])

    page = parser.group("Page")
    page.flag("--host", "address to listen on; 0.0.0.0 lets everyone in who reaches this machine", "127.0.0.1")
    page.flag("--port", "port to listen on (the first free one from 7860 on)", type=number(int, low=1, high=65535))
    return Flags(**vars(parser.parse(argv)))


def require_gradio() -> None:
    """Refuse an installation without the extra, before anything heavy loads."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError('playground.py needs Gradio, which is not installed: pip install ".[playground]"')


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    flags = parse_args(argv)
    require_gradio()
    from wandistiller.reports.studio import Studio, StudioOptions, find_students

    students = find_students(flags.outputs, flags.student)

    from wandistiller.reports.playground_page import build_page, launch_options, prepare_gradio

    options = {field.name: getattr(flags, field.name) for field in fields(StudioOptions)}
    with tempfile.TemporaryDirectory(prefix="playground-") as scratch:
        prepare_gradio(scratch)
        page = build_page(Studio(students, StudioOptions(**options)))
        try:
            _, url, _ = page.launch(**launch_options(flags.host, flags.port), prevent_thread_lock=True)
        except (
            OSError
        ) as error:  # Gradio's word for a port that is taken, and the system's for an address that is not here
            raise UserError(f"--host {flags.host} --port {flags.port}: cannot listen there ({error})") from None
        print(f"{len(students)} students: {', '.join(students)}\nOpen {url} in a browser; Ctrl-C ends it", flush=True)
        if flags.host not in ("127.0.0.1", "localhost", "::1"):
            print("Warning: everyone who reaches this machine at that address can draw with it, without a password")
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
