"""The command `wandistiller`, which an installation puts on the PATH: every command of the root by a shorter name.

    wandistiller train --help
    python -m wandistiller generate --student outputs/demo --prompt "a large red circle on a white background"

It calls the same functions as the scripts of a clone, which are installed as modules of the same names.
"""

import sys
from importlib import import_module

from wandistiller import __version__
from wandistiller.command_line import COMMANDS, OF_MANY_PROCESSES, ONE_COMMAND, end_process, run_command
from wandistiller.errors import UserError

ABOUT = {
    "train": "distil a Wan text-to-video checkpoint into a small 2D image student",
    "project": "cut a student out of a teacher, without training it",
    "preflight": "try a run on a shrunk student before a long job",
    "generate": "draw prompts with a student, or with its teacher",
    "evaluate": "hold a student against its teacher",
    "export": "write a student for diffusers or ComfyUI",
    "encoder": "distil the text encoder into a small one",
    "playground": "try a student beside its teacher in a browser",
}


USAGE = "\n".join(
    [
        f"usage: {ONE_COMMAND} COMMAND [flags]\n",
        *(f"  {name:<10}  {about}" for name, about in ABOUT.items()),
        f"\n{ONE_COMMAND} COMMAND --help lists the flags of a command, and {ONE_COMMAND} --version shows the version.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names with the words after it; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"WanDistiller {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(f"{words[0]!r} is no command of {ONE_COMMAND}; allowed: {', '.join(COMMANDS)}")
    before = sys.argv
    sys.argv = [f"{ONE_COMMAND} {words[0]}", *words[1:]]  # so that help and messages name the command as it was typed
    try:
        return import_module(COMMANDS[words[0]].removesuffix(".py")).main() or 0
    finally:
        sys.argv = before


def installed() -> None:
    """Run the command as a process: what pip installs on the PATH."""
    end_process(run_command(main, many_processes=any(name in OF_MANY_PROCESSES for name in sys.argv[1:2])))


if __name__ == "__main__":
    installed()
