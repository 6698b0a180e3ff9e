"""Runs of several processes, started as torchrun starts them."""

import multiprocessing
import os
import socket
from pathlib import Path

import train_distillation
from support.processes import exit_code, fork, run_and_exit

FLAGS = ["--lr", 1e-3, "--ema_decay", 0.9]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_as(rank: int, count: int, nodes: int, port: int, argv: list[str], log: Path, main) -> None:
    """A process as torchrun starts it, without the seconds that loading torch anew would take."""
    own = count // nodes
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank % own), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(own),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    run_and_exit(lambda: exit_code(main, argv, many_processes=True), descriptor)


def start(
    count: int, argv: list[str], log: Path, main=train_distillation.main, nodes: int = 1
) -> list[multiprocessing.Process]:
    """Start a command in so many processes, as if on so many machines."""
    port = free_port()
    return [fork(run_as, rank, count, nodes, port, argv, log, main) for rank in range(count)]
