"""The Java programs, played by a script: what is sent, what comes back, and that nothing is left running."""

import importlib.util
import os
import stat
import subprocess
import sys
import time

import pytest

import forked
from llava_keeplora_eval import EvalError, java

PLAYER = """#!{python}
import os, sys, time
part, arguments = {part!r}, sys.argv[1:]
open({log!r}, "a").write(f"{{os.getpid()}}\\n")
if part == "tokenizer":
    assert arguments[-3:] == ["-preserveLines", "-lowerCase", "captions.txt"], arguments
    for line in open("captions.txt", encoding="utf-8"):
        sys.stdout.buffer.write(line.lower().replace(".", " .").encode())
elif part == "meteor":  # as many points as the caption has words of its references
    for line in sys.stdin:
        kind, *texts = line.rstrip("\\n").split(" ||| ")
        if kind == "SCORE":
            words = set(" ".join(texts[:-1]).split())
            print(sum(word in words for word in texts[-1].split()), len(texts[-1].split()), flush=True)
        else:
            pairs = [[float(x) for x in text.split()] for text in texts]
            for hits, all in pairs + [[sum(p[0] for p in pairs), sum(p[1] for p in pairs)]]:
                print(hits / max(all, 1), flush=True)
elif part == "hang":
    time.sleep(600)
elif part == "chatter":  # more complaints than a pipe holds
    sys.stderr.write("x" * 300000)
    sys.stdin.readline()
elif part == "short":
    print("one line")
else:
    sys.exit("Error: out of memory")
"""


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Put a script called java first on the PATH, and tell which processes were started."""
    log = tmp_path / "pids"

    def choose(part):
        script = tmp_path / "bin" / "java"
        script.parent.mkdir(exist_ok=True)
        script.write_text(PLAYER.format(python=sys.executable, part=part, log=str(log)))
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
        return lambda: [int(pid) for pid in log.read_text().split()]

    return choose


def gone(pids):
    """Not running, and not a zombie either: a process that was waited for has no entry."""
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    return bool(pids)


def test_the_tokenizer_gets_every_line_and_gives_one_for_each(play, tmp_path):
    pids = play("tokenizer")
    assert java.tokenize(tmp_path / "a.jar", ["A Dog.", "Ünïcode"]) == ["a dog .", "ünïcode"]
    assert len(pids()) == 1 and gone(pids())


def test_meteor_is_of_the_whole_set_and_an_empty_caption_matches_nothing(play, tmp_path):
    pids = play("meteor")
    captions, references = ["a dog runs", "", "x ||| cat"], [["the dog", "a cat"], ["a bird"], ["cat ||| y"]]
    # 2 of 3 words, 0 of none, 1 of 2
    assert java.meteor(tmp_path / "a.jar", captions, references) == 3 / 5
    assert len(pids()) == 1 and gone(pids())


def test_thousands_of_captions_go_through(play, tmp_path):
    play("meteor")
    assert java.meteor(tmp_path / "a.jar", ["a dog"] * 3000, [["a bird"] * 5] * 3000) == 0.5


@pytest.mark.parametrize(
    "run", [lambda jar: java.tokenize(jar, ["a"], 2), lambda jar: java.meteor(jar, ["a"], [["a"]], 2)]
)
def test_a_program_that_never_ends_is_stopped_and_waited_for(play, tmp_path, run):
    pids = play("hang")
    begin = time.monotonic()
    with pytest.raises(
        EvalError, match="failed: no end after 2 seconds; repair Java, or take it off the PATH"
    ):
        run(tmp_path / "a.jar")
    assert time.monotonic() - begin < 20 and gone(pids())


@pytest.mark.parametrize(
    "run", [lambda jar: java.tokenize(jar, ["a"]), lambda jar: java.meteor(jar, ["a"], [["a"]])]
)
def test_what_a_failing_program_says_is_passed_on(play, tmp_path, run):
    pids = play("fail")
    with pytest.raises(EvalError) as error:
        run(tmp_path / "a.jar")
    assert "failed: Error: out of memory; repair Java, or take it off the PATH to score without it." in str(
        error.value
    )
    assert gone(pids())


def test_complaints_longer_than_a_pipe_stop_nothing(play, tmp_path):
    pids = play("chatter")
    with pytest.raises(EvalError, match="METEOR failed: x{300};"):
        java.meteor(tmp_path / "a.jar", ["a"], [["a"]], 60)
    assert gone(pids())


def test_a_tokenizer_that_loses_a_line_is_refused(play, tmp_path):
    play("short")
    with pytest.raises(EvalError, match="the PTB tokenizer failed: 1 lines for 2 captions"):
        java.tokenize(tmp_path / "a.jar", ["a", "b"])


def test_an_interrupt_leaves_no_process_behind(play, tmp_path, monkeypatch):
    pids = play("meteor")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(java, "_ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        java.meteor(tmp_path / "a.jar", ["a"], [["a"]])
    assert not (tmp_path / "pids").exists() or gone(pids())


def test_no_jar_is_found_without_java_or_without_pycocoevalcap(monkeypatch, tmp_path):
    package = tmp_path / "pycocoevalcap"
    (package / "meteor").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "meteor" / "meteor-1.5.jar").touch()
    spec = importlib.util.spec_from_file_location(
        "pycocoevalcap", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(java.shutil, "which", lambda name: "/bin/java")
    assert java.find_jar(java.METEOR) == package / "meteor" / "meteor-1.5.jar"
    assert java.find_jar(java.TOKENIZER) is None
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    assert java.find_jar(java.METEOR) is None
    monkeypatch.setattr(java.shutil, "which", lambda name: "/bin/java")
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    assert java.find_jar(java.METEOR) is None


@pytest.mark.slow
def test_the_real_java_is_asked_for_with_switches_that_it_knows():
    if not java.shutil.which("java"):
        pytest.skip("no Java")
    command, patience = ["java", *java._SWITCHES, "-version"], forked.patience()
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr
