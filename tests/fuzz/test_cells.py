"""Every field of every reader of records, with a cell of every type: read as it says, or refused in a sentence; none is lost.

What a cell says is worked out here once more, from the sentence in docs/data.md alone.
"""

import datetime
import decimal
import json
import math
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split

SCALARS = [
    None, True, False, 3, 0, -2.5, 3.0, 10**30, math.nan, math.inf, "red", "3", "", " ", "é\u2028🙂", "a\0b", "x" * 300, "../0.png", "0.png",
    "http://x/0.png", "a\\b.png", "<image>", "<image> red", "red <image> red", "<image><image>", "<video>", "<audio> red", "</s>", "{q}", "{{ x }}",
]  # fmt: skip
CELLS = SCALARS + [
    [], [None], [""], ["red"], ["red", 3, True], ["red", None], [["red"]], [[]], ["0.png"], ["0.png", "1.png"], {}, {"answer": "red"},
    {"answer": 3.0, "answer_confidence": "yes", "answer_id": 1}, {"answer": None}, {"answer": ["red", "blue"]}, {"answer": {"answer": "red"}},
    {"text": "red"}, [{"answer": "red"}, {"answer": 2}], [{}], {"bytes": None, "path": "0.png"}, [{"from": "human", "value": "q"}], [3, 4],
]  # fmt: skip


def word(value):
    """The text of a scalar, or None."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (list, dict)) or not math.isfinite(value):
        return None
    return (
        {True: "yes", False: "no"}[value] if isinstance(value, bool) else json.dumps(value).removesuffix(".0")
    )


def words(value):
    """The accepted texts that a cell says, or None."""
    if isinstance(value, list):
        said = [word(v.get("answer") if isinstance(v, dict) else v) for v in value]
    else:
        inner = value.get("answer") if isinstance(value, dict) else value
        said = [word(v) for v in inner] if isinstance(inner, list) else [word(inner)]
    return (
        said
        if said
        and None not in said
        and not any("<image>" in w or "<video>" in w or "<audio>" in w for w in said)
        else None
    )


def named(value):
    """The image files that a cell names, or None where it is no such thing."""
    listed = value if isinstance(value, list) else [value]
    if all(v in (None, "", " ", [], {}) for v in listed):
        return []
    return listed if all(v in ("0.png", "1.png", "http://x/0.png") for v in listed) else None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two images."""
    root = tmp_path_factory.mktemp("cells")
    for i in range(2):
        Image.fromarray(np.full((4, 4, 3), 60 * i, np.uint8)).save(root / f"{i}.png")
    datasets.disable_progress_bars()
    return root


def inspected(place, content, count, form="llava_json", recipe=None, **source):
    """The usable examples by id, and the sentences of the others; every record is one or the other."""
    file = (
        "rows.parquet"
        if isinstance(content, pa.Table)
        else "rows.jsonl"
        if isinstance(content, str)
        else "rows.json"
    )
    if isinstance(content, pa.Table):
        pyarrow.parquet.write_table(content, place / file)
    else:
        (place / file).write_text(content if isinstance(content, str) else json.dumps(content))
    facts = {
        "name": "cells",
        "version": 1,
        "licence": "MIT",
        "kind": "vqa",
        "metric": "exact_match",
        "splits": {"train": file},
    }
    facts |= {"source": {"format": form, "path": "."} | source} | (recipe or {})
    (place / "cells.yaml").write_text(yaml.safe_dump(facts))
    data, problems = inspect_split(load_recipe(place / "cells.yaml"), "train", place)
    assert all(isinstance(p, RecipeError) and str(p).endswith(".") and "\n" not in str(p) for p in problems)
    examples = {} if data is None else {example.id: example for example in data}
    told = {i for p in problems for i in numbers_in(str(p))}
    # a missing image of several records is told with the first of them, and all are counted as dropped
    told |= {int(name[1:]) for name in (data.dropped if data else ())}
    if data is None and not told:
        assert len(problems) == 1, "a file or column that cannot be read is refused once"
        return examples, problems
    used = {int(name[1:]) for name in examples if name[0] == "r"}
    assert used | told == set(range(count)), (problems, set(range(count)) - used - told)
    assert not used & told, "what is refused is not used"
    return examples, problems


def numbers_in(sentence):
    """The numbers of the records that a sentence names."""
    found = re.search(r"'r(\d+)'|line (\d+) |row (\d+) |record (\d+) ", sentence)
    if found is None:
        return []
    name, line, row, record = found.groups()
    return [int(line) - 1] if line else [int(name or row or record)]


def conversation(question="q", answer="x", one="human", other="gpt"):
    return [{"from": one, "value": question}, {"from": other, "value": answer}]


def chat(question="q", answer="x", **message):
    return [{"role": "user", "content": question} | message, {"role": "assistant", "content": answer}]


#: Field → a record with a cell in it.
FIELDS = {
    "answer": lambda cell: {"text": "q", "answer": cell},
    "text": lambda cell: {"text": cell, "answer": "x"},
    "image": lambda cell: {"text": "q", "answer": "x", "image": cell, "images": None},
    "images": lambda cell: {"text": "q", "answer": "x", "image": "", "images": cell},
    "video": lambda cell: {"text": "q", "answer": "x", "video": cell},
    "audio": lambda cell: {"text": "q", "answer": "x", "audios": cell},
    "conversations": lambda cell: {"conversations": cell},
    "turn": lambda cell: {"conversations": [cell, conversation()[1]]},
    "from": lambda cell: {"conversations": conversation(one=cell)},
    "question": lambda cell: {"conversations": conversation(cell)},
    "reply": lambda cell: {"conversations": conversation(answer=cell)},
    "messages": lambda cell: {"messages": cell},
    "message": lambda cell: {"messages": [cell, chat()[1]]},
    "role": lambda cell: {"messages": chat(role=cell)},
    "content": lambda cell: {"messages": chat(cell)},
    "content of the answer": lambda cell: {"messages": chat(answer=cell)},
    "part": lambda cell: {"messages": chat([cell])},
    "type": lambda cell: {"messages": chat([{"type": cell, "text": "q"}])},
    "text of a part": lambda cell: {"messages": chat([{"type": "text", "text": cell}])},
    "image of a part": lambda cell: {"messages": chat([{"type": "text", "text": "q", "image": cell}])},
    "system": lambda cell: {"messages": chat(), "system": cell},
    "history": lambda cell: {"query": "q", "response": "x", "history": cell},
    "pair": lambda cell: {"query": "q", "response": "x", "history": [["q", cell]]},
    "earlier": lambda cell: {"messages": [*chat(answer=cell), *chat()]},
    "images of a message": lambda cell: {"messages": chat(images=cell)},
}


def is_as_said(field, cell, example):
    """Whether an example says what the cell of its record does."""
    if field == "answer":
        return example.answers == words(cell)
    if field in ("image", "images"):
        return len(example.images) == len(named(cell)) and example.answers == ["x"]
    if field in ("reply", "content of the answer"):
        return example.answers == [cell]
    if field in ("system", "pair", "earlier") and example.history:
        return example.history[-1].text.strip() == cell.strip() and (example.question, example.answers) == (
            "q",
            ["x"],
        )
    if field in ("text", "question", "content", "text of a part"):
        return example.question == cell.strip() and "<image>" not in cell and example.answers == ["x"]
    if field == "video" and cell in (["0.png"], ["0.png", "1.png"]):
        return example.videos == ((0, 8),) and len(example.images) == 8
    # of every other field nothing is read but that it is there
    empty = cell in (None, "", " ", [], {}) or (
        isinstance(cell, list) and all(c in (None, "", [], {}) for c in cell)
    )
    return empty and (example.question, example.answers, example.images) == ("q", ["x"], [])


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("field", FIELDS)
def test_json(place, field, lines):
    rows = [{"id": f"r{i}"} | FIELDS[field](cell) for i, cell in enumerate(CELLS)]
    form = "messages" if {"messages", "query"} & rows[0].keys() else "llava_json"
    examples, problems = inspected(
        place, "".join(json.dumps(r) + "\n" for r in rows) if lines else rows, len(rows), form
    )
    for name, example in examples.items():
        assert is_as_said(field, CELLS[int(name[1:])], example), (field, CELLS[int(name[1:])], example)
    if field == "answer":
        assert set(examples) == {f"r{i}" for i, cell in enumerate(CELLS) if words(cell) is not None}
    if field in ("image", "images"):
        readable = {
            f"r{i}"
            for i, cell in enumerate(CELLS)
            if named(cell) is not None and "http://x/0.png" not in str(cell)
        }
        assert set(examples) == readable


def test_ids(place):
    rows = [{"id": cell, "text": "q", "answer": "x"} for cell in CELLS]
    (place / "rows.json").write_text(json.dumps(rows))
    facts = {
        "name": "cells",
        "version": 1,
        "licence": "MIT",
        "kind": "vqa",
        "metric": "exact_match",
        "splits": {"train": "rows.json"},
    }
    (place / "cells.yaml").write_text(
        yaml.safe_dump(facts | {"source": {"format": "llava_json", "path": "."}})
    )
    data, problems = inspect_split(load_recipe(place / "cells.yaml"), "train", place)
    said = [word(cell) for cell in CELLS if not isinstance(cell, bool) and (word(cell) or "").strip()]
    assert data.ids == said and len(problems) == len(CELLS) - len(said) + 1
    assert sum("more than once" in str(p) for p in problems) == 1


@pytest.mark.parametrize("field", ["caption", "image_id", "file_name", "id"])
def test_captions(place, field):
    for cell in CELLS:
        image, note = {"id": 1, "file_name": "0.png"}, {"id": 1, "image_id": 1, "caption": "x"}
        (image if field in ("file_name", "id") else note)[field] = cell
        if field == "id":
            note["image_id"] = cell
        (place / "rows.json").write_text(json.dumps({"images": [image], "annotations": [note]}))
        facts = {
            "name": "cells",
            "version": 1,
            "licence": "MIT",
            "kind": "captioning",
            "metric": "caption_rouge_l",
            "prompt": "Say.",
        }
        source = {"format": "coco_captions", "path": ".", "images": "."}
        (place / "cells.yaml").write_text(
            yaml.safe_dump(facts | {"source": source, "splits": {"train": "rows.json"}})
        )
        try:
            data = load_split(load_recipe(place / "cells.yaml"), "train", place)
        except RecipeError as error:
            assert "\n" not in str(error) and str(error).endswith(".")
            assert field != "caption" or words([cell]) is None or isinstance(cell, dict)
        else:
            assert data.answers == [[word(cell)]] if field == "caption" else data.answers == [["x"]]
            assert field != "id" or data.ids == [word(cell)]


#: Columns of every type; a value is in the second row, and nothing in the third.
COLUMNS = [
    pa.array(["red", "blue", None]), pa.array(["red", "blue", None], pa.large_string()), pa.array([3, -2, None]), pa.array([3, 2, None], pa.uint8()),
    pa.array([3.0, 0.1, None]), pa.array([3.0, 0.1, None], pa.float32()), pa.array([1.0, 0.5, None], pa.float16()), pa.array([math.nan, 2.0, None]),
    pa.array([True, False, None]), pa.nulls(3), pa.array([b"a", b"b", None]), pa.array([decimal.Decimal("1.50"), decimal.Decimal("-2.00"), None]),
    pa.array([datetime.date(2020, 1, 1)] * 2 + [None]), pa.array([datetime.datetime(2020, 1, 1)] * 2 + [None]), pa.array([datetime.time(1)] * 2 + [None]),
    pa.array([datetime.timedelta(1)] * 2 + [None]), pa.array(["a", "b", None]).dictionary_encode(), pa.array([["a", "b"], ["c"], None]), pa.array([[], [None], None], pa.list_(pa.string())),
    pa.array([[1], [2, 3], None]), pa.array([[0.1], [3.0], None], pa.list_(pa.float32())), pa.array([[True], [False], None]), pa.array([[["a"]], [[]], None]),
    pa.array([{"answer": "a", "answer_id": 1}, {"answer": "b", "answer_id": 2}, None]), pa.array([[{"answer": "a"}], [{"answer": "b"}], None]),
    pa.array([{"answer": ["a", "b"]}, {"answer": ["c"]}, None]), pa.array([{"text": "a"}] * 2 + [None]), pa.array([{"answer": {"answer": "a"}}] * 2 + [None]),
    pa.array([["a", "b"], ["c", "d"], None], pa.list_(pa.string(), 2)), pa.array(["<image> a", "<video>", None]), pa.array([{"bytes": b"x", "path": None}] * 2 + [None]),
    pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
]  # fmt: skip


def cells_of(column):
    """A column's cells in the words of JSON, or of types that JSON lacks."""
    plain = column.cast(pa.float64()) if column.type in (pa.float16(),) else column
    cells = plain.to_pylist()
    short = column.type == pa.float32() or (
        pa.types.is_list(column.type) and column.type.value_type == pa.float32()
    )
    return (
        json.loads(json.dumps(cells, default=str), parse_float=lambda t: float(f"{float(t):.6g}"))
        if short
        else cells
    )


@pytest.mark.parametrize("role", ["answers", "question", "id", "image", "images", "video", "messages"])
@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: str(c.type).replace(" ", ""))
def test_tables(place, role, column):
    table = {
        "id": ["r0", "r1", "r2"],
        "image": ["0.png"] * 3,
        "question": ["q"] * 3,
        "answers": ["x"] * 3,
    } | {role: column}
    chats = {"columns": {"messages": "messages"}} if role == "messages" else {}
    if role == "id":
        check_ids(place, pa.table(table), column)
        return
    examples, _ = inspected(place, pa.table(table), 3, "parquet", **chats)
    if role not in ("answers", "question"):
        return
    cells = cells_of(column)
    for name, example in examples.items():
        cell = cells[int(name[1:])]
        if isinstance(cell, decimal.Decimal):
            assert example.answers == [f"{cell.normalize():f}"]
        else:
            assert (
                (example.answers == words(cell))
                if role == "answers"
                else (example.question == cell.removeprefix("<image> "))
            )


def check_ids(place, table, column):
    """Ids are text and numbers; the others are refused, and none is lost."""
    pyarrow.parquet.write_table(table, place / "rows.parquet")
    facts = {
        "name": "cells",
        "version": 1,
        "licence": "MIT",
        "kind": "vqa",
        "metric": "exact_match",
        "splits": {"train": "rows.parquet"},
    }
    (place / "cells.yaml").write_text(yaml.safe_dump(facts | {"source": {"format": "parquet", "path": "."}}))
    data, problems = inspect_split(load_recipe(place / "cells.yaml"), "train", place)
    numbers = (str, int, float, decimal.Decimal)
    said = [
        c
        for c in cells_of(column)
        if isinstance(c, numbers) and not isinstance(c, bool) and (isinstance(c, str) or math.isfinite(c))
    ]
    ids = [] if data is None else data.ids
    assert ids == [f"{c.normalize():f}" if isinstance(c, decimal.Decimal) else word(c) for c in said]
    assert len(ids) + len({i for p in problems for i in numbers_in(str(p))}) in (3, len(ids)), problems


@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: str(c.type).replace(" ", ""))
def test_labels(place, column):
    """A label is a class by name, or by position where it is whole (1 or 1.0); all else is refused."""
    table = {"id": ["r0", "r1", "r2"], "image": ["0.png"] * 3, "label": column}
    classes = ["red", "blue", "a", "b"]
    facts = {"kind": "classification", "prompt": "a {c}.", "classes": classes, "metric": "accuracy"}
    examples, _ = inspected(place, pa.table(table), 3, "parquet", facts)
    cells = cells_of(column)
    by_name = {f"r{i}": c for i, c in enumerate(cells) if isinstance(c, str) and c in classes}
    by_place = {
        f"r{i}": classes[int(c)]
        for i, c in enumerate(cells)
        if type(c) in (int, float) and c in range(len(classes))
    }
    assert {name: example.answers[0] for name, example in examples.items()} == by_name | by_place
