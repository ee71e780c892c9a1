"""Whatever a file holds, its reader gives a valid object or one sentence: nothing else is raised, and nothing is executed.

A valid file is changed in a few places, as data or as bytes; the changes are the same in every run of the suite.
"""

import copy
import io
import json
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from llava_keeplora.config import load_config, parse_config
from llava_keeplora.errors import UserError
from llava_keeplora.journal import Entry, Journal, open_stages
from llava_keeplora.run_folder import BASE_STAGES, STAGES
from llava_keeplora.saved_run import load_run, run_identity
from llava_keeplora.versions import version_changes
from llava_keeplora_eval import Matrix, score
from llava_keeplora_recipes import inspect_split, load_recipe, load_sequence, load_split

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def at_random(draw, tree):
    """A container inside a tree, and one of its keys or positions."""
    key = draw(st.sampled_from(list(tree) if isinstance(tree, dict) else range(len(tree))))
    inner = tree[key]
    if isinstance(inner, (dict, list)) and inner and draw(st.integers(0, 3)):
        return at_random(draw, inner)
    return tree, key


@st.composite
def changed(draw, tree, values=VALUES):
    """A tree of plain data, changed in one to three places: another value, one less, one more, or one from elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        if not tree:
            break
        place, key = at_random(draw, tree)
        what = draw(st.sampled_from(["value", "gone", "more", "moved"]))
        if what == "value":
            place[key] = draw(values)
        elif what == "gone":
            del place[key]
        elif what == "more" and isinstance(place, dict):
            place[draw(st.text(max_size=6))] = draw(values)
        elif what == "more":
            place.append(draw(values))
        else:
            other, from_key = at_random(draw, tree)
            place[key] = copy.deepcopy(other[from_key])
    return tree


@st.composite
def damaged(draw, data: bytes):
    """Bytes with some of them replaced, taken out, doubled or cut off."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        data = draw(
            st.sampled_from(
                [
                    data[:start] + draw(st.binary(max_size=6)) + data[end:],
                    data[:end] + data[start:],
                    data[:start],
                ]
            )
        )
    return data


def tried(read):
    """Read, or be told why not in a sentence."""
    try:
        return read()
    except UserError as error:
        assert str(error).strip().endswith(".") and "\n" not in str(error), "an error is one sentence"
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three pictures."""
    root = tmp_path_factory.mktemp("fuzz")
    for i in range(3):
        Image.fromarray(np.full((4, 4, 3), 60 * i, np.uint8)).save(root / f"{i}.png")
    datasets.disable_progress_bars()
    return root


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


# --- recipes and sequences -----------------------------------------------------------------------

COMMON = {"version": 1, "licence": "MIT", "splits": {"train": "train.json", "test": ["a.json", "b.json"]}}
RECIPES = {
    "classes": {
        **COMMON,
        "name": "pets",
        "kind": "classification",
        "metric": "accuracy",
        "prompt": "a {c}.",
        "classes": ["cat", "dog"],
        "num_classes": 2,
        "class_names": {"0": "cat"},
        "source": {"format": "parquet", "path": "pets", "columns": {"image": "img"}},
        "seen_by": ["clip"],
        "expected_sizes": {"train": 2},
    },
    "questions": {
        **COMMON,
        "name": "q/a",
        "kind": "vqa",
        "metric": "exact_match",
        "prompt": "{q} ?",
        "test_prompt": {"yes": "{q}", "other": "{q}!"},
        "source": {
            "format": "llava_json",
            "path": ".",
            "images": {"train": "x"},
            "positional_ids": ["test"],
            "references": {"test": "r.json"},
            "meta": ["kind"],
        },
    },
    "drawn": {
        "name": "drawn",
        "kind": "classification",
        "metric": "accuracy",
        "licence": "MIT",
        "source": {"format": "rendered", "task": "shapes"},
        "splits": {"train": "train"},
    },
    "extending": {"extends": "digits", "name": "mine", "description": "x"},
    "lines": {
        "extends": "mtil/dtd",
        "source": {
            "format": "image_list",
            "path": ".",
            "pattern": "(?P<image>(?P<label>.+)/.+)",
            "suffix": ".jpg",
        },
    },
}


@pytest.mark.parametrize("kind", RECIPES)
@given(data=st.data())
@fuzz
def test_a_recipe(place, kind, data):
    text = data.draw(
        changed(RECIPES[kind]).map(lambda tree: yaml.safe_dump(tree).encode())
        | damaged(yaml.safe_dump(RECIPES[kind]).encode())
    )
    (place / "recipe.yaml").write_bytes(text)
    recipe = tried(lambda: load_recipe(place / "recipe.yaml"))
    if recipe is not None:
        assert len(recipe.fingerprint) == 64
        for split in recipe.splits:
            if recipe.source["format"] != "hub":
                tried(lambda: load_split(recipe, split, place))


SEQUENCE = {
    "name": "mine",
    "description": "x",
    "tasks": ["digits", "a.yaml"],
    "epochs": [1, 2],
    "not_scored": {"a": "why"},
}


@given(
    text=changed(SEQUENCE).map(lambda tree: yaml.safe_dump(tree).encode())
    | damaged(yaml.safe_dump(SEQUENCE).encode())
)
@fuzz
def test_a_sequence(place, text):
    (place / "sequence.yaml").write_bytes(text)
    tried(lambda: load_sequence(place / "sequence.yaml"))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system ''",
    ],
)
def test_yaml_that_would_run_a_command_runs_none(tmp_path, tag):
    path, marker = tmp_path / "evil.yaml", tmp_path / "ran"
    path.write_text(f"name: {tag.format(marker)}\n")
    for read in (load_recipe, load_sequence, load_config):
        with pytest.raises(UserError, match="is not valid YAML"):
            read(str(path))
    with pytest.raises(UserError, match="has a value that is not valid YAML"):
        load_config("demo", [f"seed={tag.format(marker)}"])
    assert not marker.exists()


# --- the data of a task --------------------------------------------------------------------------


def spoken(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROWS = {
    "llava_json": [
        {"id": "a", "image": "0.png", "conversations": spoken("<image>\nWhat?", "a cat")},
        {"id": 2, "image": ["1.png", "2.png"], "conversations": spoken("<image><image>Which?", "b")},
        {"question_id": "c", "text": "And?", "answer": ["x", 3], "kind": "k"},
    ],
    "messages": [
        {
            "id": "a",
            "images": ["0.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "a"},
            ],
        },
        {
            "image": "1.png",
            "messages": [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "b"}],
        },
    ],
    "coco_captions": {
        "images": [{"id": 1, "file_name": "0.png"}, {"id": 2, "file_name": "1.png"}],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "a cat"},
            {"id": 2, "image_id": 2, "caption": "a dog"},
        ],
    },
    "references": {
        "data": [
            {"question_id": "a", "answers": ["x"]},
            {"question_id": 2, "answers": ["y"]},
            {"question_id": "c", "answers": ["z"]},
        ]
    },
}


def questions(source, name):
    kind = (
        {"kind": "captioning", "metric": "caption_rouge_l", "prompt": "Say."}
        if source["format"] == "coco_captions"
        else {"kind": "vqa", "metric": "exact_match"}
    )
    return {**COMMON, **kind, "name": "fuzzed", "source": source, "splits": {"train": name}}


@pytest.mark.parametrize("form", ROWS)
@given(data=st.data())
@fuzz
def test_the_records_of_a_task(place, form, data):
    text = data.draw(
        changed(ROWS[form]).map(lambda rows: json.dumps(rows).encode())
        | damaged(json.dumps(ROWS[form]).encode())
    )
    source = {"format": form, "path": "."} | (
        {"images": "."} if form == "coco_captions" else {"meta": ["kind"]} if form == "llava_json" else {}
    )
    if form == "references":
        source = {"format": "llava_json", "path": ".", "references": {"train": "references.json"}}
        (place / "rows.json").write_text(json.dumps(ROWS["llava_json"]))
    (place / ("references.json" if form == "references" else "rows.json")).write_bytes(text)
    (place / "fuzzed.yaml").write_text(yaml.safe_dump(questions(source, "rows.json")))
    recipe = load_recipe(place / "fuzzed.yaml")
    loaded = tried(lambda: load_split(recipe, "train", place))
    if loaded is not None:
        assert all(
            loaded[i].question and isinstance(loaded[i].answers, (list, tuple)) for i in range(len(loaded))
        )
    _, problems = inspect_split(recipe, "train", place)
    assert (loaded is None) == bool(problems), "`data check` tells what a run refuses, and nothing else"


@given(text=damaged(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS["llava_json"])))
@fuzz
def test_the_records_of_a_task_line_by_line(place, text):
    (place / "rows.jsonl").write_bytes(text)
    (place / "lines.yaml").write_text(
        yaml.safe_dump(questions({"format": "llava_json", "path": "."}, "rows.jsonl"))
    )
    tried(lambda: load_split(load_recipe(place / "lines.yaml"), "train", place))


def mat(**variables) -> bytes:
    file = io.BytesIO()
    savemat(file, variables)
    return file.getvalue()


#: task of MTIL → the files of a tiny set of it, all in one folder, and the files that hold a split.
ARCHIVES = {
    "mtil/dtd": ({"list": b"a/0.png\nb/1.png\n"}, "list"),
    "mtil/mnist": (
        {
            "images": struct.pack(">4I", 0x803, 2, 2, 2) + bytes(8),
            "labels": struct.pack(">2I", 0x801, 2) + bytes([0, 1]),
        },
        ["images", "labels"],
    ),
    "mtil/cifar100": (
        {
            "train": pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]}, 2),
            "meta": pickle.dumps({"fine_label_names": ["a", "b"]}, 2),
        },
        "train",
    ),
    "mtil/flowers": (
        {
            "imagelabels.mat": mat(labels=np.array([[1, 2]], np.uint8)),
            "setid.mat": mat(trnid=np.array([[1, 2]], np.uint16)),
        },
        "trnid",
    ),
    "mtil/stanfordcars": (
        {
            "train.mat": mat(
                annotations=np.array(
                    [[(np.uint8(1), "0.png"), (np.uint8(2), "1.png")]], [("class", object), ("fname", object)]
                )
            ),
            "devkit/cars_meta.mat": mat(class_names=np.array([["a", "b"]], object)),
        },
        "train.mat",
    ),
}


@pytest.mark.parametrize("task", ARCHIVES)
@given(data=st.data())
@fuzz
def test_the_files_of_mtil(place, task, data):
    files, split = ARCHIVES[task]
    spoiled = data.draw(st.sampled_from(sorted(files)))
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data.draw(damaged(content)) if name == spoiled else content)
    for number, picture in enumerate(("image_00001.jpg", "image_00002.jpg")):
        (place / picture).write_bytes((place / f"{number}.png").read_bytes())
    source = (
        load_recipe(task).source
        | {"path": "."}
        | ({"images": "."} if "images" in load_recipe(task).source else {})
    )
    facts = {
        "extends": task,
        "source": source,
        "splits": {"train": split},
        "expected_sizes": {},
        "classes": ["a", "b"],
        "class_names": {},
        "num_classes": 2,
    }
    (place / "archive.yaml").write_text(yaml.safe_dump(facts))
    recipe = load_recipe(place / "archive.yaml")
    loaded = tried(lambda: load_split(recipe, "train", place))
    if loaded is not None:
        assert len(loaded) and loaded[0].image.mode == "RGB"
    _, problems = inspect_split(recipe, "train", place)
    assert (loaded is None) == bool(problems)


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


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


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


@pytest.fixture(scope="module")
def answered(place):
    """A task of three questions, and a file of answers to them."""
    (place / "asked.json").write_text(json.dumps(ROWS["llava_json"]))
    (place / "asked.yaml").write_text(
        yaml.safe_dump(questions({"format": "llava_json", "path": "."}, "asked.json"))
    )
    data = load_split(load_recipe(place / "asked.yaml"), "train", place)
    rows = [
        {
            "id": key,
            "text": "a cat",
            "recipe": data.recipe.name,
            "version": 1,
            "fingerprint": data.fingerprint,
        }
        for key in data.ids
    ]
    return SimpleNamespace(data=data, rows=rows)


@given(data=st.data())
@fuzz
def test_a_file_of_answers(place, answered, data):
    (place / "answers.jsonl").write_bytes(
        data.draw(changed(answered.rows).map(lines) | damaged(lines(answered.rows)))
    )
    found = tried(lambda: score(answered.data, place / "answers.jsonl"))
    assert found is None or (found.n == 3 and 0 <= found.score <= 100)


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
