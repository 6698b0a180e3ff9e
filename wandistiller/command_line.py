"""What the commands share: flags in both spellings, one-line errors, exit codes.

Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted after saving, 1 anything else.
Standard library only, so that `--help` and mistakes are answered at once.
"""

import argparse
import difflib
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from wandistiller.errors import place_message, shortened

# This says how long OpenMP's threads spin before they sleep, and must be set before torch loads. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) takes
# small models a third of their speed; spinning for long costs whole time slices where another job keeps a core busy.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


# These are torchrun's own flags; they come here when it is left out or another launcher is used.
LAUNCHER_FLAGS = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "rdzv_endpoint", "local_rank"}
OTHERS_WAIT_S = 5.0


class FlagGroup:
    """One titled group of flags in `--help`."""

    def __init__(self, group: argparse._ArgumentGroup):
        self._group = group

    def flag(self, name: str, help: str, default=None, **options) -> None:
        """Add a flag by its snake_case name; the help text shows its default."""
        shown = "" if default in (None, False) or options.get("required") else f" (default: {default})"
        self._group.add_argument(name, help=(help + shown).replace("%", "%%"), default=default, **options)


class FlagParser(argparse.ArgumentParser):
    """An argument parser that takes every flag with underscores or hyphens and answers mistakes in one line."""

    def __init__(self, prog: str, description: str, epilog: str | None = None):
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Also -1e-5 and -1,2 are values, to be answered as such; argparse knows -1 and -1.5 only:
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def group(self, title: str) -> FlagGroup:
        return FlagGroup(self.add_argument_group(title))

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        args, unknown = self.parse_known_args([_underscored(arg) for arg in (sys.argv[1:] if argv is None else argv)])
        if unknown:
            self.error(self._unknown_message(*unknown))
        return args

    def _unknown_message(self, given: str, *others: str) -> str:
        if not given.startswith("-"):
            return f"unexpected argument {given!r}; every value follows a --flag"
        if given.split("=")[0].removeprefix("--") in LAUNCHER_FLAGS:
            value = f" {others[0]}" if "=" not in given and others and not others[0].startswith("-") else ""
            return f"{given.split('=')[0]} is a flag of torchrun: torchrun {given}{value} {self.prog} ..."
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(given.split("=")[0], known, 1, 0.5)
        return f"unknown flag {given.split('=')[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {shortened(message)}\n" if torchrun_environment().local_rank == 0 else None)


def _underscored(arg: str) -> str:
    """Turn --num-epochs=3 into --num_epochs=3; values are left as they are."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> Callable[[str], float]:
    """Return an argparse type: an int or float with low <= value <= high and value > above."""
    noun = {int: "a whole number", float: "a number"}[kind]
    bounds = [f"above {above}"] if above > -math.inf else []
    bounds += [f"at least {low}"] if low > -math.inf else []
    bounds += [f"at most {high}"] if high < math.inf else []

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value > above) or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text!r} must be {noun}" + (f" {' and '.join(bounds)}" if bounds else "")
            )
        return value

    return parse


def path(text: str) -> str:
    """Check a path as an argparse type: the empty text of a shell variable that is not set would mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a path")
    return text


def int_list(text: str) -> list[int]:
    """Read whole numbers separated by commas, as an argparse type."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers separated by commas, such as 0,2,5") from None


@dataclass(frozen=True)
class TorchrunEnvironment:
    """Which of how many processes this one is, in the whole run and on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def torchrun_environment() -> TorchrunEnvironment:
    """Read what torchrun tells its processes in the environment; a process that was started without it is alone."""

    def read(name: str, alone: int) -> int:
        value = os.environ.get(name, "")
        return int(value) if value.isdecimal() else alone

    return TorchrunEnvironment(
        read("RANK", 0), read("WORLD_SIZE", 1), read("LOCAL_RANK", 0), read("LOCAL_WORLD_SIZE", 1)
    )


def end_process(code: int) -> None:
    """Exit; under torchrun without taking libraries' threads down one by one, in which a process whose work was done has
    been seen to abort, and torchrun then counts the whole run as failed."""
    if "LOCAL_RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's main and turn what it raises into an exit code; errors that carry one are messages to a person."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a prompt that a terminal cannot show must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message, code = place_message(error) or (str(error), getattr(error, "exit_code", None))
        if code is None:
            traceback.print_exc()
            return 1
        if number := torchrun_environment().local_rank:
            # Most mistakes are every process's; torchrun ends the others when the first has said so.
            time.sleep(OTHERS_WAIT_S)
        print(f"process {number}: error: {message}" if number else f"error: {message}", file=sys.stderr)
        return code
