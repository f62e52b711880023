"""Standard output and error that are closed, full or in want of a character, and end no run."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Tolerant:
    """A text stream that keeps the first error of writing, and drops what comes after it."""

    def __init__(self, stream: Any) -> None:
        self._stream = io.StringIO() if stream is None else stream  # None: closed from the start
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):  # a name that this encoding lacks is shown by its code
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._attempt(self._stream.flush)

    def _attempt(self, write: Any, *text: str) -> None:
        if self.error is not None:
            return
        try:
            write(*text)
        except OSError as error:
            self.error = error
            with suppress(OSError):  # what is buffered goes nowhere, when Python ends too
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def tolerant_streams() -> Iterator[Tolerant]:
    """Let standard output and error be tolerant; yield the output.

    Closed ones are opened on the null device first, lest the next file that is opened, such as one
    of results, should take their place and all that libraries write to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = output, errors = Tolerant(sys.stdout), Tolerant(sys.stderr)
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = before
