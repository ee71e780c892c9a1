"""What a field may hold, in every reader: read as said, or refused in a sentence that names the record."""

import json
import math
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split
from llava_keeplora_recipes.media import image_names
from llava_keeplora_recipes.records import Message
from llava_keeplora_recipes.texts import answer_texts, as_text, identifier


@pytest.fixture
def task(tmp_path, make):
    """A recipe over `tmp_path/q`, where three images and a file of records lie."""
    for i in range(3):
        (tmp_path / "q").mkdir(exist_ok=True)
        (tmp_path / "q" / f"{i}.png").write_bytes(make.encoded(i))

    def build(
        content,
        form="llava_json",
        kind="vqa",
        file="q.json",
        prompt=None,
        classes=None,
        splits=None,
        **source,
    ):
        if isinstance(content, pa.Table):
            file = "q.parquet"
            pyarrow.parquet.write_table(content, tmp_path / "q" / file)
        elif content is not None:
            make.json(tmp_path / "q" / file, content)
        facts = make.facts(
            kind=kind, prompt=prompt, classes=classes, source={"format": form, "path": "q"} | source
        )
        return load_recipe(make.yaml(tmp_path / "q.yaml", **facts | {"splits": splits or {"train": file}}))

    return build


def loaded(recipe):
    """The data of the split `train`, or the sentence of the refusal; `data check` agrees with it."""
    try:
        data = load_split(recipe, "train")
    except RecipeError as error:
        assert inspect_split(recipe, "train")[1], "what a run refuses, the check tells"
        return str(error)
    assert not inspect_split(recipe, "train")[1]
    return data


# ----------------------------------------------------------------------------------------- values

READ = [
    ("red", "red"), ("", ""), (3, "3"), (-2, "-2"), (3.0, "3"), (0.5, "0.5"), (1e300, "1e+300"), (True, "yes"), (False, "no"),
    (2**60, str(2**60)),
]  # fmt: skip
REFUSED = [
    None,
    math.nan,
    math.inf,
    -math.inf,
    [],
    [None],
    [["red"]],
    {},
    {"text": "red"},
    {"answer": None},
    {"answer": {"answer": "a"}},
]


@pytest.mark.parametrize(("value", "text"), [*READ, (Decimal("0.50"), "0.5"), (Decimal("3.00"), "3")])
def test_numbers_and_booleans_become_text_by_one_rule(value, text):
    assert as_text(value, "r", "answer") == text
    assert answer_texts([value, {"answer": value, "answer_confidence": "yes"}], "r") == [text, text]


@pytest.mark.parametrize("value", [*REFUSED, b"red"])
def test_anything_else_is_refused(value):
    with pytest.raises(RecipeError, match="^r has "):
        answer_texts(value, "r")


@pytest.mark.parametrize("value", [None, "", True, math.nan, [], {}])
def test_an_id_is_text_or_a_number(value):
    assert (identifier("a", "r"), identifier(3, "r"), identifier(3.0, "r")) == ("a", "3", "3")
    with pytest.raises(RecipeError, match="as its id"):
        identifier(value, "r")


@pytest.mark.parametrize("file", ["q.json", "q.jsonl"])
def test_answers_in_json_are_read_by_the_rule_or_refused_by_record(task, tmp_path, file):
    def read(value):
        row = {"id": "a", "text": "q", "answer": value}
        (tmp_path / "q" / file).write_text(json.dumps(row) + "\n" if file == "q.jsonl" else json.dumps([row]))
        return loaded(task(None, file=file))

    for value, text in READ:
        assert read(value).answers == [[text]] and read([value, "b"]).answers == [[text, "b"]]
    assert read([{"answer": "red", "answer_id": 1}, {"answer": "blue"}]).answers == [["red", "blue"]]
    for value in REFUSED:
        assert read(value).startswith(("record 'a' of ", "line 1 of q.jsonl holds ")), value


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([3, -1]), [["3"], ["-1"]]),
        (pa.array([3.0, 0.5]), [["3"], ["0.5"]]),
        (pa.array([0.1, 3.0], pa.float32()), [["0.1"], ["3"]]),
        (pa.array([True, False]), [["yes"], ["no"]]),
        (pa.array([["a", "b"], ["c"]]), [["a", "b"], ["c"]]),
        (pa.array([[0.1, 2.0], [7.0]], pa.list_(pa.float32())), [["0.1", "2"], ["7"]]),
        (pa.array([[{"answer": "red", "answer_id": 1}], [{"answer": "x", "answer_id": 2}]]), [["red"], ["x"]]),
        (pa.array([{"answer": ["red", "blue"]}, {"answer": ["x"]}]), [["red", "blue"], ["x"]]),
        (pa.array([Decimal("1.50"), Decimal("2.00")]), [["1.5"], ["2"]]),
        (pa.array(["a", None]), "record 'train-1' in pets/train has nothing (null) as its answer"),
        (pa.nulls(2), "record 'train-0' in pets/train has nothing (null) as its answer"),
        (pa.array([math.nan, 1.0]), "record 'train-0' in pets/train has the number nan as its answer"),
        (pa.array([["a"], []]), "record 'train-1' in pets/train has no answer"),
        (pa.array([["a"], [None]]), "record 'train-1' in pets/train has nothing (null) as its answer"),
        (pa.array([[["a"]], [["b"]]]), "record 'train-0' in pets/train has the list ['a'] as its answer"),
        (pa.array([{"text": "red"}, {"text": "x"}]), "record 'train-0' in pets/train has the object {'text': 'red'}"),
        (pa.array([b"a", b"b"]), "record 'train-0' in pets/train has the bytes b'a' as its answer"),
        (pa.array([1, 2], pa.timestamp("s")), "record 'train-0' in pets/train has the datetime"),
    ],
)  # fmt: skip
def test_answers_in_a_table_are_read_by_the_rule_or_refused_by_record(task, column, expected):
    data = loaded(
        task(pa.table({"image": ["0.png", "1.png"], "question": ["p", "q"], "answers": column}), "parquet")
    )
    assert data.startswith(expected) if isinstance(expected, str) else data.answers == expected


@pytest.mark.parametrize("value", [3, True, 0.5, ["q"], {"q": 1}])
def test_a_question_is_text(task, value):
    assert "as its question" in loaded(task([{"id": "a", "text": value, "answer": "x"}]))
    table = pa.table({"image": ["0.png"], "question": [value], "answers": ["x"]})
    assert "record 'train-0'" in loaded(task(table, "parquet"))


def test_ids_in_a_table_are_not_nothing(task):
    table = pa.table(
        {"id": [None, 2], "image": ["0.png", "1.png"], "question": ["q", "q"], "answers": ["x", "y"]}
    )
    assert loaded(task(table, "parquet")).startswith("row 0 of pets/train has nothing (null) as its id")


def test_captions_are_read_by_the_rule_too(task):
    def read(caption):
        content = {
            "images": [{"id": 1, "file_name": "0.png"}],
            "annotations": [{"image_id": 1, "caption": caption}],
        }
        return loaded(task(content, "coco_captions", "captioning", prompt="Say.", images="."))

    assert [read(c).answers for c in ("a cat", 3)] == [[["a cat"]], [["3"]]]
    for caption in (None, ["a"], {"a": 1}):
        assert "caption" in read(caption) and "q.json" in read(caption)
    assert "marks an image in its answer" in read("a <image>")


def test_answers_of_another_file_are_read_by_the_rule_too(task, tmp_path, make):
    def read(*notes):
        make.json(tmp_path / "q" / "notes.json", {"data": list(notes)})
        return loaded(task([{"question_id": 1, "text": "q"}], references={"train": "notes.json"}))

    assert read({"question_id": 1, "answers": [3, {"answer": "x"}]}).answers == [["3", "x"]]
    assert "record '1' of q.json in notes.json has nothing (null)" in read(
        {"question_id": 1, "answers": [None]}
    )
    assert "record '1' of q.json has no answer in notes.json" in read(
        {"answers": ["x"]}, {"question_id": 1, "answers": []}
    )
    assert "other answers for the question '1'" in read(
        {"question_id": 1, "answers": ["x"]}, {"question_id": "1", "answers": ["y"]}
    )


# ----------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("nothing", [None, "", [], [None], [""], {}])
def test_the_first_field_that_holds_something_counts(nothing):
    assert image_names({"image": "a.png", "images": nothing}, "r") == ["a.png"]
    assert image_names({"image": nothing, "images": ["a.png", "b.png"]}, "r") == ["a.png", "b.png"]
    assert image_names({"image": nothing, "images": nothing}, "r") == [] == image_names({}, "r")
    assert image_names({"image": "a.png", "images": ["a.png"]}, "r") == ["a.png"]


def test_two_fields_that_do_not_agree_are_refused():
    with pytest.raises(RecipeError, match="'a.png' as 'image' and .*'b.png'.* as 'images'"):
        image_names({"image": "a.png", "images": ["b.png"]}, "r")


@pytest.mark.parametrize("value", [3, 0, False, math.nan, {"path": "a.png"}, ["a.png", None], [3]])
def test_what_is_no_path_is_refused(value):
    with pytest.raises(RecipeError, match="as its image"):
        image_names({"image": value}, "r")


def test_merged_sets_of_chats_keep_their_images(task):
    chat = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": chat, "image": "0.png", "images": None},
        {"messages": chat, "image": "", "images": ["1.png"]},
    ]
    assert loaded(task(rows, "messages")).image_counts == [1, 1]


def png(make, *numbers):
    return [{"bytes": make.encoded(i), "path": None} for i in numbers]


def test_merged_tables_keep_their_images(task, make, tmp_path):
    text = {"question": ["q"] * 3, "answers": ["a"] * 3}
    kinds = {"question": datasets.Value("string"), "answers": datasets.Value("string")}
    features = datasets.Features(
        {"image": datasets.Image(), "images": datasets.List(datasets.Image()), **kinds}
    )
    first, both = (
        png(make, 0)[0],
        {"image": [None, *png(make, 0), None], "images": [png(make, 1, 2), None, []]},
    )
    datasets.Dataset.from_dict(both | text, features=features).to_parquet(tmp_path / "q" / "q.parquet")
    read = loaded(task(None, "parquet", file="q.parquet"))
    alone = loaded(task(pa.table({"image": [f"{i}.png" for i in range(3)], **text}), "parquet"))
    pixels = [e.image.tobytes() for e in alone]
    assert [[i.tobytes() for i in e.images] for e in read] == [pixels[1:], pixels[:1], []]
    other = {"image": [first] * 3, "images": [[first], png(make, 1), []]}
    datasets.Dataset.from_dict(other | text, features=features).to_parquet(tmp_path / "q" / "q.parquet")
    assert "record 'train-1' in pets/train has other images in 'image' than in 'images'" in loaded(
        task(None, "parquet", file="q.parquet")
    )
    paths = {"image": ["0.png", "", None], "images": [None, ["1.png", "2.png"], []]}
    assert loaded(task(pa.table(paths | text), "parquet")).image_counts == [1, 2, 0]


@pytest.mark.parametrize("field", ["image_path", "image_url", "img", "pictures"])
def test_an_image_that_another_tools_field_names_is_not_passed_over(task, field):
    row = {"id": "a", "text": "q", "answer": "x"}
    said = loaded(task([row | {field: "0.png"}]))
    assert f"as '{field}', and images are read from 'image' or 'images'; rename the field" in said
    assert loaded(task([row | {field: None}])).image_counts == [0]
    assert loaded(task([row | {field: "0.png", "image": "0.png"}])).image_counts == [1]


@pytest.mark.parametrize("field", ["video", "videos", "audio", "audios", "video_path", "audio_path"])
def test_a_record_with_a_video_or_audio_that_is_not_read_is_refused(task, field):
    row = {"id": "a", "text": "<video>\nq", "answer": "x"}
    for value in ("a.mp3", ["a.mp3"], {"path": "a"}) if field not in ("video", "videos") else ():
        assert f"'{field}', and {field[:5]} is not read" in loaded(task([row | {"text": "q", field: value}]))
    assert loaded(task([row | {"text": "q", field: None}])).questions == ["q"]
    table = {"image": ["0.png"] * 2, "question": ["q"] * 2, "answers": ["x"] * 2}
    assert "record 'train-1' in pets/train has" in loaded(
        task(pa.table(table | {field: [None, "a.mp4"]}), "parquet")
    )


def test_a_column_of_media_is_seen_without_its_bytes(task):
    table = {"image": ["0.png"] * 3, "question": ["q"] * 3, "answers": ["x"] * 3}
    for column in ([None, {"bytes": b"x", "path": None}, None], [None, [{"bytes": b"x", "path": "a"}], []]):
        assert "record 'train-1' in pets/train has" in loaded(
            task(pa.table(table | {"video": column}), "parquet")
        )
        assert loaded(task(pa.table(table | {"film": column}), "parquet")).ids == [
            "train-0",
            "train-1",
            "train-2",
        ]


@pytest.mark.parametrize("text", ["<video>\nWhat?", "What is heard? <audio>"])
def test_a_marked_video_or_audio_is_refused_in_every_place(task, text):
    reason = "is not read" if "audio" in text else "marks 1 video in its question and names 0"
    assert reason in loaded(task([{"id": "a", "text": text, "answer": "x"}]))
    assert "is not read" in loaded(task([{"id": "a", "text": "q", "answer": text}]))
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
    assert reason in loaded(task([{"messages": chat}], "messages"))
    assert "is not read" in loaded(
        task(pa.table({"image": ["0.png"], "question": [text], "answers": ["x"]}), "parquet")
    )
    with pytest.raises(RecipeError, match="the prompt of q.yaml .* is not read"):
        task([], prompt=text + "{q}")


def test_a_record_is_of_one_class(task):
    row = {"id": "a", "text": "q", "image": "0.png"}
    cats = {"kind": "classification", "prompt": "a {c}.", "classes": ["cat", "dog"]}
    assert loaded(
        task([row | {"answer": ["cat", "cat"]}, row | {"id": "b", "answer": "dog"}], **cats)
    ).labels == [0, 1]
    assert "record 'a' of q.json has 2 answers, and a record is of one class" in loaded(
        task([row | {"answer": ["cat", "dog"]}], **cats)
    )


# ----------------------------------------------------------------------------------------- places


def test_markers_follow_one_rule_in_every_format_and_in_prompts(task):
    def records(question):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]
        yield [{"id": "a", "image": "0.png", "text": question, "answer": "x"}], "llava_json"
        yield [{"messages": chat, "image": "0.png"}], "messages"
        yield pa.table({"image": ["0.png"], "question": [question], "answers": ["x"]}), "parquet"

    for content, form in records("<image>\nWhat?"):
        assert loaded(task(content, form)).questions == ["What?"]
    for content, form in records("Is <image> red?"):
        assert loaded(task(content, form)).questions == ["Is <image> red?"]
        assert loaded(task(content, form, prompt="Q: {q}")).questions == ["Q: Is <image> red?"]
        assert "marks 2 images" in loaded(task(content, form, prompt="<image>\n{q}"))
    for content, form in records("What?"):
        assert loaded(task(content, form, prompt="<image>\n{q} Briefly.")).questions == ["What? Briefly."]
        assert loaded(task(content, form, prompt="Look: <image> {q}")).questions == ["Look: <image> What?"]
        assert "marks 2 images" in loaded(task(content, form, prompt="<image> {q} <image>"))
    for content, form in records("<image><image> What?"):
        assert "marks 2 images in its question and names 1" in loaded(task(content, form))


# ----------------------------------------------------------------------------------------- text files


def encodings(text: str):
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        for end in ("\n", "\r\n"):
            yield text.replace("\n", end).encode(encoding)
            yield text.rstrip("\n").replace("\n", end).encode(encoding)


def test_lists_of_images_are_the_same_in_every_encoding_and_with_every_line_end(make, tmp_path):
    folder = tmp_path / "q"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(make.encoded(i))
    source = {"format": "image_list", "path": "q", "pattern": r"(?P<label>\S+) (?P<image>\S+)"}
    recipe = load_recipe(
        make.yaml(
            tmp_path / "q.yaml",
            **make.facts(source=source, classes="from-source", splits={"train": "list.txt"}),
        )
    )
    for data in encodings("réd 0.png\nblue 1.png\n"):
        (folder / "list.txt").write_bytes(data)
        assert load_split(recipe, "train").recipe.classes == ["blue", "réd"]
    (folder / "list.txt").write_bytes("a 0.png\n\ufeffb 1.png".encode())  # two files joined
    assert load_split(recipe, "train").recipe.classes == ["a", "b"]


@pytest.mark.parametrize("file", ["q.json", "q.jsonl", "Q.JSONL"])
def test_records_are_the_same_in_every_encoding_and_with_every_line_end(task, tmp_path, file):
    text = '{"id": "é", "text": "q", "answer": "a"}\n'
    for data in encodings(text if file != "q.json" else f"[{text}]\n"):
        (tmp_path / "q" / file).write_bytes(data)
        assert loaded(task(None, file=file)).ids == ["é"]


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_value_in_json_is_refused_by_record(task, tmp_path, constant):
    (tmp_path / "q" / "q.json").write_text(
        '[{"id": "a", "text": "NaN", "answer": "x"}, {"id": "b", "x": [%s]}]' % constant
    )
    assert f"record 'b' of q.json holds {constant.replace('1e999', 'Infinity')}, which is no value" in loaded(
        task(None)
    )


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "a\0.png"])
def test_a_name_that_no_file_can_have_is_refused_in_a_sentence(task, name):
    if "\0" not in name:  # which no YAML holds
        assert loaded(task([], splits={"train": name})).startswith("the train split of 'pets' is not there")
    row = {"id": "a", "text": "q", "answer": "x", "image": name}
    for read in (
        loaded(task([row])),
        loaded(task(pa.table({"image": [name], "question": ["q"], "answers": ["x"]}), "parquet")),
    ):
        assert read.endswith(".") and ("leads out" in read or "cannot be read" in read)


def test_what_stands_before_a_conversation_is_not_dropped(task):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    said, system = {"id": "r", "messages": chat}, (Message("system", "x"),)
    assert loaded(task([said | {"system": " x "}], "messages")).histories == [system]
    assert loaded(task([{"id": "r", "text": "q", "answer": "a", "system": "x"}])).histories == [system]
    table = pa.table({"messages": [chat] * 2, "system": ["x", None]})
    columns = {"messages": "messages"}
    assert loaded(task(table, "parquet", columns=columns)).histories == [system, ()]
    exported = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    shared = {"columns": {"messages": "conversations"}}
    assert loaded(task(pa.table({"conversations": [exported]}), "parquet", **shared)).answers == [["a"]]
    for field in ("system", "tools"):
        assert loaded(task([said | {field: ""}], "messages")).histories == [()]
        read = loaded(task([said | {field: ["x"]}], "messages"))
        assert f"record 'r' of q.json has the list ['x'] as '{field}'" in read
    assert "as 'tools'" in loaded(
        task(pa.table({"messages": [chat], "tools": ["x"]}), "parquet", columns=columns)
    )
    reasons = [chat[0], chat[1] | {"reasoning_content": "because"}]
    assert "holds 'reasoning_content' itself" in loaded(task([{"id": "r", "messages": reasons}], "messages"))


def test_a_video_in_a_caption_file_is_refused(task):
    content = {
        "images": [{"id": 1, "file_name": "0.png", "video": "a.mp4"}],
        "annotations": [{"image_id": 1, "caption": "a"}],
    }
    assert "image 1 of q.json has the text 'a.mp4' as 'video'" in loaded(
        task(content, "coco_captions", "captioning", prompt="Say.", images=".")
    )


@pytest.mark.parametrize("row", [{"question_id": 7.0}, {"id": 7, "question_id": None}, {"question_id": "7"}])
def test_a_question_finds_its_answers_by_the_same_id_in_another_form(task, tmp_path, make, row):
    make.json(tmp_path / "q" / "notes.json", {"data": [{"question_id": 7, "answers": ["x"]}]})
    assert loaded(task([row | {"text": "q"}], references={"train": "notes.json"})).answers == [["x"]]


def test_merged_sets_keep_their_texts(task):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"id": 0, "image": "0.png", "conversations": turns, "messages": None, "text": None, "answer": ""},
        {"id": 1, "image": "1.png", "conversations": None, "messages": [], "text": "where?", "answer": "b"},
        {"id": 2, "image": "2.png", "conversations": turns, "text": "what?", "answer": "a"},
    ]
    data = loaded(task(rows))
    assert data.questions == ["what?", "where?", "what?"] and data.answers == [["a"], ["b"], ["a"]]


@pytest.mark.parametrize("other", [{"text": "which?", "answer": "a"}, {"text": "what?", "answer": "b"}])
def test_a_record_with_two_questions_or_answers_is_refused(task, other):
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a"}]
    sentence = loaded(task([{"id": 0, "image": "0.png", "conversations": turns} | other]))
    assert "record '0' of q.json holds one question or answer in 'conversations' and another in" in sentence
