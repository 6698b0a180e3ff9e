"""A command in a process of its own, forked from this one, with bounds on its memory and its time."""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wandistiller.command_line import run_command

MORE_BYTES = 3 * 2**30  # of address space, beside what this process has already
LONGEST_S = 25.0
LONGEST_CPU_S = 20


@dataclass(frozen=True)
class Ended:
    """How a forked command ended: its exit code, or minus the signal that ended it; None where it had to be ended."""

    code: int | None
    out: str
    err: str
    seconds: float


def run_forked(main: Callable[[list[str]], int | None], argv: list[object], log: Path) -> Ended:
    """Run a command's main in a fork; `log` is a folder for what it prints."""
    start = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_the_command(main, [str(word) for word in argv], log)
    code = _wait(child, start)
    texts = [(log / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
    return Ended(code, *texts, time.monotonic() - start)


def _be_the_command(main: Callable[[list[str]], int | None], argv: list[str], log: Path) -> None:
    code = 99
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))  # noqa: SIM115
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MORE_BYTES, size + MORE_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST_CPU_S, LONGEST_CPU_S))
        try:
            code = run_command(lambda: main(argv))
        except SystemExit as stop:  # argparse's way out
            code = stop.code if isinstance(stop.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _wait(child: int, start: float) -> int | None:
    while time.monotonic() - start < LONGEST_S:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
