"""JSON that a person, a download or a crash may have damaged: it is read whole, or refused for one reason in words.

Callers turn a `JsonError` into their own refusal, or into going without the file; the files beside a Wan's weights are read by
`read_json`, and each value of theirs by `setting`, which holds it against the kind that it must be. Standard library only.
"""

import json
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wandistiller.errors import UserError
from wandistiller.files.paths import require_file

MAX_DEPTH = 100  # of brackets in brackets: far more than any file of ours or of a Wan has, far less than Python's stack
TOO_DEEP = f"not usable JSON: nested more than {MAX_DEPTH} brackets deep"
MAX_BYTES = 32 * 2**20  # of a file that is read whole: parsed it can take 20 times as much memory
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonError(ValueError):
    """A text or file is no usable JSON; the message is short and says why, and in which line where a line is to blame."""


def load_json(path: Path, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read the JSON value that a file holds.

    Raises:
        JsonError: it is not there, cannot be read, is too large, no UTF-8, or no JSON as `parse_json` takes it.
    """
    try:
        require_file(path)
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise JsonError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise JsonError("is not UTF-8 text; save it as UTF-8 JSON") from None
    if len(raw) > MAX_BYTES:
        raise JsonError(f"is larger than {MAX_BYTES:,} bytes")
    return parse_json(text, object_pairs_hook)


def parse_json(text: str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the value of a JSON text; what Python could not hold or write again is refused like a missing bracket.

    Args:
        object_pairs_hook: as json.loads takes it; a ValueError that it raises gives the reason.

    Raises:
        JsonError: the text is no JSON, is nested too deep, or holds half of a surrogate pair or a number without end.
    """
    try:
        value = json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as error:
        raise JsonError(f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise JsonError(TOO_DEEP) from None
    except ValueError as error:  # a number of thousands of digits, or what the hook refuses
        raise JsonError(f"not usable JSON: {error}") from None
    _refuse_unwritable(value)
    return value


def _refuse_unwritable(value: Any, depth: int = 0) -> None:
    """Refuse what would fail later, where it is written or compared: a deep nest, and a letter that UTF-8 has no bytes for."""
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise JsonError("not usable JSON: half of a surrogate pair, such as \\ud800 alone, is no letter")
    elif isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise JsonError(TOO_DEEP)
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_unwritable(part, depth + 1)


# ---- the files beside a Wan's weights ----


class Kind(NamedTuple):
    """The values that are allowed somewhere, in words for a message and as a test."""

    allowed: str
    fits: Callable[[Any], bool]


LARGEST = 1e18  # every number becomes a float32 somewhere, and its square has to be one too
LONGEST_PATH = 4096  # as long as Linux takes them


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that is no slip of the keyboard."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST


WHOLE = Kind("a whole number above 0, at most 10^9", lambda value: type(value) is int and 1 <= value <= 10**9)
STEPS = Kind("a whole number from 1 to 1000", lambda value: type(value) is int and 1 <= value <= 1000)
NUMBER = Kind("a number, at most 1e18", is_number)
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


def setting(values: dict, key: str, kind: Kind, where: object):
    """Return `values[key]`, or None where it is left out or null.

    Raises:
        UserError: the value is of another kind; the message begins with `where`.
    """
    value = values.get(key)
    if value is not None and not kind.fits(value):
        raise UserError(f"{where}: {key} is {reprlib.repr(value)}; allowed: {kind.allowed}")
    return value


def read_json(path: Path) -> dict:
    """Read the JSON object that a file of a Wan holds.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        values = load_json(path)
    except JsonError as error:
        raise UserError(f"{path}: {error}; copy the checkpoint again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not the JSON object of a Wan checkpoint")
    return values
