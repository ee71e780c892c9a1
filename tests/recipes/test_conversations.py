"""Questions and chats from JSON, JSONL, parquet and the Hub, with no image, one or several."""

import io
import json
import pickle

import datasets
import pytest
from PIL import Image

from llava_keeplora_recipes import RecipeError, load_recipe, load_split


@pytest.fixture
def pixels(make):
    """The decoded bytes of the images 0.png to 2.png."""
    return [Image.open(io.BytesIO(make.encoded(i))).tobytes() for i in range(3)]


@pytest.fixture
def recipe(tmp_path, make):
    """A recipe of questions over `tmp_path/q`, with the pictures 0.png to 2.png in it and in `q/pictures`."""
    for folder in ("q", "q/pictures"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            (tmp_path / folder / f"{i}.png").write_bytes(make.encoded(i))

    def build(splits=None, kind="vqa", **source):
        facts = make.facts(kind=kind, prompt=None, classes=None)
        facts |= {"source": {"path": "q"} | source, "splits": splits or {"train": "train.json"}}
        return load_recipe(make.yaml(tmp_path / "q.yaml", **facts))

    return build


def refusal(recipe, split="train") -> str:
    with pytest.raises(RecipeError) as caught:
        load_split(recipe, split)
    return str(caught.value)


def llava(name, question, image=None, answer="a cat") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({} if image is None else {"image": image})


def chat(question, images=None, answer="a cat", **more) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | ({} if images is None else {"images": images}) | more


# ----------------------------------------------------------------------------------------- JSON


def test_llava_records_show_no_image_one_or_several(recipe, tmp_path, make, pixels):
    rows = [
        llava("none", "Two and two?"),
        llava("one", "<image>\nWhat?", "0.png"),
        llava("two", "<image> or <image>?", ["2.png", "1.png"]),
    ]
    make.json(tmp_path / "q" / "train.json", rows)
    data = load_split(recipe(format="llava_json"), "train")
    assert [[i.tobytes() for i in e.images] for e in data] == [[], [pixels[0]], [pixels[2], pixels[1]]]
    assert data.questions == ["Two and two?", "What?", "<image> or <image>?"]
    assert data.image_counts == [0, 1, 2] and data.answers == [["a cat"]] * 3


def test_jsonl_yields_what_json_does(recipe, tmp_path, make):
    rows = [llava(str(i), f"<image>\nWhat is {i}?", f"{i}.png") for i in range(3)]
    make.json(tmp_path / "q" / "train.json", rows)
    (tmp_path / "q" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")
    both = recipe({"train": "train.json", "test": "train.jsonl"}, format="llava_json")
    assert load_split(both, "train").fingerprint == load_split(both, "test").fingerprint


def test_a_broken_line_is_named(recipe, tmp_path):
    (tmp_path / "q" / "train.jsonl").write_text(json.dumps(llava("a", "q")) + "\n{oh\n")
    sentence = refusal(recipe({"train": "train.jsonl"}, format="llava_json"))
    assert sentence.startswith("line 2 of train.jsonl is not readable JSON (Expecting property name")
    assert sentence.endswith("; correct the line.")


def test_every_bad_record_is_counted_not_only_the_first(recipe, tmp_path, make):
    rows = [llava("a", "<image><image> q", "0.png"), llava("b", "q", "0.png"), llava("c", "<image> q")]
    make.json(tmp_path / "q" / "train.json", rows)
    assert refusal(recipe(format="llava_json")) == (
        "record 'a' of train.json marks 2 images in its question and names 1 "
        "(and 1 more, which `llava-keeplora-eval data check` lists); "
        "mark and name the same number, or remove the markers."
    )


def test_image_paths_start_where_the_recipe_says_per_split(recipe, tmp_path, make, pixels):
    (tmp_path / "q" / "0.png").unlink()
    make.json(tmp_path / "q" / "train.json", [llava("a", "q", "0.png")])
    make.json(tmp_path / "q" / "test.json", [llava("a", "q", "1.png")])
    both = recipe(
        {"train": "train.json", "test": "test.json"}, format="llava_json", images={"train": "pictures"}
    )
    assert load_split(both, "train")[0].image.tobytes() == pixels[0]
    assert load_split(both, "test")[0].image.tobytes() == pixels[1]
    one = recipe({"train": "train.json"}, format="llava_json", images="pictures")
    assert load_split(one, "train")[0].image.tobytes() == pixels[0]


def test_records_can_be_numbered_where_their_own_ids_repeat(recipe, tmp_path, make):
    make.json(tmp_path / "q" / "train.json", [llava("a", "q"), llava("a", "p")])
    assert "1 ids more than once" in refusal(recipe(format="llava_json"))
    data = load_split(recipe(format="llava_json", positional_ids=["train"]), "train")
    assert data.ids == ["train-0", "train-1"] and data.questions == ["q", "p"]


def test_meta_that_a_metric_needs_are_kept_and_fingerprinted(recipe, tmp_path, make):
    rows = [
        {"question_id": i, "text": "q", "answer": "a", "image": f"{i}.png", "answer_type": t}
        for i, t in enumerate("xy")
    ]
    make.json(tmp_path / "q" / "train.json", rows)
    data = load_split(recipe(format="llava_json", meta=["image", "answer_type", "absent"]), "train")
    assert data.meta == [{"image": "0.png", "answer_type": "x"}, {"image": "1.png", "answer_type": "y"}]
    assert data[1].meta == data.meta[1]
    make.json(tmp_path / "q" / "train.json", [rows[0], rows[1] | {"answer_type": "z"}])
    assert (
        load_split(recipe(format="llava_json", meta=["image", "answer_type", "absent"]), "train").fingerprint
        != data.fingerprint
    )


def test_an_answer_can_stand_in_another_field(recipe, tmp_path, make):
    make.json(
        tmp_path / "q" / "train.json",
        [{"question_id": 1, "text": "Where?", "answer_bbox": "[0.1, 0.2, 0.3, 0.4]"}],
    )
    assert load_split(recipe(format="llava_json", answer="answer_bbox"), "train").answers == [
        ["[0.1, 0.2, 0.3, 0.4]"]
    ]


# ------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_chats_are_read_from_json_and_jsonl(recipe, tmp_path, ending, pixels):
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    rows = [chat("Two and two?", answer="four"), chat(parts, ["1.png"]), chat(parts, "2.png", id="own")]
    text = json.dumps(rows) if ending == "json" else "\n".join(json.dumps(r) for r in rows)
    (tmp_path / "q" / f"train.{ending}").write_text(text)
    data = load_split(recipe({"train": f"train.{ending}"}, format="messages"), "train")
    assert data.ids == ["train-0", "train-1", "own"]
    assert (data.questions, data.answers) == (
        ["Two and two?", "What?", "What?"],
        [["four"], ["a cat"], ["a cat"]],
    )
    assert [[i.tobytes() for i in e.images] for e in data] == [[], [pixels[1]], [pixels[2]]]


def messages_table(make, images) -> datasets.Dataset:
    """A table as TRL's sets are: typed parts, and a list of images per row."""
    parts = lambda n: [{"type": "image", "text": None}] * n + [{"type": "text", "text": "What?"}]  # noqa: E731
    answer = [{"type": "text", "text": "a cat"}]
    rows = {
        "messages": [
            [{"role": "user", "content": parts(len(own))}, {"role": "assistant", "content": answer}]
            for own in images
        ],
        "images": [[{"bytes": make.encoded(i), "path": None} for i in own] for own in images],
    }
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features(
        {"messages": datasets.List(message), "images": datasets.List(datasets.Image())}
    )
    return datasets.Dataset.from_dict(rows, features=features)


SHOWN = [[1], [], [2, 0]]


def test_chats_are_read_from_parquet(recipe, tmp_path, make, pixels):
    messages_table(make, SHOWN).to_parquet(str(tmp_path / "q" / "train.parquet"))
    data = load_split(
        recipe({"train": "train.parquet"}, format="parquet", columns={"messages": "messages"}), "train"
    )
    assert [[i.tobytes() for i in e.images] for e in data] == [[pixels[i] for i in own] for own in SHOWN]
    assert data.questions == ["What?"] * 3 and data.ids == ["train-0", "train-1", "train-2"]


def test_lists_of_images_travel_to_a_worker_process_as_a_path(recipe, tmp_path, make, pixels):
    messages_table(make, SHOWN).to_parquet(str(tmp_path / "q" / "train.parquet"))
    data = load_split(
        recipe({"train": "train.parquet"}, format="parquet", columns={"messages": "messages"}), "train"
    )
    sent = pickle.dumps(data._images)
    copy = pickle.loads(sent)
    assert [copy.image(i).tobytes() for i in range(3)] == [pixels[1], pixels[2], pixels[0]]
    assert all(make.encoded(i) not in sent for i in range(3))


def test_chats_are_read_from_the_hub(recipe, make, monkeypatch, pixels):
    builder = make.builder(messages_table(make, SHOWN))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: builder)
    data = load_split(recipe({"train": "train"}, format="hub", columns={"messages": "messages"}), "train")
    assert [[i.tobytes() for i in e.images] for e in data] == [[pixels[i] for i in own] for own in SHOWN]


def test_a_chat_in_a_table_that_cannot_be_read_is_named(recipe, tmp_path, make):
    table = messages_table(make, [[1], [2]])
    other = table.remove_columns("images").add_column(
        "images", [[], []], feature=datasets.List(datasets.Image())
    )
    other.to_parquet(str(tmp_path / "q" / "train.parquet"))
    assert refusal(
        recipe({"train": "train.parquet"}, format="parquet", columns={"messages": "messages"})
    ) == (
        "record 'train-0' in pets/train marks 1 image in its question and names 0 "
        "(and 1 more, which `llava-keeplora-eval data check` lists); mark and name the same number, or remove the markers."
    )


def test_the_two_json_formats_tell_of_each_other(recipe, tmp_path, make):
    make.json(tmp_path / "q" / "train.json", [chat("q") | {"id": "a"}])
    assert refusal(recipe(format="llava_json")) == (
        "record 'a' of train.json holds 'messages'; write 'format: messages' in the recipe."
    )
    make.json(tmp_path / "q" / "train.json", [llava("a", "q")])
    assert refusal(recipe(format="messages")) == (
        "record 'a' of train.json has no 'messages'; add them, or write 'format: llava_json' in the recipe."
    )


# --------------------------------------------------------------------------------------- tables


def test_a_table_of_questions_may_have_lists_of_images_and_empty_cells(recipe, tmp_path, make, pixels):
    cell = lambda i: {"bytes": make.encoded(i), "path": None}  # noqa: E731
    text = {"question": ["q"] * 2, "answers": ["a"] * 2}
    kinds = {"question": datasets.Value("string"), "answers": datasets.Value("string")}
    for images, feature, expected in (
        ([[cell(0), cell(1)], None], datasets.List(datasets.Image()), [[pixels[0], pixels[1]], []]),
        ([cell(2), None], datasets.Image(), [[pixels[2]], []]),
    ):
        features = datasets.Features({"image": feature, **kinds})
        table = datasets.Dataset.from_dict({"image": images, **text}, features=features)
        table.to_parquet(str(tmp_path / "q" / "train.parquet"))
        data = load_split(recipe({"train": "train.parquet"}, format="parquet"), "train")
        assert [[i.tobytes() for i in e.images] for e in data] == expected


def test_paths_in_a_table_lie_in_the_tasks_folder(recipe, tmp_path, pixels):
    table = datasets.Dataset.from_dict(
        {"image": ["1.png", "pictures/2.png"], "question": ["q"] * 2, "answers": ["a"] * 2}
    )
    table.to_parquet(str(tmp_path / "q" / "train.parquet"))
    data = load_split(recipe({"train": "train.parquet"}, format="parquet"), "train")
    assert [e.image.tobytes() for e in data] == pixels[1:]
    table.map(lambda row: {"image": "../" + row["image"]}).to_parquet(str(tmp_path / "q" / "train.parquet"))
    assert (
        "record 'train-0' in pets/train (column 'image') has the path '../1.png', which leads out"
        in refusal(recipe({"train": "train.parquet"}, format="parquet"))
    )


# ----------------------------------------------------------------------------------- references


def question(number, image="0.png") -> dict:
    return {"question_id": f"x{number}", "image": image, "text": "Describe it."}


@pytest.fixture
def captions(recipe, tmp_path, make):
    """A captioning recipe with these questions and, in a COCO file, these captions by image id."""

    def build(questions, by_id, names=None):
        make.json(tmp_path / "q" / "test.json", questions)
        notes = [
            {"id": i, "image_id": n, "caption": c} for n, texts in by_id.items() for i, c in enumerate(texts)
        ]
        images = [{"id": n, "file_name": (names or {}).get(n, "0.png")} for n in by_id]
        make.json(tmp_path / "q" / "coco.json", {"images": images, "annotations": notes})
        return recipe(
            {"test": "test.json"}, "captioning", format="llava_json", references={"test": "coco.json"}
        )

    return build


def test_captions_of_another_file_are_paired_by_position(captions, caplog):
    questions = [question(n, f"{n % 3}.png") for n in (30, 10, 20)]
    data = load_split(
        captions(questions, {2: ["b"], 3: ["c"], 1: ["a", "A"]}, {1: "0.png", 2: "1.png", 3: "2.png"}), "test"
    )
    assert data.ids == ["x30", "x10", "x20"] and data.questions == ["Describe it."] * 3
    assert data.answers == [["a", "A"], ["b"], ["c"]] and not caplog.text


def test_captions_that_seem_to_be_of_other_images_are_reported(captions, caplog):
    load_split(captions([question(1), question(2)], {1: ["a"], 2: ["b"]}, {1: "0.png", 2: "9.png"}), "test")
    assert (
        "coco.json names another image than the question for 1 of 2 records (first: number 2)" in caplog.text
    )


def test_captions_of_another_number_of_images_are_refused(captions):
    few, many = {1: ["a"]}, {1: ["a"], 2: ["b"], 3: ["c"]}
    assert refusal(captions([question(1), question(2)], few), "test") == (
        "record 'x2' of test.json has no answer in coco.json; use the two files of one release."
    )
    assert refusal(captions([question(1), question(2)], many), "test") == (
        "coco.json holds captions of 3 images and there are 2 questions; use the two files of one release."
    )


def test_answers_of_textvqa_are_paired_by_question(recipe, tmp_path, make):
    make.json(tmp_path / "q" / "test.json", [question(1) | {"answer": "ignored"}, question(2)])
    notes = [{"question_id": f"x{n}", "answers": [f"a{n}"] * 10} for n in (2, 1, 7)]
    make.json(tmp_path / "q" / "notes.json", {"data": notes})
    both = recipe({"test": "test.json"}, format="llava_json", references={"test": "notes.json"})
    assert load_split(both, "test").answers == [["a1"] * 10, ["a2"] * 10]
    make.json(tmp_path / "q" / "notes.json", {"questions": []})
    assert refusal(both, "test") == (
        "notes.json holds neither COCO's captions nor TextVQA's or Video-ChatGPT's answers; "
        "correct 'source.references' in the recipe."
    )
