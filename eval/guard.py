"""Environment of every command: streams, signals, quiet libraries, and errors in one sentence."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from llava_keeplora_eval.interruption import Interrupted, interruptible
from llava_keeplora_recipes.errors import UserError

USER_ERROR = 2
#: Seconds that a process other than the first waits before it reports its error.
ALONE = 6.0
#: Error numbers of a full disk, an exceeded quota, and a file larger than allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
#: Messages of libraries that have run out of memory, address space or threads, other than MemoryError.
EXHAUSTED = re.compile(
    r"can't start new thread|can(?:'t|not) allocate memory|failed to map segment|out of memory"
    r"|std::bad_alloc",
    re.I,
)
#: Characters that a terminal interprets: control characters except tab and line feed, marks that change the
#: direction of text, and surrogates.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return text that is safe for a terminal or a log: characters that it would interpret become `\x1b`."""
    return UNPRINTABLE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


class _Printable:
    """A text stream that escapes what a terminal would interpret.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text after `printable`."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make stdout and stderr writable in a block, also if they are closed or have another encoding.

    A BrokenPipeError in the block is suppressed: the reader of the pipe has closed it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # Otherwise the next file that is opened would get this descriptor.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # The streams of pytest cannot be reconfigured.
            stream.reconfigure(errors="backslashreplace")
    printable_stdout = _Printable(sys.stdout)
    try:
        with redirect_stdout(printable_stdout):
            yield
    except BrokenPipeError:
        pass  # The reader (for instance `| head`) has read enough.
    finally:
        try:
            printable_stdout.flush()
        except OSError:
            # Python flushes stdout once more at exit, which must not fail.
            os.dup2(os.open(os.devnull, os.O_WRONLY), printable_stdout.fileno())


def check_words(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Sequence[str]:
    """Return the words of the command line; the parser exits with an error if one is not valid UTF-8."""
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        if any("\ud800" <= sign <= "\udfff" for sign in word):
            parser.error(f"{ascii(word)[:200]} is no text in UTF-8; use names that are")
    return words


def guarded(action: Callable[[], int | None], debug: bool, going_on: str) -> int:
    """Run an action; an error that a user can repair becomes one sentence on stderr and exit code 2.

    Args:
        action: the function to run; it may return an exit code.
        debug: whether to raise errors with their tracebacks instead.
        going_on: how to go on after Ctrl-C or SIGTERM (exit codes 130 and 143), for the message.

    Returns:
        the exit code.
    """
    _configure_logging(debug)
    bound_caches()
    quiet_libraries()
    try:
        with interruptible():
            code = action() or 0
            sys.stdout.flush()
            return code
    except Interrupted as stop:
        if debug:
            raise
        if is_first_rank():
            _say(f"stopped; {going_on}")
        return stop.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        sentence = describe(error)
        if debug or sentence is None:
            raise
        if not is_first_rank():
            # An error of all processes is reported by the first one, after whose end the launcher ends this
            # process while it waits.
            time.sleep(ALONE)
        _say(f"error: {sentence}")
        return USER_ERROR


def describe(error: Exception) -> str | None:
    """Return one sentence for an error that a user can repair; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if is_exhaustion(error):
        reason = (str(error) or "the system gives no more").strip().splitlines()[0][:200]
        return str(
            UserError(
                f"this needs more memory or threads than there are ({reason})",
                "free some, raise the limits (`ulimit -a`), or lower the batch size",
            )
        )
    if isinstance(error, OSError) and error.strerror:
        return str(UserError(*describe_os_error(error)))
    if isinstance(error, UnicodeEncodeError):
        return str(
            UserError(
                f"{ascii(error.object)[:200]} is no text that UTF-8 can hold", "rename what is called so"
            )
        )
    return None


def is_exhaustion(error: Exception) -> bool:
    """Return whether an error means that memory, address space or threads have run out."""
    # Under a limit of the address space, imports fail with errors other than MemoryError.
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if isinstance(error, MemoryError) or (limited and isinstance(error, (ImportError, SystemError))):
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or EXHAUSTED.search(str(error)) is not None


def describe_os_error(
    error: OSError, where: object = "a file", going_on: str = "run the same command again"
) -> tuple[str, str]:
    """Return the problem and the cure of an error of the file system.

    Args:
        error: the error.
        where: the file that it concerns, if the error names none.
        going_on: what to do once the cause is gone.
    """
    name = where if error.filename is None else error.filename
    if error.errno in FULL:
        return f"there is no room for {name} ({error.strerror})", f"make room, and {going_on}"
    if error.errno in FORBIDDEN:
        return f"{name} cannot be used ({error.strerror})", f"give this user the right to it, and {going_on}"
    return f"{name} cannot be used ({error.strerror})", f"correct the path, and {going_on}"


def is_first_rank() -> bool:
    """Return whether this is the first of a launcher's processes, the one that prints messages."""
    return os.environ.get("RANK", "0") == "0"


def bound_caches() -> None:
    """Bound the caches of kernels that PyTorch and oneDNN compile for bf16 on a CPU, one per shape.

    Batches differ in length, and with the libraries' default of 1024 a run's memory grows by megabytes with
    every new one. The libraries read these variables when they first compute.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "128")


def quiet_libraries() -> None:
    """Suppress messages of libraries that are meant for developers rather than for users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for noisy in (
        "transformers",
        "datasets",
        "accelerate",
        "bitsandbytes",
        "httpx",
        "torch.distributed",
        "filelock",
        "evaluate",
        "absl",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Deprecations concern the calls between libraries.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\b"
    )
    # DeepSpeed resets its logger's level when it is imported, but keeps a filter.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _configure_logging(debug: bool) -> None:
    # All processes log the same, so only the first one prints it. A log that cannot be written must not
    # raise.
    level, logging.raiseExceptions = logging.INFO if is_first_rank() else logging.ERROR, debug
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    if debug and level == logging.INFO:
        logging.getLogger("llava_keeplora").setLevel(logging.DEBUG)


def _say(sentence: str) -> None:
    with suppress(OSError, ValueError):
        sys.stderr.write(printable(" ".join(sentence.splitlines())) + "\n")
        sys.stderr.flush()
