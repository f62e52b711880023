"""Progress with a rate and the time left: one line on a terminal, a line now and then in a file."""

import shutil
import sys
import time
from typing import Any, TextIO

from .streams import Tolerant

LINE_EVERY = 60.0  # seconds, at least, in a file while no cell ends


def duration(seconds: float) -> str:
    """Return `seconds` as a person writes it: ``"8.2 s"``, ``"3 min 05 s"``, ``"2 h 10 min"``."""
    s = round(seconds)
    if s < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


class Progress:
    """How far the work is, and how long the rest of it takes.

    On a terminal a line is rewritten in place, at most ten times a second. Elsewhere a line is
    printed when a cell ends, and where none does, each minute; so short work outside a sweep is
    silent.

    Parameters
    ----------
    total : float
        The whole of the work, in any unit.
    stream : text file
        Standard error if not given.
    cells : int
        Of a sweep; of how many `ended` will be called.
    unit : str
        Of what the rate is.
    """

    def __init__(self, total: float, stream: TextIO | None = None, cells: int = 0,
                 unit: str = "steps") -> None:
        self.total, self.done, self.steps, self._unit = total, 0.0, 0.0, unit
        self._skipped = 0.0
        self._cells, self._cells_ended = cells, 0
        self._said: set[str] = set()
        self._stream = Tolerant(stream or sys.stderr)
        self._terminal = self._stream.isatty()
        self._start = self._last = time.monotonic()

    def skip(self, work: float) -> None:
        """Count `work` as done before now: it does not enter the time left."""
        self.done += work
        self._skipped += work

    def advance(self, work: float, text: str = "", steps: float = 1) -> None:
        """Count `work`, done in some `steps`, and show it with a text."""
        self.done += work
        self.steps += steps
        now = time.monotonic()
        if now - self._last < (0.1 if self._terminal else LINE_EVERY):
            return
        self._last = now
        if not self._terminal:
            self._print(self._line(now, text))
            return
        line = (f"{self._share():4.0%}  {self._rate(now):,.0f} {self._unit}/s  "
                f"{duration(self._left(now))} left  {text}")
        self._write("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1])

    def ended(self, cell: str, found: bool = False) -> None:
        """Count a cell that has ended, or was `found` finished, which needs no line of its own."""
        self._cells_ended += 1
        if not self._terminal and not found:
            self._last = time.monotonic()
            self._print(self._line(self._last, cell))

    def message(self, text: str) -> None:
        """Print a line of its own, once however often it comes."""
        if text in self._said:
            return
        self._said.add(text)
        self.clear()
        self._print(text)

    def clear(self) -> None:
        """Remove the line."""
        if self._terminal:
            self._write("\r\x1b[K")

    def _line(self, now: float, text: str) -> str:
        """Return a line for a file: ``"3 of 24 cells, 12%, 45 steps/s, about 58 s left: NAME"``."""
        left = self._left(now)
        cells = f"{self._cells_ended} of {self._cells} cell{'s' * (self._cells != 1)}"
        parts = [cells if self._cells else "",
                 f"{self._share():.0%}",
                 f"{self._rate(now):,.0f} {self._unit}/s" if self.steps else "",
                 f"about {duration(left)} left" if left >= 0.05 else ""]
        return ", ".join(part for part in parts if part) + (f": {text}" if text else "")

    def _share(self) -> float:
        return min(self.done / max(self.total, 1e-9), 1.0)  # a killed cell counts more than once

    def _rate(self, now: float) -> float:
        return self.steps / max(now - self._start, 1e-9)

    def _left(self, now: float) -> float:
        """Return the seconds left, by the work that was done since the start; 0 if none was."""
        done, left = self.done - self._skipped, self.total - self.done
        return max(left, 0) * (now - self._start) / done if done > 1e-9 * self.total else 0.0

    def _print(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Part:
    """The progress of a part of the work, which counts as done when it ends, however that comes."""

    def __init__(self, progress: Any, work: float) -> None:
        self._progress, self._left = progress, work
        self.message = progress.message

    def skip(self, work: float) -> None:
        """Count `work` as done before now."""
        self._left -= work
        self._progress.skip(work)

    def advance(self, work: float, text: str = "", steps: int = 1) -> None:
        """Count `work`, done in some `steps`, and show it with a text."""
        self._left -= work
        self._progress.advance(work, text, steps)

    def end(self) -> None:
        """Leave out what was not needed, or not come to."""
        self.skip(self._left)
