"""What fuzzing found, each case with the sentence that it is now."""

import json
import re

import pytest
import yaml

from llava_keeplora.config import parse_config
from llava_keeplora.errors import ConfigError, RunError
from llava_keeplora.journal import Journal
from llava_keeplora_eval import EvalError, Matrix
from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split

COMMON = {
    "name": "found",
    "version": 1,
    "licence": "MIT",
    "metric": "accuracy",
    "splits": {"train": "train.json"},
}
PETS = {**COMMON, "kind": "classification", "prompt": "a {c}.", "classes": ["cat", "dog"]}
QUESTIONS = {**COMMON, "kind": "vqa", "metric": "exact_match"}
DRAWN = {"name": "found", "kind": "classification", "metric": "accuracy", "licence": "MIT"}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (PETS | {"source": {"format": [], "path": "."}}, "has the source format '[]'"),
        (
            PETS | {"source": {"format": "parquet", "path": ".", None: 1}},
            "has the unknown key 'source.None' for format parquet",
        ),
        (
            PETS | {"source": {"format": "parquet", "path": ".", "columns": {"image": 3}}},
            "has 3 under 'source.columns', which YAML does not read as text",
        ),
        (
            QUESTIONS
            | {"source": {"format": "llava_json", "path": ".", "positional_ids": [{"train": None}]}},
            "has {'train': None} under 'source.positional_ids', which YAML does not read as text",
        ),
        (
            DRAWN | {"source": {"format": "rendered", "task": []}, "splits": {"train": "train"}},
            "names the rendered task '[]', which does not exist",
        ),
        (
            DRAWN | {"source": {"format": "rendered", "task": "shapes"}, "splits": {"train": []}},
            "names the split '[]', which 'shapes' does not have",
        ),
        ({"two\nlines": 1}, "has the unknown key 'two lines'"),
    ],
)
def test_a_recipe(tmp_path, facts, words):
    (tmp_path / "found.yaml").write_text(yaml.safe_dump(facts))
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        load_recipe(tmp_path / "found.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"images": [{"id": [1], "file_name": "0.png"}], "annotations": []},
            "entry 0 of 'images' in train.json has the list",
        ),
        (
            {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": {}, "caption": "a"}]},
            "'image_id' of entry 0 of 'annotations' in train.json has the object {}",
        ),
    ],
)
def test_captions(tmp_path, content, words):
    (tmp_path / "train.json").write_text(json.dumps(content))
    source = {"format": "coco_captions", "path": ".", "images": "."}
    (tmp_path / "found.yaml").write_text(
        yaml.safe_dump(
            {**COMMON, "kind": "captioning", "metric": "caption_rouge_l", "prompt": "Say.", "source": source}
        )
    )
    recipe = load_recipe(tmp_path / "found.yaml")
    with pytest.raises(RecipeError, match=words):
        load_split(recipe, "train")
    assert words in str([str(problem) for problem in inspect_split(recipe, "train")[1]])


def test_references_without_answers(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([{"question_id": "a", "text": "What?"}]))
    (tmp_path / "answers.json").write_text(json.dumps({"data": [{"question_id": "a", "answers": None}]}))
    source = {"format": "llava_json", "path": ".", "references": {"train": "answers.json"}}
    (tmp_path / "found.yaml").write_text(yaml.safe_dump(QUESTIONS | {"source": source}))
    with pytest.raises(RecipeError, match="record 'a' of train.json has no answer in answers.json"):
        load_split(load_recipe(tmp_path / "found.yaml"), "train")


@pytest.mark.parametrize("deepspeed", [{"zero_optimization": "x"}, {"bf16": [1]}])
def test_a_deepspeed_configuration_of_another_shape(deepspeed):
    with pytest.raises(
        ConfigError,
        match=r"training.deepspeed.(zero_optimization|bf16) is .*, but it takes `key: value` pairs",
    ):
        parse_config({"tasks": ["digits"], "training": {"deepspeed": deepspeed}})


def test_a_deepspeed_file_of_another_shape(tmp_path):
    (tmp_path / "zero.json").write_text("[]")
    with pytest.raises(ConfigError, match="training.deepspeed is .*, but it takes `key: value` pairs"):
        parse_config({"tasks": ["digits"], "training": {"deepspeed": str(tmp_path / "zero.json")}})


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": {"a": 1}},
        {"info": []},
        {"info": {"tasks": 3}},
        {"task": "0"},
        {"task": True},
        {"seconds": "x"},
        {"stage": 4},
        {"files": {"../outside": "0" * 64}},
        {"files": {"/etc/hostname": "0" * 64}},
    ],
)
def test_a_journal_entry_of_other_types_or_of_files_elsewhere(tmp_path, change):
    line = (
        json.dumps({"task": 0, "stage": "PLANNED", "seconds": 0.0, "files": {}, "info": {}} | change) + "\n"
    )
    (tmp_path / "journal.jsonl").write_text(line * 2)
    with pytest.raises(
        RunError,
        match="journal.jsonl, line 1 is not a journal entry \\(.*\\); restore the file or start over",
    ):
        Journal(tmp_path / "journal.jsonl")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks", None),
        ("tasks", [[], "b"]),
        ("tasks", [1, 2]),
        ("rows", {}),
        ("rows", [3]),
        ("zero_shot", False),
    ],
)
def test_a_matrix_of_other_types(tmp_path, key, value):
    (tmp_path / "matrix.json").write_text(json.dumps(Matrix(["a", "b"]).to_dict() | {key: value}))
    with pytest.raises(
        EvalError,
        match="is not a matrix file: its tasks or rows are no lists|a matrix needs at least one task and unique names",
    ):
        Matrix.from_json(tmp_path / "matrix.json")
