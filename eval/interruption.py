"""Ctrl-C and SIGTERM: a file that is being written is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """Somebody asked this process to stop.

    Args:
        number: of the signal; a shell expects the exit code 128 + number.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


_writing = 0
_asked: int | None = None


def interrupt(number: int, frame: object) -> None:
    """Handle a signal: raise `Interrupted`, now or once what is being written is on disk.

    Raises:
        Interrupted: outside of `finishing`.
    """
    global _asked
    if _writing:
        _asked = number
    else:
        raise Interrupted(number)


@contextmanager
def finishing() -> Iterator[None]:
    """Let a stop wait for the end of the block.

    Raises:
        Interrupted: at its end, if one was asked for meanwhile.
    """
    global _writing, _asked
    if threading.current_thread() is not threading.main_thread():
        # Signals are the main thread's.
        yield
        return
    _writing += 1
    try:
        yield
    finally:
        _writing -= 1
    if not _writing and _asked is not None:
        number, _asked = _asked, None
        raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM by `interrupt` while the block runs; the main thread's alone."""
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
