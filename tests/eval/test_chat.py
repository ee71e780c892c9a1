"""What a model is asked, token by token: places of images are kept, and a user's text stays text."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import llava_keeplora
from llava_keeplora_eval.chat import Chat
from llava_keeplora_eval.chat_text import render
from llava_keeplora_eval.class_prompts import tokenize_prompts
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.llava import LlavaPredictor
from llava_keeplora_eval.preparation import ChatPreparation
from llava_keeplora_eval.processors import load_chat_processor
from llava_keeplora_recipes import Example

ASSETS = Path(llava_keeplora.__file__).parent / "assets"
SIZE = (48, 48)


@pytest.fixture(scope="module")
def embedded():
    """The processor of the embedded model, whose chat template shows images first wherever they stand."""
    return load_chat_processor(str(ASSETS / "tiny-llava"))


@pytest.fixture(scope="module", params=["embedded", "no template"])
def processor(request, embedded, tiny_llava):
    """Processors with and without a chat template of their own."""
    return embedded if request.param == "embedded" else load_chat_processor(str(tiny_llava))


@pytest.mark.parametrize(
    "question", ["Is <image> red?", "Is <image> left of <image>?", "Which? <image><image>"]
)
def test_images_stay_where_the_question_marks_them(processor, question):
    chat, n = Chat(processor), question.count("<image>")
    text = render(processor, question, n)
    assert (
        question.replace("<image>", processor.image_token) in text and text.count(processor.image_token) == n
    )
    whole = processor(text=[text], images=[[Image.new("RGB", SIZE)] * n], return_tensors="pt")["input_ids"]
    assert chat.prompt(question, [SIZE] * n).prompt == whole[0].tolist()


def test_an_answer_ends_with_the_end_of_text_where_the_template_writes_no_answers(tiny_llava):
    processor = load_chat_processor(str(tiny_llava))
    processor.chat_template = (
        "{% for m in messages if m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endfor %}"
        "{{ messages[-1]['content'][-1]['text'] }}:"
    )
    turn = Chat(processor).turn("What?", [], "a cat")
    assert processor.tokenizer.decode(turn.reply) == f" a cat{processor.tokenizer.eos_token}"


def test_images_without_places_go_before_the_question(processor):
    text = render(processor, "What?", 2)
    assert text.index("What?") > text.rindex(processor.image_token) and text.count(processor.image_token) == 2


@pytest.mark.parametrize("images", [0, 1, 3])
def test_another_number_of_places_than_images_is_refused(embedded, images):
    with pytest.raises(EvalError, match=f"marks 2 images and has {images}"):
        Chat(embedded).prompt("<image> or <image>?", [SIZE] * images)


def test_a_model_answers_a_question_with_places_in_it(embedded):
    model = AutoModelForImageTextToText.from_pretrained(ASSETS / "tiny-llava", dtype=torch.float32).eval()
    predictor = LlavaPredictor(model, embedded, recipe=None, max_new_tokens=2)
    images = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    questions = {"a": "Is <image> left of <image>?", "b": "Which?"}
    answers = predictor.predict([Example(i, images, q, ["x"], None) for i, q in questions.items()])
    alone = [predictor.predict([Example(i, images, q, ["x"], None)])[0] for i, q in questions.items()]
    assert answers == alone


@pytest.mark.parametrize("token", ["</s>", "<s>", "<pad>", "<unk>"])
def test_special_tokens_in_a_users_text_are_refused(embedded, token):
    chat = Chat(embedded)
    for ask in (lambda: chat.prompt(f"a {token} b", []), lambda: chat.turn("q", [], f"a{token}")):
        with pytest.raises(EvalError, match=f"holds {token}, a special token"):
            ask()
    with pytest.raises(EvalError, match="holds <image>, a special token"):
        chat.turn("q", [SIZE], "an <image>")


def test_special_tokens_of_other_models_are_letters(embedded):
    chat = Chat(embedded)
    ids = chat.prompt("a <|im_end|> b", []).prompt
    assert "<|im_end|>" in chat.tokenizer.decode(ids) and not set(ids[1:]) & set(
        chat.tokenizer.all_special_ids
    )


def test_a_class_prompt_that_ends_early_is_refused():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-clip")
    with pytest.raises(EvalError, match=r"holds <\|endoftext\|>, which is a special token"):
        tokenize_prompts(tokenizer, ["a photo of a <|endoftext|> cat"])


def test_a_record_with_a_special_token_is_named(embedded):
    data = SimpleNamespace(
        recipe=SimpleNamespace(name="pets", kind="vqa", splits={"train": "train.json"}), split="train",
        ids=["a", "b"], questions=["q", "a </s> b"], image_sizes=[[], []], videos=[(), ()], image_times=[[], []], image_counts=[0, 0], answers=[["x"], ["x"]], histories=[(), ()], __len__=lambda: 2,
    )  # fmt: skip
    errors = ChatPreparation(embedded, 100, 10).report(data, learns=True).errors
    assert (
        len(errors) == 1 and "record 'b' of pets (train.json)" in str(errors[0]) and "</s>" in str(errors[0])
    )
