"""A request to stop a run: a first signal lets the step in hand finish, a second one ends the process at once.

A terminal that is closed, or a reader of the output that leaves, asks for it too: what was learnt is saved all the same.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from wandistiller.lost_output import is_lost_output, silence_lost_output

# A launcher passes signals on to its processes: those that come within this time are one request.
REPEATED_S = 2.0


class StopRequest:
    """SIGINT, SIGTERM or SIGHUP asks the loop to stop after the step in hand; a second one ends the process at once."""

    def __init__(self, is_repeated: bool = False):
        self.requested_s: float | None = None
        self.is_repeated = is_repeated  # whether a launcher may pass on a signal that came by itself too

    @property
    def requested(self) -> bool:
        return self.requested_s is not None

    def _on_signal(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if self.requested_s is None:
            self.requested_s = now
        elif not self.is_repeated or now - self.requested_s > REPEATED_S:
            # Not by an exception, which a library that is writing a checkpoint may take for a failure of its own:
            os._exit(130)

    @contextlib.contextmanager
    def watching(self) -> Iterator["StopRequest"]:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.requested:  # perhaps by a terminal that is closed, before anything more was printed
                silence_lost_output()

    @contextlib.contextmanager
    def unless_unread(self) -> Iterator[None]:
        """Take output that nobody reads any more as a request to stop; the rest of it goes nowhere."""
        try:
            yield
        except OSError as error:
            if not is_lost_output(error):
                raise
            self.requested_s = time.monotonic() if self.requested_s is None else self.requested_s
