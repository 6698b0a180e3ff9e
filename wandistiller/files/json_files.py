"""JSON that a person, a download or a crash may have damaged: it is read whole, or refused for one reason in words.

Callers turn a `JsonError` into their own refusal, or into going without the file. Standard library only.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wandistiller.files.paths import require_file

MAX_DEPTH = 100  # of brackets in brackets: far more than any file of ours or of a Wan has, far less than Python's stack
MAX_BYTES = 32 * 2**20  # of a file that is read whole: parsed it can take 20 times as much memory
_SURROGATE = re.compile("[\ud800-\udfff]")


class JsonError(ValueError):
    """A text or file is no usable JSON; the message is short and says why, and in which line where a line is to blame."""


def load_json(path: Path, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read the JSON value that a file holds.

    Raises:
        JsonError: it is not there, cannot be read, is too large, no UTF-8, or no JSON as `parse_json` takes it.
    """
    return parse_json(_read_text(path), object_pairs_hook)


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
        raise JsonError(f"not usable JSON: nested more than {MAX_DEPTH} brackets deep") from None
    except ValueError as error:  # a number of thousands of digits, or what the hook refuses
        raise JsonError(f"not usable JSON: {error}") from None
    _refuse_unwritable(value)
    return value


def _refuse_unwritable(value: Any) -> None:
    """Refuse what would fail later, where it is written or compared: a deep nest, and a letter that UTF-8 has no bytes for."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise JsonError(f"not usable JSON: nested more than {MAX_DEPTH} brackets deep")
        inside: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inside += [*part.keys(), *part.values()]
            elif isinstance(part, list):
                inside += part
            elif isinstance(part, str) and _SURROGATE.search(part):
                raise JsonError("not usable JSON: half of a surrogate pair, such as \\ud800 alone, is no letter")
        level, depth = inside, depth + 1


def _read_text(path: Path) -> str:
    try:
        require_file(path)
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise JsonError(f"is larger than {MAX_BYTES:,} bytes")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise JsonError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise JsonError("is not UTF-8 text; save it as UTF-8 JSON") from None
