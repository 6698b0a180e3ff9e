"""Draw what you type with a trained student, and with its teacher beside it, in a page of the browser.

    python playground.py --outputs outputs
    python playground.py --student outputs/demo

It needs Gradio (`pip install ".[playground]"`). It listens on this machine alone unless --host says otherwise.
"""

import importlib.util
import os
import signal
import sys
import tempfile
from dataclasses import dataclass

from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.flags import ComputeFlags, TeacherFlags, flag, group, number, parse_flags, path


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this command, as `--help` describes them."""

    outputs: str | None = flag("folder that holds folders of trained students", "outputs", type=path)
    student: str | None = flag("folder of a trained student, which is shown first", type=path)
    prompt_cache: str = flag("folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)
    host: str = flag("address to listen on; 0.0.0.0 lets everyone in who reaches this machine", "127.0.0.1")
    port: int | None = flag("port to listen on (the first free one from 7860 on)", type=number(int, low=1, high=65535))
    teacher: TeacherFlags = group("Teacher (left out: as the student records)")
    compute: ComputeFlags = group("Performance")


def parse_args(argv: list[str] | None = None) -> Flags:
    about = "Draw what you type with a student and its teacher, in a page of the browser; Ctrl-C ends it."
    return parse_flags(Flags, "playground.py", about, argv)


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    flags = parse_args(argv)
    if importlib.util.find_spec("gradio") is None:
        raise UserError('playground.py needs Gradio, which is not installed: pip install ".[playground]"')
    from wandistiller.reports.studio import Studio, find_students

    students = find_students(flags.outputs, flags.student)

    from wandistiller.reports.playground_page import LOOPBACK, build_page, launch_options, prepare_gradio

    host, port = flags.host, flags.port
    with tempfile.TemporaryDirectory(prefix="playground-") as scratch:
        prepare_gradio(scratch)
        studio = Studio(students, flags.teacher, flags.compute, flags.prompt_cache)
        page = build_page(studio)
        try:
            _, url, _ = page.launch(**launch_options(host, port), prevent_thread_lock=True)
        except OSError as error:  # a port that is taken, or an address that is not here
            raise UserError(f"--host {host} --port {port}: cannot listen there ({error})") from None
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the scratch folder goes then too
        print(f"{len(students)} students: {', '.join(students)}\nOpen {url} in a browser; Ctrl-C ends it", flush=True)
        if host not in LOOPBACK:
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
