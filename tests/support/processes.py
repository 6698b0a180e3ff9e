"""Work in a fork of this process, which spares it the seconds that loading torch takes."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch


def run_and_exit(work: Callable[[], int], descriptor: int) -> NoReturn:
    """End this process with what `work` returns; what it prints goes to an open file or pipe."""
    for number in (1, 2):
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


def fork(target: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    """Start a fork that calls `target`."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process
