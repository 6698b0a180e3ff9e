"""Work in forks of this process, which spares them the seconds that loading torch takes."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch

from wandistiller.command_line import run_command


def run_and_exit(work: Callable[[], int], out: int, err: int | None = None) -> NoReturn:
    """End this process with what `work` returns; what it prints goes to an open file or pipe, or to two."""
    for number, descriptor in ((1, out), (2, out if err is None else err)):
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False, encoding="utf-8") for number in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    code = 99
    try:
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def exit_code(main: Callable[[list[str]], int | None], argv: list[object], **options: bool) -> int:
    """Run a command's main in this process, as its `if __name__` does; return its exit code."""
    try:
        return run_command(lambda: main([str(word) for word in argv]), **options)
    except SystemExit as stop:  # argparse's way out
        return stop.code if isinstance(stop.code, int) else 1


def fork(target: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    """Start a fork that calls `target`."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process
