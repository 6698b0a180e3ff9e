"""What is printed: nothing that a file holds commands the terminal, and a stream whose reader has ended (`| head`) is no error."""

import contextlib
import errno
import os
import re
import select
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from wandistiller.errors import spelt

_MOVES_OF_BARS = re.compile(r"(?:\n|\x1b\[A)+")  # between tqdm's bars


class _SpeltStream:
    """A stream whose control characters are spelt, but for what progress bars need."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text if _MOVES_OF_BARS.fullmatch(text) else spelt(text, but="\r"))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def spelt_output() -> Iterator[None]:
    """Spell the control characters of all that is printed inside: names of tensors and texts of files come from strangers."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _SpeltStream(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def is_lost_output(error: Exception) -> bool:
    """Return whether the error is a closed stdout or stderr; what is printed there then goes nowhere, also at the exit."""
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO) and silence_lost_output()


def silence_lost_output() -> bool:
    """Send what is printed to a closed stdout or stderr nowhere; return whether one is closed."""
    lost = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]  # a closed terminal takes both away
    for stream in lost:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(lost)


def _is_closed(stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file behind it, or a system without poll
        output = select.poll()
        output.register(stream.fileno(), 0)
        return bool(output.poll(0))
    return False
