"""JSON that a person, a download or a crash may have damaged: it is read whole, or refused for one reason in words.

Callers turn a `JsonError` into their own refusal, or into going without the file. Standard library only.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wandistiller.files.paths import require_file

MAX_DEPTH = 100  # of brackets in brackets: far more than any file of ours or of a Wan has, far less than Python's stack
MAX_BYTES = 32 * 2**20  # of a file that is read whole: parsed it can take 20 times as much memory
_SPACES = tuple(" \t\n\r")


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
    value = _decoded(lambda: json.loads(text, object_pairs_hook=object_pairs_hook))
    _refuse_unwritable(value)
    return value


def json_list(blocks: Iterator[str], longest: int) -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON list, each behind the number of its letters, in the memory of the longest.

    Args:
        blocks: the text, in pieces of any size.
        longest: letters that a value may have.

    Raises:
        JsonError: the text is no list, or a value is longer or no usable JSON.
    """
    return _ListReader(blocks, longest).values()


class _ListReader:
    """Reads a JSON list from blocks of text; `text[place:]` is what was read and not yet used, and `line` where it begins."""

    def __init__(self, blocks: Iterator[str], longest: int):
        self._blocks, self._longest = blocks, longest
        self._text, self._place, self._line = "", 0, 1
        self._decoder = json.JSONDecoder()

    def values(self) -> Iterator[tuple[int, Any]]:
        if self._next_letter() != "[":
            raise JsonError("holds no list")
        self._move(self._place + 1)
        while self._next_letter() != "]":
            yield self._value()
            letter = self._next_letter()
            if letter not in (",", "]"):
                raise self._error("not valid JSON: there must be a comma or a ] behind a value")
            self._move(self._place + (letter == ","))
        self._move(self._place + 1)
        if self._next_letter():
            raise self._error("not valid JSON: there is more behind the list")

    def _error(self, reason: str) -> JsonError:
        return JsonError(f"line {self._line}: {reason}")

    def _move(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _read_on(self) -> bool:
        """Read another block; return whether there was one."""
        block = next(self._blocks, "")
        self._text, self._place = self._text[self._place :] + block, 0
        return bool(block)

    def _next_letter(self) -> str:
        """Go on to the next letter that is no space and return it; empty at the end."""
        while True:
            while self._text[self._place : self._place + 1] in _SPACES:
                self._move(self._place + 1)
            if self._place < len(self._text) or not self._read_on():
                return self._text[self._place : self._place + 1]

    def _value(self) -> tuple[int, Any]:
        while True:
            try:
                value, end = _decoded(lambda: self._decoder.raw_decode(self._text, self._place))
                problem = None
            except _Malformed as error:  # or cut by the end of what was read
                problem, value, end = error, None, len(self._text)
            if end - self._place > self._longest:
                raise self._error(f"a value is longer than {self._longest:,} letters")
            # A number that ends with what was read, or before a dot there, may go on as well.
            if self._text[end : end + 1] in (",", "]", *_SPACES):
                break
            if not self._read_on():
                if problem:
                    raise self._error(f"not valid JSON: {problem.reason}")
                break
        _refuse_unwritable(value)
        num_letters = end - self._place
        self._move(end)
        return num_letters, value


class _Malformed(JsonError):
    """A JSON text breaks off, or holds a letter that cannot stand there."""

    def __init__(self, error: json.JSONDecodeError):
        super().__init__(f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}")
        self.reason = error.msg


def _decoded(decode: Callable[[], Any]) -> Any:
    try:
        return decode()
    except json.JSONDecodeError as error:
        raise _Malformed(error) from None
    except RecursionError:
        raise JsonError(f"not usable JSON: nested more than {MAX_DEPTH} brackets deep") from None
    except ValueError as error:  # a number of thousands of digits, or what the hook refuses
        raise JsonError(f"not usable JSON: {error}") from None


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
            elif isinstance(part, str) and not _is_utf8(part):
                raise JsonError("not usable JSON: half of a surrogate pair, such as \\ud800 alone, is no letter")
        level, depth = inside, depth + 1


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
