"""Handling of Ctrl-C and SIGTERM: a file that is being written is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop by a signal.

    Args:
        number: the signal's number; shells expect the exit code 128 + number.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


_writing = 0
_pending: int | None = None
_raised: int | None = None


def interrupt(number: int, frame: object) -> None:
    """Handle a signal: raise `Interrupted` at once, or at the end of a block of `finishing`.

    Raises:
        Interrupted: outside of `finishing`.
    """
    global _pending, _raised
    if _writing:
        _pending = number
    else:
        _raised = number
        raise Interrupted(number)


@contextmanager
def finishing() -> Iterator[None]:
    """Delay an interruption until the end of a block.

    Raises:
        Interrupted: at the end of the outermost block, if a signal came meanwhile.
    """
    global _writing, _pending
    if threading.current_thread() is not threading.main_thread():
        # Python handles signals in the main thread alone.
        yield
        return
    _writing += 1
    try:
        yield
    finally:
        _writing -= 1
    if not _writing and _pending is not None:
        number, _pending = _pending, None
        raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM by `interrupt` while a block runs; call it in the main thread.

    Raises:
        Interrupted: also where a library that was interrupted in compiled code ended with an error of its
            own, as safetensors does while it reads a tensor.
    """
    global _raised
    _raised = None
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception as error:
        if _raised is None:
            raise
        raise Interrupted(_raised) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
