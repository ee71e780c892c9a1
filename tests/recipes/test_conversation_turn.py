"""One question and its answer in every layout that people write, and one refusal per kind of mistake."""

import pytest

from llava_keeplora_recipes.conversation_turn import Turn, from_conversations, from_fields, from_messages
from llava_keeplora_recipes.errors import RecipeError

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "a cat"}
USER = {"role": "user", "content": "What is it?"}
ASSISTANT = {"role": "assistant", "content": "a cat"}
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize("value", ["What is it?", "<image>\nWhat is it?", "Is <image> left of <image>?"])
def test_a_question_is_handed_on_with_the_markers_of_its_pictures(value):
    assert from_conversations([{"from": "human", "value": f" {value}\n"}, ANSWER], "r") == Turn(
        value, ["a cat"]
    )
    assert from_messages([USER | {"content": value}, ASSISTANT], "r") == Turn(value, ["a cat"])
    assert from_fields({"text": value, "answer": "a cat"}, "answer", True, "r") == Turn(value, ["a cat"])


def test_parts_of_a_message_that_are_images_are_markers_where_they_stand():
    def asked(*parts):
        return from_messages([USER | {"content": list(parts)}, ASSISTANT], "r").question

    assert asked(IMAGE, TEXT) == "<image>\nWhat is it?"
    assert (
        asked(TEXT, IMAGE, TEXT | {"text": "And this?"}, IMAGE) == "What is it?\n<image>\nAnd this?\n<image>"
    )


def test_tables_fill_the_fields_that_a_part_does_not_have():
    parts = [{"type": "image", "text": None, "image": None}, TEXT | {"index": None}]
    assert from_messages([USER | {"content": parts}, ASSISTANT], "r") == Turn(
        "<image>\nWhat is it?", ["a cat"]
    )


def test_a_test_record_holds_one_answer_or_several_or_none_where_they_stand_elsewhere():
    assert from_fields({"text": "How many?", "answer": 3}, "answer", True, "r").answers == ["3"]
    assert from_fields({"text": "What?", "answer": ["a", "b"]}, "answer", True, "r").answers == ["a", "b"]
    assert from_fields({"text": "Where?", "box": "[0, 0, 1, 1]"}, "box", True, "r").answers == [
        "[0, 0, 1, 1]"
    ]
    assert from_fields({"text": "What?", "answer": "a"}, "answer", False, "r").answers == []


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, r"nothing \(null\) as its 'conversations'.*list of turns"),
        ("hello", "text 'hello' as its 'conversations'.*list of turns"),
        ([], "empty list"),
        ([3, ANSWER], "the number 3 as turn 1"),
        ([ASK], "no answer"),
        ([ANSWER], "begins with an answer"),
        ([ANSWER, ASK], "begins with an answer"),
        ([ASK, ASK], r"two questions in a row \(turns 1 and 2, 'human'\)"),
        ([ASK, ANSWER, ANSWER], r"two answers in a row \(turns 2 and 3, 'gpt'\)"),
        ([ASK, ANSWER, ASK, ANSWER], "4 turns.*one record per question"),
        ([{"from": "system", "value": "Be brief."}, ASK, ANSWER], "system message"),
        (
            [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
            "'user' as 'from' in turn 1.*'human'.*'gpt'",
        ),
        ([ASK, {"from": "tool", "value": "a"}], "'tool' as 'from' in turn 2"),
        ([USER, ASSISTANT], "no 'from' in turn 1"),
        ([ASK, ANSWER | {"value": 3}], "the number 3 as its answer.*quotes"),
        ([ASK, {"from": "gpt"}], r"nothing \(null\) as its answer"),
        ([ASK | {"value": ["q"]}, ANSWER], r"the list \['q'\] as its question"),
        ([ASK | {"image": "a.png"}, ANSWER], "turn 1 of r holds 'image' itself"),
        ([ASK | {"video": "a.mp4"}, ANSWER], "turn 1 of r holds 'video' itself"),
    ],
)
def test_each_fault_of_a_conversation_has_its_own_sentence(turns, reason):
    with pytest.raises(RecipeError, match=reason):
        from_conversations(turns, "r")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ({}, r"the object \{\} as its 'messages'"),
        ([USER, ASSISTANT] * 2, "4 turns.*one record per question"),
        ([{"role": "system", "content": "Be brief."}, USER, ASSISTANT], "system message"),
        ([ASK, ANSWER], "no 'role' in turn 1"),
        ([USER, {"role": "tool", "content": "a"}], "'tool' as 'role' in turn 2"),
        ([USER, ASSISTANT | {"content": None}], r"message with nothing \(null\) as its content"),
        ([USER, ASSISTANT | {"content": 3}], "message with the number 3 as its content"),
        ([USER, ASSISTANT | {"content": {"answer": "a"}}], "message with the object"),
        (
            [USER | {"content": [{"type": "video"}]}, ASSISTANT],
            "type 'video', which is not read; use the types text and image",
        ),
        ([USER | {"content": [{"type": "audio"}, TEXT]}, ASSISTANT], "type 'audio'"),
        (
            [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT],
            "type 'image_url'",
        ),
        ([USER | {"content": [{"text": "q"}]}, ASSISTANT], "type None"),
        ([USER | {"content": [{"type": "text"}]}, ASSISTANT], "'text' without text"),
        ([USER | {"content": [IMAGE | {"path": "a.png"}]}, ASSISTANT], "holds 'path' itself.*under 'images'"),
        ([USER | {"content": [TEXT | {"image": "a.png"}]}, ASSISTANT], "holds 'image' itself"),
        ([USER | {"images": ["a.png"]}, ASSISTANT], "turn 1 of r holds 'images' itself"),
    ],
)
def test_each_fault_of_a_chat_has_its_own_sentence(messages, reason):
    with pytest.raises(RecipeError, match=reason):
        from_messages(messages, "r")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "neither 'conversations' nor 'text'"),
        ({"text": "q"}, "no 'answer'.*'source.answer'"),
        ({"text": None, "answer": "a"}, r"nothing \(null\) as its question"),
        ({"text": 3, "answer": "a"}, "the number 3 as its question"),
        ({"text": "q", "answer": []}, "no answer"),
        ({"text": "q", "answer": None}, r"nothing \(null\) as its answer"),
    ],
)
def test_each_fault_of_a_test_record_has_its_own_sentence(row, reason):
    with pytest.raises(RecipeError, match=reason):
        from_fields(row, "answer", True, "r")
