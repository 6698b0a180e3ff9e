"""The exception for mistakes that the person at the keyboard can put right, and how values and other libraries' errors are told.

A message must stay readable whatever a file holds, so that long values are cut here, once for all commands.
"""

import errno
import os
import re
from collections.abc import Mapping
from typing import Any

# A message keeps its head (what and where) and its tail (what is allowed). Almost every path is shorter than a value may be.
MAX_MESSAGE, MAX_VALUE = 480, 200
# What the place itself is to blame for, by no fault of this program: the person gives another one or mends it.
_OF_A_PLACE = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO, errno.EPERM, errno.EROFS,
}  # fmt: skip
_OF_A_DISK = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC}
# What commands a terminal, or turns the order of its letters: C0 but for tab and line feed, DEL, C1, and Unicode's bidi controls
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def spelt(text: str, but: str = "") -> str:
    """Return a text with its control characters as Python spells them, but for tabs, line feeds and those of `but`."""
    if text.isprintable():
        return text
    return _COMMANDS.sub(lambda found: found[0] if found[0] in but else ascii(found[0])[1:-1], text)


class UserError(ValueError):
    """A mistake in flags, config or files, told in one message that a person can act on."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(shortened(message))


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = limit // 3
    head = limit - tail - 20
    return f"{text[:head]}[... {len(text)} long ...]{text[-tail:]}"


def shortened(message: str) -> str:
    """Return a message without control characters, the middle of its longest words, and of itself where it is still too long."""
    message = spelt(message)
    return _cut(re.sub(rf"\S{{{MAX_VALUE + 1},}}", lambda word: _cut(word[0], MAX_VALUE), message), MAX_MESSAGE)


def shown(value: object) -> str:
    """Return a value as a message shows it, without the middle of a long one."""
    return _cut(repr(value), 80)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return what differs between two descriptions of a run or of answers, each as `name theirs, now ours`.

    Their entry "about" is not compared: it tells by name which file a digest is of.
    """
    named = [about if isinstance(about := each.get("about"), dict) else {} for each in (theirs, ours)]
    told = []
    for name in sorted((theirs.keys() | ours.keys()) - {"about"}):
        if theirs.get(name) == ours.get(name):
            continue
        had, has = (shown(of.get(name, each.get(name))) for of, each in zip(named, (theirs, ours), strict=True))
        told.append(f"{name} {had}, whose contents are others now" if had == has else f"{name} {had}, now {has}")
    return told


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, since other libraries write whole paragraphs."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def message_of(error: Exception) -> tuple[str, int | None]:
    """Return the message of an error to a person and the exit code; None: it is a fault of this program, and no message.

    A path or a disk may be to blame, or a process of the same run that has died. torch's own errors of that kind have a base class of
    their own; gloo's are plain ones that quote the system.
    """
    is_of_torch = any(base.__name__ == "DistError" for base in type(error).__mro__)
    is_of_gloo = "gloo" in str(error) and re.search(r"closed by peer|reset by peer|Broken pipe|refused", str(error))
    if is_of_torch or is_of_gloo:
        why = f"another process of this run has ended or cannot be reached ({first_line(error)}); what it printed last says why"
        return shortened(f"{why}. The same command resumes from the last checkpoint"), 1
    if not isinstance(error, OSError) or error.errno not in _OF_A_PLACE | _OF_A_DISK:
        return str(error), getattr(error, "exit_code", None)
    place = error.filename2 or error.filename
    where = place if isinstance(place, (str, os.PathLike)) else "a file"
    if error.errno in _OF_A_DISK:
        return shortened(f"{where}: {error.strerror}; free some space, or give a folder on another disk"), 1
    return shortened(f"{where}: {error.strerror}; give another path, or mend this one"), 2
