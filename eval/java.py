"""The two Java programs of caption scoring: the PTB tokenizer and METEOR, from pycocoevalcap's jars.

They are not called through pycocoevalcap's wrappers, because these write into its installed folder, have no
time-out, and leave a process running when they fail.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_keeplora_eval.errors import EvalError

TIMEOUT = 600  # seconds, many times what thousands of captions take
TOKENIZER = "tokenizer/stanford-corenlp-*.jar"
METEOR = "meteor/meteor-*.jar"
# In some locales numbers are printed with a decimal comma, and in others texts lose their accents.
_SWITCHES = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")


def find_jar(pattern: str) -> Path | None:
    """Find a jar of pycocoevalcap; None if that or Java is not installed.

    Args:
        pattern: ``TOKENIZER`` or ``METEOR``.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    if shutil.which("java") is None or package is None:
        return None
    jars = [
        jar for folder in package.submodule_search_locations for jar in sorted(Path(folder).glob(pattern))
    ]
    return jars[0] if jars else None


def _failure(what: str, why: str) -> EvalError:
    return EvalError(f"{what} failed: {why}", "repair Java, or take it off the PATH to score without it")


def _environment() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C.UTF-8"}


def tokenize(jar: Path, lines: Sequence[str], timeout: float = TIMEOUT) -> list[str]:
    """Tokenise lines with the Stanford PTB tokenizer in one process, with pycocoevalcap's options.

    Args:
        jar: the tokenizer's jar.
        lines: texts without line breaks, none of them empty.
        timeout: seconds.

    Returns:
        For each line its tokens, in lower case, separated by spaces.

    Raises:
        EvalError: Java failed, took too long, or gave another number of lines.
    """
    what = "the PTB tokenizer"
    with tempfile.TemporaryDirectory() as folder:
        # The lines are in a file, because on standard input the tokenizer does not see the line break that
        # decides whether a final period belongs to an abbreviation.
        (Path(folder) / "captions.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        command = ["java", *_SWITCHES, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", "captions.txt"]
        try:
            done = subprocess.run(
                command, cwd=folder, env=_environment(), capture_output=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise _failure(what, f"no end after {timeout:g} seconds") from None
    if done.returncode:
        raise _failure(
            what, done.stderr.decode(errors="replace").strip()[-300:] or f"exit code {done.returncode}"
        )
    result = done.stdout.decode().removesuffix("\n").split("\n")
    if len(result) != len(lines):
        raise _failure(what, f"{len(result)} lines for {len(lines)} captions")
    return result


def meteor(
    jar: Path, captions: Sequence[str], references: Sequence[Sequence[str]], timeout: float = TIMEOUT
) -> float:
    """Compute METEOR 1.5 of a set of captions with pycocoevalcap's options: English, normalised.

    Args:
        jar: METEOR's jar.
        captions: tokenised captions; an empty one matches nothing.
        references: for each caption the tokenised references.
        timeout: seconds for the whole set.

    Returns:
        the score aggregated over the set, from 0 to 1.

    Raises:
        EvalError: Java failed or took too long.
    """
    with _meteor_process(jar, timeout) as process:
        stats = [_ask(process, _score_line(*pair)) for pair in zip(captions, references, strict=True)]
        _send(process, " ||| ".join(["EVAL", *stats]))
        for _ in captions:
            process.stdout.readline()  # the captions' scores come first, then that of the set
        return float(process.stdout.readline())


def _score_line(caption: str, references: Sequence[str]) -> str:
    texts = (" ".join(text.replace("|||", " ").split()) for text in (*references, caption))
    return " ||| ".join(["SCORE", *texts])


def _send(process: subprocess.Popen, line: str) -> None:
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def _ask(process: subprocess.Popen, line: str) -> str:
    _send(process, line)
    return process.stdout.readline().strip()


@contextlib.contextmanager
def _meteor_process(jar: Path, timeout: float) -> Iterator[subprocess.Popen]:
    """Start METEOR, which then waits for lines, and end it at the end of the block.

    Raises:
        EvalError: the process failed, or took longer than `timeout` seconds.
    """
    command = ["java", *_SWITCHES, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    # Errors go to a file: a pipe that is not read would block the process once it is full.
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            env=_environment(),
            cwd=jar.parent,
            encoding="utf-8",
        )
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        watchdog = threading.Timer(timeout, stop)
        watchdog.start()
        try:
            yield process
        except (BrokenPipeError, ValueError) as error:  # it has ended, or its output is no number
            process.kill()
            process.wait()
            errors.seek(0)
            reason = errors.read().decode(errors="replace").strip()[-300:] or str(error)
            if timed_out.is_set():
                reason = f"no end after {timeout:g} seconds"
            raise _failure("METEOR", reason) from None
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):  # it may have ended before it read everything
                process.stdin.close()
