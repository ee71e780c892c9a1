"""Datasets that LLaMA-Factory's `dataset_info.json` describes, and ms-swift's records of pairs."""

import json

import pytest

from llava_keeplora_recipes import Message, RecipeError, load_recipe, load_split
from llava_keeplora_recipes.conversation_turn import Turn, from_pairs

USER, SAID = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def said(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    turns = tuple(Message(*pair) for pair in zip(roles, texts, strict=False))
    return (Message("system", system), *turns) if system else turns


@pytest.fixture
def read(tmp_path, make):
    """Load the dataset `d`, described so, with these records in `d.json`."""
    (tmp_path / "q").mkdir()
    for i in range(2):
        (tmp_path / "q" / f"{i}.png").write_bytes(make.encoded(i))

    def build(rows, form="llama_factory", name="d", **info):
        make.json(tmp_path / "q" / "d.json", rows)
        make.json(tmp_path / "q" / "dataset_info.json", {"d": {"file_name": "d.json"} | info})
        name = name if form == "llama_factory" else "d.json"
        facts = make.facts(kind="vqa", prompt=None, classes=None, splits={"train": name})
        facts["source"] = {"format": form, "path": "q"}
        return load_split(load_recipe(make.yaml(tmp_path / "q.yaml", **facts)), "train")

    return build


def test_alpaca_joins_instruction_and_input_and_reads_the_pairs_before_them(read):
    columns = {"system": "sys", "history": "past", "images": "pictures", "response": "out"}
    rows = [
        {"instruction": "What?", "input": "", "out": "a"},
        {
            "instruction": "Which?",
            "input": "red",
            "out": "b",
            "sys": "S",
            "past": [["q1", "a1"], ["q2", "a2"]],
        },
        {
            "instruction": "<image>Look",
            "input": None,
            "out": "c",
            "pictures": ["1.png"],
            "past": [],
            "id": "own",
        },
    ]
    data = read(rows, columns=columns)
    assert data.ids == ["train-0", "train-1", "own"] and data.image_counts == [0, 0, 1]
    assert data.questions == ["What?", "Which?\nred", "Look"] and data.answers == [["a"], ["b"], ["c"]]
    assert data.histories == [(), said("q1", "a1", "q2", "a2", system="S"), ()]


def test_sharegpt_takes_its_tags_and_its_system_turn_over_the_column(read):
    tags = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "u",
        "assistant_tag": "m",
        "system_tag": "s",
    }
    turns = lambda *pairs: [{"role": role, "content": text} for role, text in pairs]  # noqa: E731
    rows = [
        {"chat": turns(("u", "<image>q"), ("m", "a")), "images": ["0.png"], "sys": "column"},
        {"chat": turns(("s", "turn"), ("u", "q"), ("m", "a"), ("u", "r"), ("m", "b")), "sys": "column"},
    ]
    columns = {"messages": "chat", "images": "images", "system": "sys", "tools": None}
    data = read(rows, formatting="sharegpt", columns=columns, tags=tags)
    assert data.questions == ["q", "r"] and data.answers == [["a"], ["b"]] and data.image_counts == [1, 0]
    assert data.histories == [said(system="column"), said("q", "a", system="turn")]
    assert read([{"conversations": [USER, SAID]}], formatting="sharegpt").answers == [["a"]]


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"file_name": None}, "'d' in dataset_info.json has nothing .* as its 'file_name'"),
        ({"file_name": "d.csv"}, "names 'd.csv', and JSON and JSONL files are read.*format: parquet"),
        ({"file_name": "../d.json"}, "leads out of its data folder"),
        ({"file_name": "e.json"}, "e.json cannot be read"),
        ({"hf_hub_url": "a/b"}, "is read from 'hf_hub_url'.*format: hub"),
        ({"ranking": True}, "holds preferences"),
        ({"columns": {"kto_tag": "k"}}, "holds preferences"),
        ({"formatting": "openai"}, "the formatting 'openai'; valid names are alpaca, sharegpt"),
        ({"formatting": ["alpaca"]}, r"the formatting \['alpaca'\]"),
        ({"num_samples": 5}, "the key 'num_samples', which is not read"),
        (
            {"columns": {"promt": "x"}},
            "'columns' of 'd' in dataset_info.json has the key 'promt'.*did you mean 'prompt'",
        ),
        ({"columns": {"messages": "x"}}, "has the key 'messages'"),
        ({"columns": ["x"]}, r"the list \['x'\] as 'columns'"),
        ({"tags": {"role_tag": 3}}, "as 'tags', which is not an object of texts"),
        ({"split": "validation"}, "the split 'validation'"),
    ],
)
def test_a_description_that_is_not_read_is_refused_by_its_dataset(read, info, reason):
    with pytest.raises(RecipeError, match=reason) as caught:
        read([{"instruction": "q", "output": "a"}], **info)
    assert len(str(caught.value).splitlines()) == 1


def test_a_name_or_a_file_that_is_not_there_is_refused(read, tmp_path):
    with pytest.raises(RecipeError, match="has no dataset 'e'; valid names are d"):
        read([], name="e")
    (tmp_path / "q" / "dataset_info.json").unlink()
    recipe = load_recipe(tmp_path / "q.yaml")
    with pytest.raises(RecipeError, match="has no dataset_info.json; correct 'source.path'"):
        load_split(recipe, "train")


ALPACA, SHAREGPT = {"instruction": "q", "output": "a"}, {"conversations": [USER, SAID]}


@pytest.mark.parametrize(
    ("row", "info", "reason"),
    [
        (ALPACA | {"images": ["0.png"]}, {}, "as 'images', which dataset_info.json does not name under 'columns'"),
        (ALPACA | {"history": [["q", "a"]]}, {}, "as 'history', which dataset_info.json does not name"),
        (ALPACA | {"system": "S"}, {}, "the text 'S' as 'system', which"),
        (ALPACA | {"output": ["a", "b"]}, {}, r"the list \['a', 'b'\] as its answer"),
        (ALPACA | {"instruction": 3, "input": "x"}, {}, "the number 3 as part of its question"),
        (ALPACA | {"history": "x"}, {"columns": {"history": "history"}}, "the text 'x' as its history"),
        (ALPACA | {"history": [["q"]]}, {"columns": {"history": "history"}}, "number 1 of its history"),
        (ALPACA | {"history": [["q", None]]}, {"columns": {"history": "history"}}, "as its answer.*turn 2"),
        (ALPACA | {"tools": "[{}]"}, {"columns": {"tools": "tools"}}, "as 'tools', which no model here is given"),
        (ALPACA | {"v": ["a.wav"]}, {"columns": {"audios": "v"}}, "audio is not read"),
        (3, {}, "record 0 of d.json is not a JSON object"),
        ({"instruction": "q"}, {}, r"nothing \(null\) as its answer"),
        ({}, {"formatting": "sharegpt"}, r"nothing \(null\) as its 'conversations'"),
        ({"conversations": [USER, {"from": "function_call", "value": "{}"}]}, {"formatting": "sharegpt"}, "'function_call' as 'from'"),
        (SHAREGPT | {"conversations": [USER, SAID, USER]}, {"formatting": "sharegpt"}, "record 0 of d.json ends with a question"),
    ],
)  # fmt: skip
def test_a_record_that_is_not_read_is_named(read, row, info, reason):
    with pytest.raises(RecipeError, match=reason) as caught:
        read([row], **info)
    assert "record 0 of d.json" in str(caught.value)


def test_records_of_ms_swift_may_be_pairs(read):
    rows = [
        {"query": "<image>q", "response": "a", "images": ["0.png"], "history": None},
        {"system": "S", "query": "r", "response": "b", "history": [["q", "a"]]},
    ]
    data = read(rows, "messages")
    assert (data.questions, data.answers, data.image_counts) == (["q", "r"], [["a"], ["b"]], [1, 0])
    assert data.histories == [(), said("q", "a", system="S")]
    with pytest.raises(RecipeError, match=r"record 0 of d.json has nothing \(null\) as its question"):
        read([{"response": "a"}], "messages")


def test_boxes_that_ms_swift_would_write_into_a_text_are_refused(read):
    row = {
        "query": "Where is <ref-object>?",
        "response": "<bbox>",
        "objects": {"ref": ["a"], "bbox": [[0, 0, 1, 1]]},
    }
    with pytest.raises(RecipeError, match="record 0 of d.json has <ref-object> in its text"):
        read([row], "messages")
    assert read([row | {"query": "q", "response": "a"}], "messages").answers == [["a"]]


def test_pairs_are_a_conversation():
    assert from_pairs(" q ", "a", [["x", "y"]], "r") == Turn("q", ["a"], said("x", "y"))
    for nothing in (None, [], ""):
        assert from_pairs("q", "a", nothing, "r") == Turn("q", ["a"])
    with pytest.raises(RecipeError, match=r"the object .* as number 2 of its history"):
        from_pairs("q", "a", [["x", "y"], json.loads('{"q": "a"}')], "r")
