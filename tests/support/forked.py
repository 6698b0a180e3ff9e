"""A command in a process of its own, forked from this one, with bounds on its memory and its time."""

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.processes import exit_code, fork, run_and_exit

MORE_BYTES = 3 * 2**30  # of address space, beside what this process has already
LONGEST_S = 60.0
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
    start, files = time.monotonic(), [log / "out", log / "err"]

    def bounded() -> int:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MORE_BYTES, size + MORE_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (LONGEST_CPU_S, LONGEST_CPU_S))
        return exit_code(main, argv)

    printed = [os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) for file in files]
    process = fork(run_and_exit, bounded, *printed)
    for descriptor in printed:
        os.close(descriptor)
    process.join(LONGEST_S)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return Ended(None if code == -signal.SIGXCPU else code, *texts, time.monotonic() - start)
