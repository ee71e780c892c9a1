"""Conversations of several turns: what an example shows of them, and how a test asks for their answers."""

import hashlib
import json

import pytest

from llava_keeplora_recipes import Message, RecipeError, load_recipe, load_split


@pytest.fixture
def task(tmp_path, make):
    """A recipe of chats over `tmp_path/q`, where three images lie, read as its split `test`."""

    def build(rows, kind="vqa", splits=None, classes=None, prompt=None, **facts):
        for i in range(3):
            (tmp_path / "q").mkdir(exist_ok=True)
            (tmp_path / "q" / f"{i}.png").write_bytes(make.encoded(i))
        make.json(tmp_path / "q" / "q.json", rows)
        facts |= {"kind": kind, "classes": classes, "prompt": prompt, "splits": splits or {"test": "q.json"}}
        return load_recipe(
            make.yaml(tmp_path / "q.yaml", **make.facts(source={"format": "messages", "path": "q"}, **facts))
        )

    return build


def chat(name, *texts, images=(), **more):
    """A record whose turns say these texts, by turns."""
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"id": name, "messages": turns, "images": list(images)} | more


def said(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    turns = tuple(Message(*pair) for pair in zip(roles, texts, strict=False))
    return (Message("system", system), *turns) if system else turns


def test_the_last_answer_is_the_reference_and_all_before_it_the_history(task):
    data = load_split(
        task(
            [chat("a", "<image>q", "r", "s", "t", images=["0.png"], system="Be brief."), chat("b", "q", "r")]
        ),
        "test",
    )
    assert data.ids == ["a", "b"] and data.questions == ["s", "q"] and data.answers == [["t"], ["r"]]
    assert data.histories == [said("q", "r", system="Be brief."), ()] == [e.history for e in data]
    assert data.image_counts == [1, 0]


def test_each_answer_of_a_conversation_is_asked_for_with_the_true_turns_before_it(task):
    rows = [
        chat(
            "a",
            "<image> q",
            "r",
            "And <image>?",
            "t",
            "u <image>",
            "v",
            images=["0.png", "1.png", "2.png"],
            system="S",
        ),
        chat("b", "q", "r", "s", "t", images=["1.png"]),
        chat("c", "q", "r"),
    ]
    data = load_split(task(rows, evaluate="each"), "test")
    assert data.ids == ["a", "a#2", "a#3", "b", "b#2", "c"]
    assert data.questions == ["q", "And <image>?", "<image>\nu", "q", "s", "q"]
    assert data.answers == [["r"], ["t"], ["v"], ["r"], ["t"], ["r"]]
    assert data.image_counts == [1, 2, 3, 1, 1, 0]
    assert data.histories[:3] == [
        said(system="S"),
        said("<image> q", "r", system="S"),
        said("<image> q", "r", "And <image>?", "t", system="S"),
    ]
    assert data.histories[3:] == [(), said("q", "r"), ()]
    splits = {"train": "q.json"}
    assert load_split(task(rows, evaluate="each", splits=splits), "train").ids == ["a", "b", "c"]


def test_an_id_that_a_later_turn_gets_is_refused_where_another_record_has_it(task):
    rows = [chat("a", "q", "r", "s", "t"), chat("a#2", "q", "r")]
    assert load_split(task(rows), "test").ids == ["a", "a#2"]
    with pytest.raises(RecipeError, match=r"1 ids more than once \(a#2\).*'evaluate: each'"):
        load_split(task(rows, evaluate="each"), "test")


def test_every_question_of_a_conversation_is_put_into_the_recipes_words(task):
    prompt = {"test_prompt": {"yes": "{q} (y)", "other": "{q} (o)"}, "prompt": "{q}!"}
    data = load_split(task([chat("a", "<image>q", "yes", "s", "t", images=["0.png"])], **prompt), "test")
    assert data.histories == [said("q (y)", "yes")] and data.questions == ["s (o)"]
    train = task([chat("a", "q", "yes", "s", "t")], splits={"train": "q.json"}, **prompt)
    assert load_split(train, "train").histories == [said("q!", "yes")]


def test_what_cannot_be_asked_or_evaluated_is_refused_in_a_sentence(task):
    with pytest.raises(RecipeError, match="'a' in pets/test has nothing to ask"):
        load_split(task([chat("a", "<image>", "r", "s", "t", images=["0.png"])], evaluate="each"), "test")
    assert load_split(task([chat("a", "<image>", "r", "s", "t", images=["0.png"])]), "test").histories == [
        said("", "r")
    ]
    with pytest.raises(RecipeError, match="'evaluate: all'; valid names are each, last: the last"):
        task([], evaluate="all")
    classes = {"kind": "classification", "classes": ["r", "t"], "prompt": "a {c}."}
    with pytest.raises(RecipeError, match="'evaluate', which a classification recipe does not use"):
        task([], evaluate="each", **classes)
    with pytest.raises(
        RecipeError, match="'a' in pets/test has a conversation before its question, and a classification"
    ):
        load_split(task([chat("a", "q", "r", "s", "t", images=["0.png"])], **classes), "test")


def test_data_without_earlier_turns_keep_their_fingerprints_and_others_differ_by_theirs(task):
    recipe = task([chat("a", "q", "r")])
    assert (
        "evaluate" not in recipe.fingerprint and recipe.fingerprint == task([], evaluate="last").fingerprint
    )
    assert recipe.fingerprint != task([], evaluate="each").fingerprint
    digests = {load_split(task([chat("a", "q", "r")]), "test").fingerprint}
    row = json.dumps(["a", None, "q", ["r"], []], separators=(",", ":")).encode() + b"\n"
    assert digests == {hashlib.sha256(recipe.fingerprint.encode() + row).hexdigest()}
    for record in (
        chat("a", "q", "r", system="x"),
        chat("a", "x", "y", "q", "r"),
        chat("a", "x", "z", "q", "r"),
    ):
        digests.add(load_split(task([record]), "test").fingerprint)
    assert len(digests) == 4


def test_markers_of_other_tools_in_earlier_turns_are_counted(task):
    data = load_split(task([chat("a", "<image>What is <image_0>?", "x", "q", "r", images=["0.png"])]), "test")
    assert data.marker_note.startswith("1 examples") and "<image_0>" in data.marker_note
