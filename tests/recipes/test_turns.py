"""One question and its answer in every layout that people write, and one refusal per kind of mistake."""

import pytest

from llava_keeplora_recipes.errors import RecipeError
from llava_keeplora_recipes.turns import Turn, check_markers, from_conversations, from_fields, from_messages

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "a cat"}
USER = {"role": "user", "content": "What is it?"}
ASSISTANT = {"role": "assistant", "content": "a cat"}


@pytest.mark.parametrize(
    ("value", "question", "markers"),
    [
        ("What is it?", "What is it?", 0),
        ("<image>\nWhat is it?", "What is it?", 1),
        ("What is it?\n<image>", "What is it?", 1),
        ("Is <image> left of <image>?", "Is  left of ?", 2),
    ],
)
def test_markers_are_taken_out_of_a_question_and_counted(value, question, markers):
    assert from_conversations([{"from": "human", "value": value}, ANSWER], "r") == Turn(question, ["a cat"], markers)


def test_messages_hold_text_or_typed_parts():
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    assert from_messages([USER, ASSISTANT], "r") == Turn("What is it?", ["a cat"], 0)
    assert from_messages([USER | {"content": "<image>\nWhat is it?"}, ASSISTANT], "r").markers == 1
    typed = from_messages([USER | {"content": [image, text]}, ASSISTANT | {"content": [{"type": "text", "text": "a cat"}]}], "r")
    assert typed == Turn("What is it?", ["a cat"], 1)
    parts = [text, image, {"type": "text", "text": "And this?"}, image]
    assert from_messages([USER | {"content": parts}, ASSISTANT], "r") == Turn("What is it?\nAnd this?", ["a cat"], 2)


def test_tables_fill_the_fields_that_a_part_does_not_have():
    parts = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What is it?", "index": None}]
    assert from_messages([USER | {"content": parts}, ASSISTANT], "r") == Turn("What is it?", ["a cat"], 1)


def test_a_test_record_holds_one_answer_or_several_or_none_where_they_stand_elsewhere():
    assert from_fields({"text": "How many?", "answer": 3}, "answer", True, "r").answers == ["3"]
    assert from_fields({"text": "What?", "answer": ["a", "b"]}, "answer", True, "r").answers == ["a", "b"]
    assert from_fields({"text": "Where?", "box": "[0, 0, 1, 1]"}, "box", True, "r").answers == ["[0, 0, 1, 1]"]
    assert from_fields({"text": "What?", "answer": "a"}, "answer", False, "r").answers == []


def test_a_question_without_markers_fits_any_number_of_images():
    for images in range(3):
        check_markers(Turn("q", ["a"]), images, "r")
    check_markers(Turn("q", ["a"], 2), 2, "r")


CURE = "split longer conversations into one record per question."
HUMAN_GPT = f"r is not one question ('human') and one answer ('gpt'); {CURE}"


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        (lambda: from_conversations([ASK, ANSWER, ASK, ANSWER], "r"), HUMAN_GPT),
        (lambda: from_conversations("hello", "r"), HUMAN_GPT),
        (lambda: from_conversations([ASK, ANSWER | {"value": 3}], "r"), HUMAN_GPT),
        (lambda: from_conversations([ASK, ANSWER | {"value": "<image>"}], "r"), "r marks an image in its answer; remove <image> there."),
        (lambda: from_messages([USER, ASSISTANT] * 2, "r"), f"r is not one question ('user') and one answer ('assistant'); {CURE}"),
        (
            lambda: from_messages([{"role": "system", "content": "Be brief."}, USER, ASSISTANT], "r"),
            "r has a system message, and the model's chat template has its own; remove it, or write it at the head of the question.",
        ),
        (
            lambda: from_messages([USER, {"role": "assistant", "content": None}], "r"),
            "r has a message whose content is neither text nor a list of parts; correct its 'content'.",
        ),
        (
            lambda: from_messages([USER | {"content": [{"type": "video"}]}, ASSISTANT], "r"),
            "r has a part of the type 'video' without text; use the types text and image.",
        ),
        (
            lambda: from_messages([USER | {"content": [{"type": "image", "path": "a.png"}]}, ASSISTANT], "r"),
            "r holds an image inside a message; list the images under 'images' of the record.",
        ),
        (
            lambda: from_messages([USER, ASSISTANT | {"content": [{"type": "image"}]}], "r"),
            "r shows an image in its answer; answer with text alone.",
        ),
        (
            lambda: from_fields({"text": "q"}, "answer", True, "r"),
            "r has neither 'conversations' nor 'text' and 'answer'; add one of them.",
        ),
        (
            lambda: from_fields({"text": "q", "answer": []}, "answer", True, "r"),
            "r has no question or no answer; complete or remove the record.",
        ),
        (
            lambda: check_markers(Turn("q", ["a"], 1), 0, "r"),
            "r marks 1 image in its question and names 0; mark and name the same number, or remove the markers.",
        ),
        (
            lambda: check_markers(Turn("q", ["a"], 2), 1, "r"),
            "r marks 2 images in its question and names 1; mark and name the same number, or remove the markers.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_cure(read, sentence):
    with pytest.raises(RecipeError) as caught:
        read()
    assert str(caught.value) == sentence
