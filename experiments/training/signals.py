"""Ctrl-C and SIGTERM as a request to stop, so that a step is not cut in two."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether somebody asked for the end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def ask(self) -> None:
        """Ask for the end."""
        self._event.set()

    def raise_if_asked(self) -> None:
        """Raise KeyboardInterrupt if asked to stop."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals(given: Stop | None = None) -> Iterator[Stop]:
    """Turn the first Ctrl-C, or SIGTERM, into a request to stop; a second one ends at once.

    Where Ctrl-C is ignored, as in the workers of a sweep, it stays so. A `given` request is
    returned as it is, and signals are left to whoever gave it.
    """
    stop = given or Stop()
    if given is not None or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.raise_if_asked()
        stop.ask()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
