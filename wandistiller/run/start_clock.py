"""Where the time until the first step goes, part by part: what --verbose prints.

Standard library only: it runs before torch loads.
"""

import time

SHOWN_FROM_S = 0.005  # what would be 0.00 is left out


class StartClock:
    """Seconds of the parts of a start, each from the end of the one before it, until the first step has been taken."""

    def __init__(self):
        self.parts: list[tuple[str, float]] = []
        self._last_s = time.perf_counter()
        self._is_over = False

    def lap(self, part: str) -> None:
        """A part ends now."""
        now = time.perf_counter()
        self.parts.append((part, now - self._last_s))
        self._last_s = now

    def first_step(self, loop_s: float) -> bool:
        """To be told of every step; true the first time. `loop_s`: seconds of this step since the loop began."""
        if self._is_over:
            return False
        self._is_over = True
        since_s = time.perf_counter() - self._last_s
        loop_s = min(loop_s, since_s)
        self.parts += [("optimiser set up, checkpoint read", since_s - loop_s), ("first step", loop_s)]
        return True

    def table(self) -> str:
        """A line a part in the order of time, and their sum."""
        total_s = sum(seconds for _, seconds in self.parts)
        rows = [part for part in self.parts if part[1] >= SHOWN_FROM_S] + [("in all", total_s)]
        width = max(len(part) for part, _ in rows)
        lines = [f"  {part:<{width}}{seconds:8.2f} s{seconds / max(total_s, 1e-9):7.0%}" for part, seconds in rows]
        return "\n".join(["Time to the first step:", *lines])
