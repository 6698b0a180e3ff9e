"""What the commands share: their names, one-line errors, exit codes, and what torchrun tells a process (flags: flags.py).

Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted after saving, 1 anything else.
Standard library only, so that `--help` and mistakes are answered at once.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from wandistiller.errors import message_of
from wandistiller.lost_output import is_lost_output, spelt_output

# This says how long OpenMP's threads spin before they sleep, and must be set before torch loads. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) takes
# small models a third of their speed; spinning for long costs whole time slices where another job keeps a core busy.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# `wandistiller NAME`, which an installation puts on the PATH, and the script of a clone that is the same command.
COMMANDS = {
    "train": "train_distillation.py",
    "project": "projection_mapper.py",
    "preflight": "run_production_test.py",
    "generate": "generate_images.py",
    "evaluate": "evaluate_student.py",
    "export": "export_student.py",
    "encoder": "distill_text_encoder.py",
    "playground": "playground.py",
}
ONE_COMMAND = "wandistiller"
OF_MANY_PROCESSES = ("train", "encoder")  # what torchrun may start
OTHERS_WAIT_S = 5.0


def is_one_command() -> bool:
    """Return whether this process was started as `wandistiller NAME`, which `wandistiller/__main__.py` writes to sys.argv."""
    return sys.argv[0].startswith(f"{ONE_COMMAND} ")


class TorchrunEnvironment(NamedTuple):
    """Which of how many processes this one is, in the whole run and on this machine; one that torchrun did not start is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def torchrun_environment() -> TorchrunEnvironment:
    """Read what torchrun tells its processes in the environment."""
    told = {name: os.environ.get(name.upper(), "") for name in TorchrunEnvironment._fields}
    return TorchrunEnvironment(**{name: int(text) for name, text in told.items() if text.isdecimal()})


def end_process(code: int) -> None:
    """Exit; under torchrun without taking libraries' threads down one by one, in which a process whose work was done has
    been seen to abort, and torchrun then counts the whole run as failed."""
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def let_the_first_speak() -> str:
    """Return what the message of a process of a run begins with; any but the first waits, since most mistakes are all processes'.

    torchrun ends the others when the first has ended.
    """
    if not (number := torchrun_environment().local_rank):
        return ""
    time.sleep(OTHERS_WAIT_S)
    return f"process {number}: "


def run_command(main: Callable[[], int | None], *, many_processes: bool = False) -> int:
    """Run a command's main and turn what it raises into an exit code; errors that carry one are messages to a person.

    With `many_processes` torchrun may start this command; any other may find torchrun's variables in its environment too.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a prompt that a terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    with spelt_output():
        try:
            exit_code = main() or 0
            sys.stdout.flush()
            return exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if is_lost_output(error):
                return 1
            message, code = message_of(error)
            if code is None:
                traceback.print_exc()
                return 1
            print(f"{let_the_first_speak() if many_processes else ''}error: {message}", file=sys.stderr)
            return code
