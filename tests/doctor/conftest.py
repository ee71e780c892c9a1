"""A finished run to damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def whole_run(run_config, tiny_tasks, tmp_path_factory) -> Path:
    """A run of KeepLoRA on two tasks; shared, so copy it."""
    from llava_keeplora.sequence import runner

    config = run_config(
        tmp_path_factory.mktemp("whole") / "run",
        methods={"keeplora": {}},
        tasks=[str(path) for path in tiny_tasks[:2]],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_run_report", lambda root: None)
        runner.run(config)
    return Path(config.output_dir)


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))
