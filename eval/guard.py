"""Between the shell and a command, for every program.

Streams, signals, quiet libraries, and one sentence for what a user can repair.
"""

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
#: Seconds after which a process takes itself to be the only one that failed.
ALONE = 6.0
#: A disk, a quota, and the largest file that a user may write.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
#: How the libraries say that memory, address space or threads have run out, where they raise no MemoryError.
EXHAUSTED = re.compile(
    r"can't start new thread|can(?:'t|not) allocate memory|failed to map segment|out of memory"
    r"|std::bad_alloc",
    re.I,
)
#: What a terminal acts on instead of showing it: control characters but for tab and line feed, and marks that
#: turn the direction of text.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return text for a terminal or a log.

    What it would act on, such as the escape codes of a name, is shown as `\x1b`.
    """
    return UNPRINTABLE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


class _Printable:
    """A stream for text that only shows it.

    Args:
        stream: where the text goes.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text without what a terminal would act on."""
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def standard_streams() -> Iterator[None]:
    """Let a program write to stdout whatever it is.

    Closed, a pipe that nobody reads any more, or in another encoding.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # Otherwise the next file that is opened would be taken for it.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # A test's stream.
            stream.reconfigure(errors="backslashreplace")
    printable_stdout = _Printable(sys.stdout)
    try:
        with redirect_stdout(printable_stdout):
            yield
    except BrokenPipeError:
        pass  # The reader (`| head`) has what it wants.
    finally:
        try:
            printable_stdout.flush()
        except OSError:
            # Nothing is left to write to at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), printable_stdout.fileno())


def check_words(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> Sequence[str]:
    """Return the words of the command line, which are refused by the parser where they are no text."""
    words = sys.argv[1:] if argv is None else argv
    for word in words:
        if any("\ud800" <= sign <= "\udfff" for sign in word):
            parser.error(f"{ascii(word)[:200]} is no text in UTF-8; use names that are")
    return words


def guarded(action: Callable[[], int | None], debug: bool, going_on: str) -> int:
    """Run an action; an error that a user can repair becomes one sentence on stderr and exit code 2.

    Args:
        action: what to run; an exit code that it returns is kept.
        debug: raise errors instead, with their tracebacks.
        going_on: what is said after Ctrl-C and SIGTERM, whose exit codes are 130 and 143.
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
            # What is wrong in every process is said by the first one, whose end makes the launcher end this
            # one meanwhile.
            time.sleep(ALONE)
        _say(f"error: {sentence}")
        return USER_ERROR


def describe(error: Exception) -> str | None:
    """Describe in one sentence an error that a user can repair; None for any other."""
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
    """Return whether memory, address space or threads have run out, however a library says so."""
    # An import that runs into a limit of the address space fails in ways of its own.
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if isinstance(error, MemoryError) or (limited and isinstance(error, (ImportError, SystemError))):
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or EXHAUSTED.search(str(error)) is not None


def describe_os_error(
    error: OSError, where: object = "a file", going_on: str = "run the same command again"
) -> tuple[str, str]:
    """Return the problem and the cure of what the file system refuses.

    Args:
        error: what it raised.
        where: what an error is about that names no file.
        going_on: what to do once the cause is gone.
    """
    name = where if error.filename is None else error.filename
    if error.errno in FULL:
        return f"there is no room for {name} ({error.strerror})", f"make room, and {going_on}"
    if error.errno in FORBIDDEN:
        return f"{name} cannot be used ({error.strerror})", f"give this user the right to it, and {going_on}"
    return f"{name} cannot be used ({error.strerror})", f"correct the path, and {going_on}"


def is_first_rank() -> bool:
    """Return whether this is the one of a launcher's processes that speaks."""
    return os.environ.get("RANK", "0") == "0"


def bound_caches() -> None:
    """Keep a bounded number of products that PyTorch and oneDNN compile for bf16 on a CPU, one per shape.

    Batches differ in length, and with the libraries' own limit of 1024 a run's memory grows by megabytes with
    every new one. The libraries read this when they first compute.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "128")


def quiet_libraries() -> None:
    """Keep what concerns the libraries' authors rather than this program's user off the terminal."""
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
    # Libraries tell one another what they will remove.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\b"
    )
    # DeepSpeed sets its logger's level when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _configure_logging(debug: bool) -> None:
    # Every process sees the same; the first one tells it. A log that cannot be written is no reason for a
    # traceback.
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
