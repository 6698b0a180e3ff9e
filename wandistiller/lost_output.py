"""Output that nobody reads any more: the reader of a pipe has ended, as after `| head`, or the terminal has been closed."""

import contextlib
import errno
import os
import select
import sys
from typing import TextIO


def is_lost_output(error: Exception) -> bool:
    """Return whether an error tells that nobody reads what is printed; the rest of it then goes nowhere, also at the exit."""
    return isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EIO) and silence_lost_output()


def silence_lost_output() -> bool:
    """Let what is printed to a stream that nobody reads any more go nowhere; return whether there is one."""
    # Both are asked, since a closed terminal takes both away.
    return any([_silence_if_lost(stream) for stream in (sys.stdout, sys.stderr)])


def _silence_if_lost(stream: TextIO) -> bool:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file behind it, or a system without poll
        output = select.poll()
        output.register(stream.fileno(), 0)
        if output.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            return True
    return False
