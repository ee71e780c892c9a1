"""Whatever a file of a run holds, its reader gives a valid object or one sentence: nothing else is raised or executed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import changed, damaged, fuzz, lines, tried
from llava_keeplora.config import load_config, parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.journal import Entry, Journal, open_stages
from llava_keeplora.run_folder import BASE_STAGES, STAGES
from llava_keeplora.saved_run import load_run, run_identity
from llava_keeplora.versions import version_changes
from llava_keeplora_eval import Matrix

# --- configurations ------------------------------------------------------------------------------

CONFIG = {
    "output_dir": "runs/x",
    "seed": 1,
    "tasks": ["digits", "shapes"],
    "model": {"name_or_path": "tiny-clip", "dtype": "float32"},
    "parts": {
        "vision": {"targets": ["q_proj"], "rank": 2, "alpha": 2, "energy_weight": 0.5},
        "text": {"learning_rate": 0.1},
    },
    "methods": {
        "seq-lora": {},
        "mine": {
            "method": "keeplora",
            "gradient_fraction": 0.5,
            "training": {"learning_rate": 0.5},
            "parts": {"text": {"rank": 3}},
        },
    },
    "training": {
        "num_train_epochs": [1, 2],
        "per_device_train_batch_size": 8,
        "learning_rate": 0.01,
        "deepspeed": {"zero_optimization": {"stage": 2}},
    },
    "data": {"root": None, "holdout": 0.1},
    "evaluation": {"batch_size": 4},
    "memory": {"statistics_gb": 2},
    "expected": {
        "mine": {"source": "a paper", "tolerance": 1, "figures": {"last": 50.0}, "last": {"digits": 40}}
    },
}


@given(tree=changed(CONFIG))
@fuzz
def test_a_configuration(tree):
    config = tried(lambda: parse_config(tree))
    if config is not None:
        tried(lambda: run_identity(config))


@given(
    data=damaged(yaml.safe_dump(CONFIG).encode()),
    overrides=st.lists(
        st.text(max_size=8)
        | st.sampled_from(["seed=[", "parts.vision.rank=x", "tasks=3", "a.b=1", "data=1"]),
        max_size=2,
    ),
)
@fuzz
def test_the_bytes_of_a_configuration_and_overrides(place, data, overrides):
    (place / "run.yaml").write_bytes(data)
    tried(lambda: load_config(str(place / "run.yaml"), overrides))


@pytest.mark.parametrize("name", ["config.json", "identity.json", "versions.json"])
@given(data=st.data())
@fuzz
def test_the_files_of_a_run_itself(whole, name, data):
    content = json.loads(whole.files[name])
    text = data.draw(
        changed(content).map(lambda tree: json.dumps(tree).encode()) | damaged(whole.files[name])
    )
    (whole.root / name).write_bytes(text)
    try:
        config = tried(lambda: load_run(whole.root))
        if config is not None:
            tried(lambda: run_identity(config))
        tried(lambda: version_changes(whole.root))
    finally:
        (whole.root / name).write_bytes(whole.files[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A claimed run folder and the content of its own files."""
    from llava_keeplora.sequence.workspace import Workspace

    workspace = Workspace(
        parse_config(CONFIG | {"output_dir": str(tmp_path_factory.mktemp("claimed") / "run")})
    )
    with workspace.locked():
        workspace.claim()
    return SimpleNamespace(
        root=workspace.root, files={path.name: path.read_bytes() for path in workspace.root.glob("*.json")}
    )


# --- what runs and the harness write --------------------------------------------------------------

ORDER = [(0, stage) for stage in BASE_STAGES] + [(1, stage) for stage in STAGES]
ENTRIES = [
    {
        "task": task,
        "stage": stage,
        "seconds": 1.0,
        "files": {"0.png": "0" * 64},
        "info": {"tasks": [{"task": "a"}]} if (task, stage) == (0, "PLANNED") else {},
    }
    for task, stage in ORDER
]


@given(text=changed(ENTRIES).map(lines) | damaged(lines(ENTRIES)))
@example(text=b"null\nnull\n")
@fuzz
def test_a_journal(place, text):
    path = place / "journal.jsonl"
    path.write_bytes(text)
    journal = tried(lambda: Journal(path))
    if journal is not None:
        tried(lambda: open_stages(journal.entries, 2))
        assert all(isinstance(problem, UserError) for problem in journal.problems())
        journal.append(Entry(9, "PLANNED"))
        assert [entry.task for entry in Journal(path).entries] == [entry.task for entry in journal.entries]


MATRIX = Matrix(["a", "b"], [1.0, 2.0], [[3.0, 4.0], [5.0, None]]).to_dict()


@given(
    text=changed(MATRIX).map(lambda tree: json.dumps(tree).encode()) | damaged(json.dumps(MATRIX).encode())
)
@fuzz
def test_a_matrix(place, text):
    (place / "matrix.json").write_bytes(text)
    matrix = tried(lambda: Matrix.from_json(place / "matrix.json"))
    if matrix is not None:
        assert matrix.markdown() and Path(place).is_dir()
