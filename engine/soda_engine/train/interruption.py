"""Ending a run at a moment of its own choosing when the user asks it to."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def noted_interruption() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; the second acts as usual. Only in the main thread."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        event.set()
        for name, handler in previous.items():
            signal.signal(name, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
