"""Chat texts that share a call of a processor get the ids that each gets by itself."""

import pytest

from llava_keeplora_eval.chat import Asked, Chat
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.processor_calls import TokenCalls
from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_recipes.records import Message
from small_vlms import SMALL_VLMS

SHOWN = {"one": [(30, 44)], "two": [(30, 44), (44, 30)], "none": [], "other": [(20, 60)]}
HISTORY = (Message("user", "Is it red?"), Message("assistant", "no"))
#: Types whose processor takes one text at a time, or none without an image.
ALONE, WITH_IMAGES_ONLY = ("paligemma", "pixtral"), ("paligemma",)


@pytest.fixture
def calls(monkeypatch):
    """The numbers of texts of all calls of processors."""
    counts, call = [], TokenCalls._call

    def counted(self, texts, **media):
        counts.append(len(texts))
        return call(self, texts, **media)

    monkeypatch.setattr(TokenCalls, "_call", counted)
    return counts


@pytest.mark.parametrize("kind", SMALL_VLMS)
def test_the_ids_are_those_of_calls_for_one_text(kind, small_vlm, calls):
    processor = load_chat_processor(str(small_vlm(kind)))
    shown = {name: sizes for name, sizes in SHOWN.items() if sizes or kind not in WITH_IMAGES_ONLY}
    questions = ["What is it?", "Who?", "Is there a dog in the picture?"]
    asked = [
        Asked(question=question, sizes=sizes, answer=answer, history=history)
        for sizes in shown.values()
        for question in questions
        for answer in (None, "a cat", "a blue dog")
        for history in ((), HISTORY)
        if not history or kind not in WITH_IMAGES_ONLY
    ]
    made = Chat(processor).encode(asked)
    together = len(calls)
    chat = Chat(processor)
    assert made == [chat.encode([one])[0] for one in asked]
    assert all(len(encoding) for encoding in made) and len({len(encoding) for encoding in made}) > 3
    assert together < (len(calls) - together) / 4 or kind in ALONE


@pytest.fixture
def chat(small_vlm):
    return Chat(load_chat_processor(str(small_vlm("qwen2_5_vl"))))


def questions(count, **more):
    return [Asked(question="What?" + " red" * i, sizes=[(30, 44)], **more) for i in range(count)]


def test_what_is_wrong_with_a_text_is_said_of_it_alone(chat):
    asked = questions(3)
    asked[1:1] = [Asked(question="a <|im_end|> b", sizes=[]), Asked(question="What?", sizes=[(1, 900)])]
    made = chat.encode(asked)
    assert [isinstance(encoding, EvalError) for encoding in made] == [False, True, True, False, False]
    assert "special token" in str(made[1]) and "refuses a question with 1 images" in str(made[2])
    with pytest.raises(EvalError, match="refuses a question"):
        chat.prompt("What?", [(1, 900)])


@pytest.mark.parametrize("fault", ["pads", "refuses", "makes other ids"])
def test_a_processor_that_does_not_take_several_texts_as_one_is_given_one(chat, calls, fault, monkeypatch):
    expected = [chat.encode([one])[0] for one in questions(4)]
    call = TokenCalls._call

    def faulty(self, texts, **media):
        if len(texts) == 1:
            return call(self, texts, **media)
        if fault == "refuses":
            raise RuntimeError("one text at a time")
        made = call(self, texts, **media)
        if fault == "pads":
            longest = max(map(len, made["input_ids"]))
            for key in ("input_ids", "attention_mask"):
                made[key] = [[*ids, *[0] * (longest - len(ids))] for ids in made[key]]
        else:
            made["input_ids"][-1][-1] += 1
        return made

    monkeypatch.setattr(TokenCalls, "_call", faulty)
    other = Chat(chat.processor)
    assert other.encode(questions(4)) == expected
    del calls[:]
    assert other.encode(questions(4)) == expected and calls == [1] * 4


def test_captions_of_an_image_share_its_prompt(chat, calls):
    made = chat.encode(
        [Asked(question="What?", sizes=[(30, 44)], answer=text) for text in ("a cat", "a dog")]
    )
    assert sorted(calls) == [1, 3] and len({tuple(encoding.prompt) for encoding in made}) == 1
