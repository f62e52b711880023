"""Progress on a terminal: one line with a rate and the time left; silent elsewhere."""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """Return `seconds` as a person writes it: ``"8.2 s"``, ``"3 min 05 s"``, ``"2 h 10 min"``."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


class Progress:
    """A line that is rewritten in place, at most ten times a second, if `stream` is a terminal.

    Parameters
    ----------
    total : float
        The whole of the work, in any unit.
    stream : text file
        Standard error if not given.
    """

    def __init__(self, total: float, stream: TextIO | None = None) -> None:
        self.total, self.done, self.steps = total, 0.0, 0
        self._skipped = 0.0
        self._said: set[str] = set()
        self._stream = stream or sys.stderr
        self._shown = self._stream.isatty()
        self._start = self._last = time.monotonic()

    def skip(self, work: float) -> None:
        """Count `work` as done before now: it does not enter the time left."""
        self.done += work
        self._skipped += work

    def advance(self, work: float, text: str = "", steps: int = 1) -> None:
        """Count `work`, done in some `steps`, and show it with a text."""
        self.done += work
        self.steps += steps
        now = time.monotonic()
        if not self._shown or now - self._last < 0.1:
            return
        self._last = now
        elapsed = now - self._start
        left = (self.total - self.done) * elapsed / max(self.done - self._skipped, 1e-9)
        self._stream.write(f"\r\x1b[K{self.done / max(self.total, 1e-9):4.0%}  "
                           f"{self.steps / elapsed:,.0f} steps/s  {duration(max(left, 0))} left  "
                           f"{text[:70]}")
        self._stream.flush()

    def message(self, text: str) -> None:
        """Print a line of its own, once however often it comes."""
        if text in self._said:
            return
        self._said.add(text)
        self.clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
