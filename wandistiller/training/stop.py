"""A person's request to stop a run: a first signal lets the step in hand finish, a second one ends the process at once."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

# A launcher passes signals on to its processes: those that come within this time are one request.
REPEATED_S = 2.0


class StopRequest:
    """SIGINT or SIGTERM asks the loop to stop after the step in hand; a second one ends the process at once."""

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
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
