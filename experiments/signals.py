"""Ctrl-C, SIGTERM and SIGHUP as a request to stop, so that a step is not cut in two.

SIGTERM is what SLURM, systemd and `kill` send, SIGHUP what a closed terminal does, often twice, and
to all processes of a sweep at once. So a repeated one adds nothing; a second Ctrl-C ends at once.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Windows has no SIGHUP.
SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if (number := getattr(signal, name, None)) is not None]


class Stop:
    """Whether somebody asked for the end."""

    def __init__(self) -> None:
        self._event, self._number = threading.Event(), int(signal.SIGINT)

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    @property
    def number(self) -> int:
        """The number of the signal that asked."""
        return self._number

    def ask(self, number: int = signal.SIGINT) -> None:
        """Ask for the end, as the signal of this `number` does."""
        if not self.asked:
            self._number = int(number)
            self._event.set()

    def raise_if_asked(self) -> None:
        """Raise KeyboardInterrupt, with the signal's number, if asked to stop."""
        if self.asked:
            raise KeyboardInterrupt(self._number)


_of_command: Stop | None = None  # the one request of a command line, while it runs


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """For a command line: let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does.

    Should a library swallow it, the next training still finds that the end was asked for.
    """
    global _of_command
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        repeated = stop.asked and number != signal.SIGINT
        stop.ask(number)
        if not repeated:
            raise KeyboardInterrupt(number)

    with _handled_by(handle):
        _of_command = stop
        try:
            yield
        finally:
            _of_command = None


@contextmanager
def stop_on_signals(given: Stop | None = None) -> Iterator[Stop]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request to stop.

    A second Ctrl-C ends at once. Where a signal is ignored, as SIGHUP under nohup, it stays so. A
    `given` request is returned as it is, and signals are left to whoever gave it.
    """
    if given is not None:
        yield given
        return
    stop = _of_command or Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            stop.raise_if_asked()
        stop.ask(number)

    with _handled_by(handle):
        yield stop


@contextmanager
def held_back(came: list[int]) -> Iterator[None]:
    """Add the numbers of the signals that come to a list, and do nothing else about them."""
    with _handled_by(lambda number, frame: came.append(number)):
        yield


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Let signals be handled by a function, unless they are ignored or this is a thread."""
    before = {number: handler for number in SIGNALS
              if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
