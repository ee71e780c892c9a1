"""Real processes without the price of a start: forked off a server that has imported everything and computed nothing.

A command is given as for `subprocess`: `[python, script, ...]`, `[python, "-m", module, ...]`, `[python, "-c", code]`, or the
name of an installed command. Signals, exit codes, environment, working folder and output are those of a process of its own;
what a fork cannot show, imports at the start and the launchers' own processes, is tested with real starts elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

#: One server for all test files of a worker.
SERVER = multiprocessing.get_context("forkserver")
HERE = str(Path(__file__).parent)
SERVER.set_forkserver_preload(
    [
        "forked",
        "warm",
        "llava_keeplora.cli",
        "llava_keeplora_eval.cli",
        "llava_keeplora.sequence.runner",
        "llava_keeplora.export",
        "llava_keeplora.plan",
        "llava_keeplora.compare",
        "llava_keeplora.doctor",
        "llava_keeplora.analysis",
        "deepspeed",
        "matplotlib.figure",
        "transformers.trainer",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.image_processing_pil_clip",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llava.modeling_llava",
        "transformers.models.llava.processing_llava",
    ]
)
#: Seconds that the starts of this process's children took; the first waits for the server's imports.
STARTS: list[float] = []
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")


class Forked:
    """A started command, with the part of `subprocess.Popen` that tests use.

    Args:
        command: the words of the command line.
        cwd: the working folder; this process's own when None.
        env: the environment; this process's own, without a launcher's variables, when None.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ):
        env = {k: v for k, v in os.environ.items() if k not in LAUNCHED} if env is None else dict(env)
        self._files = [tempfile.TemporaryFile() for _ in range(2)]
        names = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self._files]
        self._process = SERVER.Process(
            target=_run, args=(list(map(str, command)), str(cwd or os.getcwd()), env, names), daemon=True
        )
        begun = time.monotonic()
        ensure_server()
        self._process.start()
        STARTS.append(time.monotonic() - begun)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    poll = lambda self: self._process.exitcode  # noqa: E731

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it lasts longer than `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked command", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; what it wrote to stdout and to stderr."""
        self.wait(timeout)
        return self.output(0), self.output(1)

    def output(self, stream: int) -> str:
        """What it has written so far: 0 for stdout, 1 for stderr."""
        self._files[stream].seek(0)
        return self._files[stream].read().decode()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def ensure_server() -> None:
    """Start the server unless it runs, with this folder on its path: what it can't import it passes over in silence."""
    path = os.environ.get("PYTHONPATH")
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([HERE, *([path] if path else [])])):
        forkserver.ensure_running()


def patience() -> float:
    """Seconds to wait for a command: a multiple of what the imports of a start took on this machine, as busy as it is."""
    if not STARTS:
        Forked([sys.executable, "-c", ""]).wait()
    return max(200.0, 60 * max(STARTS))


def run(
    command: Sequence[str | Path], timeout: float | None = None, processes: int = 1, **options
) -> tuple[int, str, str]:
    """Run a command to its end.

    Args:
        command: see `Forked`.
        timeout: seconds; `patience()` when None.
        processes: how many ranks run it, with a launcher's environment where there are several; when one fails the others are stopped.
        options: of `Forked`.

    Returns:
        (the first exit code that isn't 0, stdout, stderr), the outputs one rank after another.
    """
    if processes == 1:
        ranks = [Forked(command, **options)]
    else:
        common = dict(os.environ.items()) | {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        ranks = [
            Forked(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
            for rank in range(processes)
        ]
    timeout = timeout or patience()
    deadline, code = time.monotonic() + timeout, 0
    try:
        while any(rank.returncode is None for rank in ranks):
            code = code or next((rank.returncode for rank in ranks if rank.returncode), 0)
            if code:
                [rank.send_signal(signal.SIGTERM) for rank in ranks]
                # One that waits for the dead in a collective hears no signal but the last, as under DeepSpeed's launcher.
                until = time.monotonic() + patience() / 100
                while any(rank.returncode is None for rank in ranks) and time.monotonic() < until:
                    time.sleep(0.01)
                [rank.kill() for rank in ranks]
                [rank.wait(30) for rank in ranks]
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(list(map(str, command)), timeout)
            time.sleep(0.01)
    finally:
        [rank.kill() for rank in ranks]
    code = code or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return code, "".join(rank.output(0) for rank in ranks), "".join(rank.output(1) for rank in ranks)


def free_port() -> int:
    """A port of this machine; another suite may be running on it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(command: list[str], cwd: str, env: dict[str, str], outputs: list[str]) -> None:
    """Become the command, inside the forked process."""
    for stream, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    os.fsync = lambda descriptor: None  # See conftest.py.
    assert "warm" in sys.modules, "the server has not imported what its children share"
    program, *words = command
    sys.path[0:0] = [""] if words[:1] in (["-c"], ["-m"]) else []
    if program == sys.executable or Path(program).name.startswith("python"):
        kind, *words = words
        if kind == "-c":
            sys.argv = ["-c", *words[1:]]
            exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0:0] = [kind, *words], [str(Path(kind).resolve().parent)]
            runpy.run_path(kind, run_name="__main__")
    else:
        sys.argv = [program, *words]
        (script,) = importlib.metadata.entry_points(group="console_scripts", name=Path(program).name)
        sys.exit(script.load()())


if HERE not in sys.path:
    # The server imports this module by its name.
    sys.path.insert(0, HERE)
