"""Texts that nobody sees, and markers that only other tools read, in every format and in recipes."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from llava_keeplora_recipes import RecipeError, load_recipe, load_split
from llava_keeplora_recipes.media import image_names
from llava_keeplora_recipes.placeholders import foreign_marker, place_images, refuse_unread
from llava_keeplora_recipes.texts import identifier, is_blank

UNSEEN = ["", " ", "\u00a0", "\u200b", "\ufeff", "\u00ad", "\u2060", "\u200d\u200e", " \u200b\n\ufeff"]
FOREIGN = [
    "<IMAGE>", "<Image>", "< image >", "<image/>", "<image_0>", "<image 1>", "<image1>", "<img_2>", "<|image_pad|>", "<|image|>", "<|image_1|>",
    "<|vision_start|>", "<image_soft_token>", "<start_of_image>", "<ImageHere>", "<img>a.png</img>", "[IMG]", "[Image 2]",
]  # fmt: skip
MEDIA = ["<video>", "<VIDEO>", "<video_0>", "<|video_pad|>", "<audio>", "<|AUDIO|>", "<audio 1>", "[VIDEO]"]
PLAIN = [
    "the <img> tag",
    "<b>image</b>",
    "an image [1]",
    "x < image > y"[:5],
    "[img.png]",
    "<images>",
    "<imagery>",
    "|image|",
    "a [video] call",
]


@pytest.fixture
def read(tmp_path, make):
    """What a reader makes of one question and answer about some of three images, by format."""
    for i in range(3):
        (tmp_path / "q").mkdir(exist_ok=True)
        (tmp_path / "q" / f"{i}.png").write_bytes(make.encoded(i))

    def build(form, question, answer="a", images=1):
        names = [f"{i}.png" for i in range(images)]
        file, kind, source, extra = "q.json", "vqa", {"format": form}, {}
        if form == "llava_json":
            content = [{"id": "r", "image": names, "text": question, "answer": answer}]
        elif form == "conversations":
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            content, source = [{"id": "r", "image": names, "conversations": turns}], {"format": "llava_json"}
        elif form == "messages":
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            content = [{"id": "r", "images": names, "messages": turns}]
        elif form == "coco_captions":
            notes = [{"image_id": "r", "caption": answer}]
            content, kind, source["images"] = (
                {"images": [{"id": "r", "file_name": "0.png"}], "annotations": notes},
                "captioning",
                ".",
            )
            extra = {"prompt": "Say."}
        else:
            file, content = (
                "q.parquet",
                pa.table({"id": ["r"], "images": [names], "question": [question], "answers": [answer]}),
            )
        if form == "parquet":
            pyarrow.parquet.write_table(content, tmp_path / "q" / file)
        else:
            make.json(tmp_path / "q" / file, content)
        facts = (
            make.facts(
                kind=kind, classes=None, prompt=None, source=source | {"path": "q"}, splits={"train": file}
            )
            | extra
        )
        return load_split(load_recipe(make.yaml(tmp_path / "q.yaml", **facts)), "train")

    return build


FORMS = ["llava_json", "conversations", "messages", "parquet"]


@pytest.mark.parametrize("text", UNSEEN)
def test_what_nobody_sees_is_empty(text):
    assert is_blank(text) and image_names({"image": text, "images": ["a.png"]}, "r") == ["a.png"]
    with pytest.raises(RecipeError, match="as its id"):
        identifier(text, "r")
    assert not is_blank(text + "x") and not is_blank("\u2764\ufe0f")


@pytest.mark.parametrize("form", FORMS)
def test_a_question_that_nobody_sees_is_refused_by_record(read, form):
    for question in (" ", "\u200b", "<image>\n\ufeff"):
        with pytest.raises(RecipeError, match="'r' in pets/train has nothing to ask"):
            read(form, question)


@pytest.mark.parametrize("marker", FOREIGN)
def test_markers_of_other_tools_are_known(marker):
    assert foreign_marker(f"What is {marker}?") == marker
    for images in (0, 2):
        with pytest.raises(
            RecipeError,
            match=f"r has .* in its text, which marks an image for other tools only, and names {images}",
        ):
            place_images(f"{marker} What?", images, "r")
    assert place_images(f"{marker} What?", 1, "r") == f"{marker} What?"


@pytest.mark.parametrize("marker", MEDIA)
def test_markers_of_video_and_audio_are_refused_in_every_spelling(marker):
    with pytest.raises(RecipeError, match="(video|audio) is not read"):
        refuse_unread(f"What {marker}?", "r")


def test_other_words_are_no_markers():
    for text in [*PLAIN, "<image> What?", "<image>"]:
        assert foreign_marker(text) is None, text
        refuse_unread(text, "r")


@pytest.mark.parametrize("form", FORMS)
def test_markers_next_to_one_image_are_words_and_counted(read, form, caplog):
    data = read(form, "What is in <image_0>?")
    assert data.questions == ["What is in <image_0>?"]
    assert (
        data.marker_note.startswith("1 examples have markers of other tools in their texts")
        and "(r: <image_0>)" in data.marker_note
    )
    assert data.marker_note in caplog.text
    with pytest.raises(RecipeError, match="record 'r' .*<image_0> in its text.* names 2"):
        read(form, "Is <image_0> left of <image_1>?", images=2)
    assert read(form, "What is it?").marker_note is None


@pytest.mark.parametrize("form", [*FORMS, "coco_captions"])
def test_markers_in_answers_are_counted_too(read, form):
    assert "(r: [IMG])" in read(form, "What?", answer="[IMG] a cat").marker_note


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"kind": "vqa", "classes": None, "prompt": "<IMAGE>\n{q}"}, "the prompt of .* has <IMAGE>"),
        (
            {"kind": "vqa", "classes": None, "prompt": None, "test_prompt": "{q} <|video_pad|>"},
            "the test_prompt of .* video is not read",
        ),
        ({"kind": "captioning", "classes": None, "prompt": "[IMG] Say."}, "the prompt of .* has \\[IMG\\]"),
        ({"instruction": "<image_0> What?"}, "the instruction of .* has <image_0>"),
        ({"instruction": "\u200b"}, "empty 'instruction'"),
        ({"prompt": "<|image_pad|> a {c}."}, "the prompt of .* has <|image_pad|>"),
        ({"classes": ["cat", "[IMG]"]}, "no name"),
        ({"classes": ["cat", "\u200b"]}, "no name"),
        ({"classes": ["cat", "c\u00adat"]}, "one and the same"),
    ],
)
def test_recipes_mark_images_as_said(tmp_path, make, facts, words):
    base = make.facts(source={"format": "llava_json", "path": "q"}, splits={"train": "q.json"}) | facts
    with pytest.raises(RecipeError, match=words):
        load_recipe(make.yaml(tmp_path / "q.yaml", **{k: v for k, v in base.items() if v is not None}))


def test_numbers_in_json_are_names_and_a_doubt_is_reported(tmp_path, make, caplog):
    def read(*labels):
        (tmp_path / "q").mkdir(exist_ok=True)
        (tmp_path / "q" / "0.png").write_bytes(make.encoded(0))
        rows = [{"id": i, "image": "0.png", "text": "?", "answer": label} for i, label in enumerate(labels)]
        (tmp_path / "q" / "q.json").write_text(json.dumps(rows))
        facts = make.facts(
            classes=["1", "10", "2"], source={"format": "llava_json", "path": "q"}, splits={"test": "q.json"}
        )
        return load_split(load_recipe(make.yaml(tmp_path / "q.yaml", **facts)), "test").labels

    assert read("1", "2") == [0, 2] and "position" not in caplog.text
    assert read(1, 10) == [0, 1]
    assert (
        "the label 1 is read as the name '1', not as the position of the class '10' (counted from 0; 1 such"
        in caplog.text
    )
