"""How a command declares its flags: the fields of a dataclass, each with its help text, default, type and check.

    @group()
    class Flags(ComputeFlags):
        student: str = flag("folder of a trained student", required=True, type=path)
        num_images: int = flag("pictures of each prompt", 1, type=number(int, low=1))
        model: str = flag("who draws", "student", choices=["student", "teacher"])
        teacher_lora: list[tuple[str, float]] | None = flag("a LoRA of the teacher", **LORA_FLAG)
        overwrite: bool = switch("replace pictures of the same names")

    flags = parse_flags(Flags, "generate_images.py", "Draw prompts with a trained student.", argv)
    flags.num_images, flags.device

A class with a title is a group, which commands share by inheriting it: its flags stand under the title in `--help`, all others
under "options". `--num_images` and `--num-images` are one flag, nothing is abbreviated, and the help text ends with the default. A
mistake ends the process with one line and exit code 2. Standard library only, so that this happens before torch loads.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn, TypeVar, dataclass_transform

from wandistiller import __version__
from wandistiller.command_line import COMMANDS, OF_MANY_PROCESSES, is_one_command, let_the_first_speak
from wandistiller.errors import shortened
from wandistiller.flag_hints import unknown_flag

T = TypeVar("T")
# Beyond these a number is a slip of the keyboard; its square still is a number in float32.
LARGEST, SMALLEST = {int: 10**12, float: 1e18}, 1e-18
SWITCHED = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
EXIT_CODES = "Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted, 1 anything else."


def flag(help: str, default: object = None, **options: object) -> Any:
    """Declare a flag; `options` are those of argparse's add_argument (type, choices, nargs, required, metavar, action).

    One with `neutral` among them decides what a run makes: it is recorded, and compared where a run resumes. A checkpoint from
    before the flag existed counts as having the neutral value.
    """
    decides = {"neutral": options.pop("neutral")} if "neutral" in options else {}
    return field(default=default, metadata={"help": help, "options": options, **decides})


def switch(help: str) -> Any:
    """Declare a flag that is on where it is given; with false behind it, it is off, whatever a preset says."""
    return flag(help, False, nargs="?", const=True, type=_switched, metavar="false")


def choice(help: str, usual: str, *others: str) -> Any:
    """Declare a flag that is `usual` where it is given without a value; with false behind it, it is off, whatever a preset says."""

    def read(text: str) -> str | None:
        return text if text in (usual, *others) else usual if _switched(text, usual, *others) else None

    return flag(help, nargs="?", const=usual, type=read, metavar="|".join((usual, *others)))


def _switched(text: str, *others: str) -> bool:
    if text.lower() not in SWITCHED:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(('true', 'false', *others))}")
    return SWITCHED[text.lower()]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def group(title: str | None = None) -> Callable[[type[T]], type[T]]:
    """Declare a class of flags, which stand under its title in `--help`; without one it is a command, or a part of a group."""

    def declare(cls: type[T]) -> type[T]:
        made = dataclass(frozen=True, kw_only=True)(cls)
        made.title = title  # type: ignore[attr-defined]
        return made

    return declare


def groups(flags: type) -> dict[str | None, list[Field]]:
    """Return the flags of a command by the titles that they stand under; its own come first, and have none."""
    known, grouped = {each.name: each for each in fields(flags)}, dict[str | None, list[Field]]()
    for base in flags.__mro__[:-1]:
        title = vars(base).get("title")
        names = [each.name for each in fields(base)] if title else base.__annotations__
        grouped.setdefault(title, []).extend(known.pop(name) for name in names if name in known)
    return {title: own for title, own in grouped.items() if own}


def parse_flags(flags: type, prog: str, description: str, argv: list[str] | None = None) -> Any:
    """Read the command line into a dataclass of flags; `argv` is that of this process by default."""
    return flags(**vars(FlagParser(prog, description, flags=flags).parse(argv)))


class FlagGroup:
    """One titled group of flags in `--help`; `defaults` are those of the whole command."""

    def __init__(self, group: argparse._ActionsContainer, defaults: dict[str, Any]):
        self._group, self._defaults = group, defaults

    def flag(self, name: str, help: str, default=None, **options) -> None:
        """Add a flag by its snake_case name; the help text shows its default."""
        shown = "" if default in (None, False) or options.get("required") else f" (default: {default})"
        help = (help + shown).replace("%", "%%")
        action = self._group.add_argument(name, help=help, default=argparse.SUPPRESS, **options)
        self._defaults[action.dest] = default


class FlagParser(argparse.ArgumentParser):
    """An argument parser of a dataclass of flags, with hyphens as good as underscores and mistakes answered in one line.

    Attributes:
        defaults: of all flags, by name.
    """

    def __init__(self, prog: str, description: str, *, flags: type | None = None):
        super().__init__(
            prog=sys.argv[0] if is_one_command() else prog,
            description=description,
            epilog=EXIT_CODES,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # Also -1e-5 and -1,2 are values, to be answered as such; argparse knows -1 and -1.5 only:
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self._words, self._where = list[str](), ""
        self.defaults: dict[str, Any] = {}
        self._many_processes = prog in [COMMANDS[name] for name in OF_MANY_PROCESSES]
        version = f"WanDistiller {__version__}"
        self.add_argument("--version", action="version", version=version, help="show the version and exit")
        for title, own in groups(flags).items() if flags else ():
            shown_in = self.group(title) if title else FlagGroup(self, self.defaults)
            for each in own:
                shown_in.flag(f"--{each.name}", each.metadata["help"], each.default, **each.metadata["options"])

    def group(self, title: str) -> FlagGroup:
        return FlagGroup(self.add_argument_group(title), self.defaults)

    def action_of(self, name: str) -> argparse.Action | None:
        """Return how argparse knows a flag; None where the command has no such flag."""
        return self._option_string_actions.get(f"--{name}")

    def given(self, argv: list[str] | None = None, where: str = "") -> dict[str, Any]:
        """Return the values of the flags that are typed, by name; messages about mistakes begin with `where`."""
        self._words, self._where = [_underscored(arg) for arg in (sys.argv[1:] if argv is None else argv)], where
        args, unknown = self.parse_known_args(self._words)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return vars(args)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        return argparse.Namespace(**self.defaults | self.given(argv))

    def _unknown(self, given: str) -> str:
        return unknown_flag(given, list(self._option_string_actions))

    def error(self, message: str) -> NoReturn:
        if "arguments are required" in message:  # the one that is wanted may be there under a name of another trainer
            strange = [
                arg
                for arg in self._words
                if arg.startswith("--") and arg.split("=")[0] not in self._option_string_actions
            ]
            message = "; ".join([*(self._unknown(given) for given in strange[:1]), message])
        whose = let_the_first_speak() if self._many_processes else ""
        self.exit(2, f"{whose}{self.prog}: error: {shortened(self._where + message)}\n")


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
        if not (low <= value <= high and value > above) or value in (-math.inf, math.inf):
            raise argparse.ArgumentTypeError(
                f"{text!r} must be {noun}" + (f" {' and '.join(bounds)}" if bounds else "")
            )
        if math.isinf(high) and abs(value) > LARGEST[kind]:
            raise argparse.ArgumentTypeError(f"{text!r} is too large; allowed: at most {LARGEST[kind]:g}")
        if 0 < abs(value) < SMALLEST:
            raise argparse.ArgumentTypeError(f"{text!r} is too near to 0; allowed: 0 or at least {SMALLEST:g}")
        return value

    return parse


def path(text: str) -> str:
    """Check a path as an argparse type: the empty text of a shell variable that is not set would mean the current folder.

    A ~ is the home folder, also where the shell leaves it as it is (--output_dir=~/out, quotes, config files of launchers).
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; give a path")
    return os.path.expanduser(text) if text.startswith("~") and not os.path.lexists(text) else text


def int_list(text: str) -> list[int]:
    """Read whole numbers separated by commas, as an argparse type."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers separated by commas, such as 0,2,5") from None


def lora_file(text: str) -> tuple[str, float]:
    """Read FILE or FILE:SCALE, as an argparse type; a colon that no number follows belongs to the path."""
    name, colon, after = path(text).rpartition(":")
    try:
        scale = float(after) if colon and name else math.nan
    except ValueError:
        return text, 1.0
    if not (colon and name):
        return text, 1.0
    if not math.isfinite(scale) or scale == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: the scale after the colon must be a number other than 0")
    return name, scale


LORA_FLAG: dict[str, Any] = {"action": "append", "type": lora_file, "metavar": "FILE[:SCALE]"}


@group()
class TextFlags:
    """How files of prompts are read, and where their embeddings are kept."""

    caption_column: str | None = flag("column of tables with the prompts (the one called caption, prompt or text)")
    prompt_per: str | None = flag(
        "a text file holds a prompt a line, or is one (left out: one where a picture of its name lies beside it)",
        choices=["line", "file"],
    )
    prompt_cache: str = flag("folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path)


@group("The rest of a pipeline (left out: from the teacher that the student records)")
class PartsFlags:
    """Where the other parts of a student's pipeline are; None: beside the teacher that its record names."""

    teacher_path: str | None = flag("the teacher, where it is no longer where the student's record says", type=path)
    text_encoder_path: str | None = flag(
        "folder or hub id with text_encoder/ and tokenizer/, where the teacher has none", type=path
    )
    vae_path: str | None = flag("folder or hub id of a diffusers AutoencoderKLWan, if the teacher has none", type=path)


@group("Teacher (left out: as the student records)")
class TeacherFlags(PartsFlags):
    """Where the teacher of a student and its parts are; None: where the student's record says."""

    teacher_path_low: str | None = flag("its low-noise expert, where the two are two files or folders", type=path)
    teacher_lora: list[tuple[str, float]] | None = flag("a LoRA of the teacher, in place of recorded ones", **LORA_FLAG)
    teacher_lora_low: list[tuple[str, float]] | None = flag("the same for the low-noise expert of two", **LORA_FLAG)


@group("Performance")
class ComputeFlags:
    """Where and in which precision a command computes."""

    device: str | None = flag("cpu, cuda, cuda:1, ..., mps (a GPU if there is one)")
    dtype: str | None = flag("of matrix products (bf16 on cuda, else fp32)", choices=["fp32", "bf16"])


@group()
class DrawingFlags(TeacherFlags, ComputeFlags):
    """Who draws, and from which noise."""

    student: str = flag("folder of a trained student (--output_dir of train_distillation.py)", required=True, type=path)
    num_inference_steps: int | None = flag("steps of the sampler (as recorded)", type=number(int, low=1, high=1000))
    seed: int = flag("of the first picture's noise; the others follow from it", 0, type=number(int, low=0, high=2**62))
