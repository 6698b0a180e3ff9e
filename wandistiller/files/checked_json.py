"""The JSON files beside a Wan's weights, whose values are checked to be of the kind they must be."""

import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wandistiller.errors import UserError
from wandistiller.files.json_files import JsonError, load_json


class TeacherFileError(UserError):
    """A Wan on disk is missing, damaged, or of another kind."""


class Kind(NamedTuple):
    """The values that are allowed somewhere, in words for a message and as a test."""

    allowed: str
    fits: Callable[[Any], bool]


LARGEST = 1e18  # every number becomes a float32 somewhere, and its square has to be one too
LARGEST_WHOLE = 10**9
LONGEST_PATH = 4096  # as long as Linux takes them


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that is no slip of the keyboard."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _is_whole(value: Any, most: int = LARGEST_WHOLE) -> bool:
    return type(value) is int and 1 <= value <= most


WHOLE = Kind("a whole number above 0, at most 10^9", _is_whole)
STEPS = Kind("a whole number from 1 to 1000", lambda value: _is_whole(value, 1000))
POSITIVE = Kind("a number above 0, at most 1e18", lambda value: is_number(value) and value > 0)
NOT_NEGATIVE = Kind("a number of 0 or more, at most 1e18", lambda value: is_number(value) and value >= 0)
RATIO = Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
TEXT = Kind("text", lambda value: isinstance(value, str))
PATH = Kind(
    f"a path or hub id of at most {LONGEST_PATH} letters",
    lambda value: isinstance(value, str) and 0 < len(value) <= LONGEST_PATH and "\0" not in value,
)
STAGES = Kind(
    "a list of whole numbers above 0, one a stage",
    lambda value: isinstance(value, list) and len(value) > 0 and all(map(WHOLE.fits, value)),
)
COMPONENT = Kind(
    'a pair such as ["diffusers", "WanTransformer3DModel"], or [null, null]',
    lambda value: (
        isinstance(value, list) and len(value) == 2 and all(part is None or isinstance(part, str) for part in value)
    ),
)


def numbers(count: int, each: Kind | None = None) -> Kind:
    """Allow a list of `count` numbers, one for each latent channel.

    Args:
        each: what every number must be; None allows all that are finite.
    """
    fits = each.fits if each else is_number
    words = f"a list of {count} numbers" + (f", each {each.allowed}" if each else "")
    return Kind(words, lambda value: isinstance(value, list) and len(value) == count and all(map(fits, value)))


def setting(values: dict, key: str, kind: Kind, where: object):
    """Return `values[key]`, or None where it is left out or null.

    Raises:
        TeacherFileError: the value is of another kind; the message begins with `where`.
    """
    value = values.get(key)
    if value is not None and not kind.fits(value):
        raise TeacherFileError(f"{where}: {key} is {reprlib.repr(value)}; allowed: {kind.allowed}")
    return value


def read_json(path: Path) -> dict:
    """Read the JSON object that a file of a Wan holds.

    Raises:
        TeacherFileError: the file cannot be read, or holds something else.
    """
    try:
        values = load_json(path)
    except JsonError as error:
        raise TeacherFileError(f"{path}: {error}; copy the checkpoint again") from None
    if not isinstance(values, dict):
        raise TeacherFileError(f"{path}: holds a {type(values).__name__}, not the JSON object of a Wan checkpoint")
    return values
