"""A run of KeepLoRA on two tasks as a YAML file."""

import pytest
import yaml


@pytest.fixture
def config_file(run_tree, tiny_tasks, tmp_path):
    """Function (**changes) → a YAML of KeepLoRA on two tasks."""

    def write(**changes):
        path = tmp_path / "run.yaml"
        changes = {"methods": {"keeplora": {}}, "tasks": [str(p) for p in tiny_tasks[:2]]} | changes
        path.write_text(yaml.safe_dump(run_tree("unset", **changes)))
        return path

    return write
