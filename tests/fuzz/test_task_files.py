"""Whatever a file of a task holds, its reader gives a valid object or one sentence: nothing else is raised or executed."""

import io
import json
import pickle
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from fuzzing import changed, damaged, fuzz, lines, tried
from llava_keeplora.config import load_config
from llava_keeplora.errors import UserError
from llava_keeplora_eval import score
from llava_keeplora_recipes import inspect_split, load_recipe, load_sequence, load_split

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


@pytest.mark.parametrize(
    "task",
    [pytest.param(t, marks=[pytest.mark.slow] * (t != "mtil/mnist")) for t in ARCHIVES],
)
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
