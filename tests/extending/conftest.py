"""What the tests of plug-ins share: runs that are stopped after every stage, exports, and children of tables."""

from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import pytest

import forked
from llava_keeplora.compare import jobs
from llava_keeplora.config import load_config
from llava_keeplora.export import verify, verify_worker
from llava_keeplora.journal import Journal


@pytest.fixture
def quick_reload(monkeypatch):
    """Exports are loaded again in this process; tests/export does it in a fresh one."""

    def reload(folder):
        with chdir(folder):
            verify_worker.main()

    monkeypatch.setattr(verify, "verify_in_fresh_process", reload)


@pytest.fixture
def stopped_run(driven, monkeypatch):
    """Function (configuration, run folder, label) → the run, stopped just before every stage of a row is recorded."""

    def run(config: Path, folder: Path, label: str) -> Path:
        append, done = Journal.append, set()

        def stop(self, entry):
            if (key := (self.path, entry.task, entry.stage)) not in done and self.path.parent.name == label:
                done.add(key)
                raise InterruptedError
            append(self, entry)

        monkeypatch.setattr(Journal, "append", stop)
        for _ in range(40):
            try:
                driven(load_config(str(config), output_dir=str(folder)))
                break
            except InterruptedError:
                continue
        assert len(done) > 8
        return folder

    return run


class Child(forked.Forked):
    """A child of a table, forked instead of started; its log is written when it has ended."""

    def __init__(self, command, env, stdout, **options):
        super().__init__(command, env=env)
        self.log = Path(stdout.name)

    def poll(self):
        if self.returncode is not None:
            self.log.write_text(self.output(1))
        return self.returncode


@pytest.fixture
def forked_children(monkeypatch):
    """The children of tables are forked."""
    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=Child, DEVNULL=None))
