"""Between the shell and a command: no traceback whatever stdout, the command line, the file system or the memory is like."""

import argparse
import errno
import logging
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import forked
from llava_keeplora import cli
from llava_keeplora_eval import cli as eval_cli
from llava_keeplora_eval import guard

BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("redirection", "code", "err"),
    [
        ("| head -1; exit ${PIPESTATUS[0]}", 0, ""),
        pytest.param(">&-", 0, "", marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", 0, "", marks=pytest.mark.slow),
        (">/dev/full", 2, "error: there is no room for a file"),
    ],
)
def test_a_stdout_that_is_closed_or_full_is_no_traceback(redirection, code, err):
    done = subprocess.run(
        ["bash", "-c", f"{BIN / 'llava-keeplora-eval'} list {redirection}"],
        capture_output=True,
        text=True,
        timeout=forked.patience(),
    )
    assert (
        done.returncode == code and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    )
    assert done.stderr.startswith(err) and done.stderr.count("\n") == (1 if err else 0)


def ended(error: Exception, capfd) -> tuple[int, str]:
    def action():
        raise error

    code = guard.guarded(action, debug=False, going_on="")
    return code, capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "more memory or threads"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nlong"
            ),
            "you tried to allocate 9",
        ),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "failed to map"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300),
            "nnn.*File name too long.*correct the path",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "a\x1b[31m\nb"), r"a\\x1b\[31m b cannot be used"),
        (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), r"'a\\udcff' is no text"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(error, words, capfd):
    code, err = ended(error, capfd)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert re.search(words, err), err


def test_an_import_that_fails_under_a_limit_of_memory_is_one_sentence_and_without_one_a_traceback(
    monkeypatch, capfd
):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2 << 30, 2 << 30))
    assert ended(SystemError("returned NULL without setting an exception"), capfd)[0] == 2
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    with pytest.raises(SystemError):
        ended(SystemError("returned NULL without setting an exception"), capfd)


@pytest.mark.parametrize(
    "words",
    [["train", "--config", "a\udcff"], ["report", "\udcff"], ["train", "--config", "demo", "seed=\udcff"]],
)
def test_words_that_are_no_text_are_refused_by_both_programs(words, capfd):
    for main in (cli.main, eval_cli.main):
        with pytest.raises(SystemExit, match="2"):
            main(words if main is cli.main else ["list", words[-1]])
        assert "udcff" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        ["report", "n" * 300],
        ["doctor", "n" * 300],
        ["train", "--config", "n" * 300],
        ["train", "--config", "demo", "--methods", "n" * 300],
    ],
)
def test_a_name_that_no_file_system_holds_is_one_sentence(words, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1


def test_what_a_terminal_would_act_on_is_shown_in_results_logs_and_errors(capfd):
    hostile = "a\x1b[2J\x07\x9b\u202e\rb"
    shown = "a\\x1b[2J\\x07\\x9b\\u202e\\rb"
    with guard.standard_streams():
        assert guard.guarded(lambda: print(f"{hostile}\t1"), debug=False, going_on="") == 0
    assert capfd.readouterr().out == f"{shown}\t1\n"
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (hostile,), None)
    assert guard._PrintableFormatter("%(message)s").format(record) == shown
    assert shown.replace("\\r", " ") in ended(guard.UserError(hostile, "x"), capfd)[1]


def test_the_parser_names_a_word_by_its_escapes(capfd):
    with pytest.raises(SystemExit):
        guard.check_words(argparse.ArgumentParser(), ["\udc80"])
    assert "'\\udc80' is no text in UTF-8" in capfd.readouterr().err
