"""Questions, answers and what was said before, in every layout that people write, and one refusal per kind of mistake."""

import pytest

from llava_keeplora_recipes.conversation_turn import (
    Turn,
    from_conversations,
    from_fields,
    from_messages,
    place_turn,
    with_system,
)
from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.records import Message

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "a cat"}
SYSTEM = {"from": "system", "value": "Be brief. "}
USER = {"role": "user", "content": "What is it?"}
ASSISTANT = {"role": "assistant", "content": "a cat"}
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize("value", ["What is it?", "<image>\nWhat is it?", "Is <image> left of <image>?"])
def test_a_question_is_handed_on_with_the_markers_of_its_images(value):
    assert from_conversations([{"from": "human", "value": f" {value}\n"}, ANSWER], "r") == Turn(
        value, ["a cat"]
    )
    assert from_messages([USER | {"content": value}, ASSISTANT], "r") == Turn(value, ["a cat"])
    assert from_fields({"text": value, "answer": "a cat"}, "answer", True, "r") == Turn(value, ["a cat"])


def test_parts_of_a_message_that_are_images_are_markers_where_they_stand():
    def asked(*parts):
        return from_messages([USER | {"content": list(parts)}, ASSISTANT], "r").question

    assert asked(IMAGE, TEXT) == "<image>\nWhat is it?"
    assert asked({"type": "video"}, TEXT) == "<video>\nWhat is it?"
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


def test_what_stands_before_the_last_question_is_its_history_in_order():
    turns = [SYSTEM, ASK, ANSWER, ASK | {"value": " And <image>? "}, ANSWER | {"value": " a dog "}]
    expected = (
        Message("system", "Be brief."),
        Message("user", "<image>\nWhat is it?"),
        Message("assistant", "a cat"),
    )
    assert from_conversations(turns, "r") == Turn("And <image>?", [" a dog "], expected)
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    chat = [{"role": names[t["from"]], "content": t["value"]} for t in turns]
    chat[1]["content"] = [IMAGE, TEXT]
    assert from_messages(chat, "r") == from_conversations(turns, "r")
    assert from_conversations([SYSTEM | {"value": " "}, ASK, ANSWER], "r").history == ()
    weighed = [ASK | {"loss": False}, ANSWER | {"loss": True, "weight": 1}]
    assert from_conversations(weighed, "r") == from_conversations([ASK, ANSWER], "r")


@pytest.mark.parametrize("name", ["gpt", "assistant", "chatgpt", "model", "bing", "bard"])
def test_sharegpt_names_the_speakers_in_many_ways(name):
    turns = [{"from": "user", "value": "q"}, ANSWER | {"from": name}]
    assert from_conversations(turns, "r") == Turn("q", ["a cat"])


def test_a_system_message_beside_the_turns_goes_first_and_may_not_differ():
    turn, message = Turn("q", ["a"]), Message("system", "Be brief.")
    both = Turn("q", ["a"], (message,))
    assert with_system(turn, None, "r") == turn
    assert with_system(turn, " Be brief.", "r") == with_system(both, "Be brief.", "r") == both
    with pytest.raises(RecipeError, match="another system message in its conversation"):
        with_system(both, "Be long.", "r")


def test_images_are_counted_over_all_questions_and_marked_in_no_other_turn():
    def turn(*texts):
        roles = ["user", "assistant"] * len(texts)
        *history, last = [Message(*pair) for pair in zip(roles, texts, strict=False)]
        return Turn(last.text, ["x"], tuple(history))

    assert place_turn(turn("<image> a", "b", "c"), 1, "r") == turn("a", "b", "c")
    assert place_turn(turn("a <image>", "b", "c"), 1, "r") == turn("a", "b", "c")
    assert place_turn(turn("a", "b", "c <image>"), 1, "r") == turn("a", "b", "<image>\nc")
    for kept in (turn("a", "b", "<image> c"), turn("x <image> a", "b", "c")):
        assert place_turn(kept, 1, "r") == kept
    both = turn("<image> a", "b", "<image>\nc")
    assert place_turn(both, 2, "r") == both == place_turn(place_turn(both, 2, "r"), 2, "r")
    assert place_turn(turn("a", "b", "c"), 5, "r") == turn("a", "b", "c")
    with pytest.raises(RecipeError, match="marks 2 images in its questions and names 1"):
        place_turn(both, 1, "r")
    with pytest.raises(RecipeError, match="marks an image in its answer"):
        place_turn(turn("a", "<image> b", "c"), 1, "r")
    with pytest.raises(RecipeError, match="marks an image in its system message"):
        place_turn(Turn("q", ["a"], (Message("system", "<image>"),)), 1, "r")


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
        ([ASK, ANSWER, ASK], r"ends with a question \('human'\) and has no answer to it"),
        ([ASK, ANSWER, SYSTEM, ASK, ANSWER], "system message as turn 3.*before the first question"),
        ([SYSTEM, SYSTEM, ASK, ANSWER], "system message as turn 2"),
        ([SYSTEM], "system message and no question"),
        ([SYSTEM, ANSWER], "begins with an answer"),
        ([SYSTEM | {"value": 3}, ASK, ANSWER], r"the number 3 as its system message.*text \(turn 1\)"),
        ([ASK, ANSWER | {"value": " "}, ASK, ANSWER], r"earlier answer that is empty \(number 2"),
        ([ASK, ANSWER, ASK, ANSWER | {"value": None}], r"nothing \(null\) as its answer.*turn 4"),
        (
            [ASK, ANSWER | {"loss": False}],
            "turn 2 of r has the boolean False as 'loss'.*every answer is learned",
        ),
        ([ASK, ANSWER | {"weight": 0}, ASK, ANSWER], "turn 2 of r has the number 0 as 'weight'"),
        ([ASK | {"from": ["human"]}, ANSWER], r"the list \['human'\] as 'from' in turn 1.*'human'.*'gpt'"),
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
        ([USER, ASSISTANT, USER], r"ends with a question \('user'\) and has no answer"),
        (
            [{"role": "system", "content": [IMAGE | {"image": "a.png"}]}, USER, ASSISTANT],
            "holds 'image' itself",
        ),
        ([ASK, ANSWER], "no 'role' in turn 1"),
        ([USER, {"role": "tool", "content": "a"}], "'tool' as 'role' in turn 2"),
        ([USER, ASSISTANT | {"content": None}], r"message with nothing \(null\) as its content"),
        ([USER, ASSISTANT | {"content": 3}], "message with the number 3 as its content"),
        ([USER, ASSISTANT | {"content": {"answer": "a"}}], "message with the object"),
        (
            [USER | {"content": [{"type": "audio"}, TEXT]}, ASSISTANT],
            "type 'audio', which is not read; use the types text, image and video",
        ),
        ([USER | {"content": [{"type": "video", "video": "a.mp4"}]}, ASSISTANT], "holds 'video' itself"),
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
