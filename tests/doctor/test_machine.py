"""What a machine has is told, and what a run could not start with is an error that names its cure."""

import re
from importlib import metadata

import pytest

from llava_keeplora import cli


@pytest.fixture(autouse=True)
def own_extensions(tmp_path, monkeypatch):
    """A cache of compiled extensions of the test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))


def test_this_machine_can_run(capfd):
    assert cli.main(["doctor"]) == 0
    out = capfd.readouterr().out
    for words in (
        "python 3.",
        "torch ",
        "peft ",
        "evaluate ",
        "CPU: ",
        "GB free",
        "Java: ",
        "C++ compiler: ",
        "ninja: ",
        "offline, by HF_HUB_OFFLINE",
    ):
        assert words in out
    assert "pytest" not in out, "a test's libraries are no requirement"


def test_a_library_that_is_too_old_or_missing_is_reported_with_the_command(monkeypatch, capfd):
    real = metadata.version

    def version(name):
        if name == "evaluate":
            raise metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "peft" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert cli.main(["doctor"]) == 2
    out, err = capfd.readouterr()
    assert re.search(
        r"peft is 0\.0\.1, and llava-keeplora needs (\S*>=0\.19\S*); install it: pip install 'peft\1'\.", out
    )
    assert re.search(r"evaluate is not installed; install it: pip install 'evaluate\S*>=0\.4\.6\S*'\.", out)
    assert "this machine has 2 things to repair" in err


def test_the_lock_of_a_killed_build_is_reported_with_the_command_that_removes_it(tmp_path, capfd):
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    with lock.open("w"):
        assert cli.main(["doctor"]) == 0, "somebody is compiling"
    assert cli.main(["doctor"]) == 2
    assert f"every start of DeepSpeed would wait for it; remove it: `rm {lock}`." in capfd.readouterr().out
