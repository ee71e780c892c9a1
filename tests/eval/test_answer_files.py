"""A file of answers from anywhere is read as it says, or refused in one sentence."""

import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_keeplora_eval import EvalError, predict_to_file, read_answers
from llava_keeplora_eval.cli import main

IDS = ["a", "7", "é"]
TEXTS = ["a cat", "", "two\nlines"]
ANSWERS = dict(zip(IDS, TEXTS))


@pytest.fixture
def asks():
    recipe = SimpleNamespace(name="asks", version=1, kind="vqa", metric="exact_match")

    class Data(SimpleNamespace):
        def __len__(self):
            return len(self.ids)

        def __getitem__(self, index):
            return SimpleNamespace(id=self.ids[index])

    return Data(recipe=recipe, split="test", fingerprint="f00d", ids=IDS, dropped=[], answers=[["a cat"]] * 3)


@pytest.fixture
def answered(asks, tmp_path):
    def read(content, form=None, name="answers.jsonl"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_answers(path, asks, form)

    return read


def as_id(key):
    return 7 if key == "7" else key


def records(id_key="id", text_key="text", **more):
    return [{id_key: as_id(key), **more, text_key: text} for key, text in ANSWERS.items()]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


MADE = {
    "llava": as_lines(records("question_id", prompt="?", answer_id="x", model_id="m", metadata={})),
    "lines": as_lines(records()),
    "out of order": as_lines(records()[::-1]),
    "list": json.dumps(records()),
    "list over lines": json.dumps(records("question_id", "answer"), indent=2),
    "object": json.dumps(ANSWERS),
    "object over lines": json.dumps(ANSWERS, indent=1, ensure_ascii=False),
    "gqa": json.dumps(records("questionId", "prediction")),
    "coco captions": json.dumps(records("image_id", "caption")),
    "vqa": json.dumps(records("question_id", "answer", image_id=5)),
    "vlmevalkit": json.dumps(records("index", "prediction", answer="the reference")),
    "ms-swift": as_lines(records("id", "response", answer="the reference")),
}


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", ["answers.jsonl", "answers.json"])
def test_what_other_tools_write_is_read_by_looking(answered, made, name):
    assert answered(MADE[made], name=name) == ANSWERS
    assert list(answered(MADE[made], name=name)) == IDS


@pytest.mark.parametrize(
    ("made", "form"),
    [("llava", "llava"), ("llava", "jsonl"), ("lines", "jsonl"), ("list", "json"), ("object", "json")],
)
def test_the_form_can_be_named(answered, made, form):
    assert answered(MADE[made], form) == ANSWERS


@pytest.mark.parametrize("made", ["llava", "list over lines", "object over lines"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize(
    "change", [str.rstrip, lambda t: t + "\n\n", lambda t: "\n" + t.replace("\n", "\r\n") + " \r\n"]
)
def test_line_ends_blank_lines_and_encodings_make_no_difference(answered, made, encoding, change):
    assert answered(change(MADE[made]).encode(encoding)) == ANSWERS


def test_one_answer_alone_is_read(asks, answered):
    asks.ids = ["a"]
    for content in (
        '{"id": "a", "text": "x"}',
        '[{"id": "a", "text": "x"}]',
        '{"a": "x"}\n',
        '{"id": "a", "answer": "x"}',
    ):
        assert answered(content) == {"a": "x"}


def test_what_predict_wrote_is_read_without_its_last_line_end_and_checked_against_the_data(
    asks, answered, tmp_path
):
    predict_to_file(SimpleNamespace(predict=lambda examples: TEXTS), asks, tmp_path / "p.jsonl")
    content = (tmp_path / "p.jsonl").read_text()
    assert answered(content) == answered(content.rstrip("\n")) == answered("\ufeff" + content) == ANSWERS
    for damaged, line in ((content[:-20], 3), (content[20:], 1)):
        with pytest.raises(EvalError, match=f"line {line} .*not readable JSON.*run the same command again"):
            answered(damaged)
    asks.fingerprint = "cafe"
    with pytest.raises(
        EvalError, match="line 1 of .*predicted for fingerprint f00d, and the data has fingerprint cafe"
    ):
        answered(content)


def lines_with(**change):
    return as_lines([*records()[:2], {"id": "é", "text": "x"} | change])


REFUSED = [
    (lines_with(text=None), "line 3 of .* has null as its answer"),
    (lines_with(text=True), "line 3 of .* has true as its answer"),
    (lines_with(text=0.5), r"line 3 of .* has a number \(0.5\) as its answer"),
    (lines_with(text=["x"]), "line 3 of .* has a list as its answer"),
    (lines_with(text={"x": 1}), "line 3 of .* has an object as its answer"),
    (lines_with(id=None), "line 3 of .* has null as its id"),
    (lines_with(id=7.0), r"line 3 of .* has a number \(7.0\) as its id"),
    (lines_with(answer="y"), "line 3 of .* has 'text', 'answer', and which .* in doubt; .*--from llava"),
    (lines_with(prediction="y"), "line 3 of .* has 'prediction', 'text', and which .* in doubt"),
    (lines_with(question_id="a"), "line 3 of .* has different ids under 'id', 'question_id'"),
    (lines_with(text="x" * 1_000_001), "line 3 of .* an answer of 1000001 characters"),
    (as_lines([*records()[:2], {"text": "x"}]), "line 3 of .* has no id, but 'text'"),
    (as_lines([*records()[:2], {"id": "é", "reply": "x"}]), "line 3 of .* has no answer, but 'id', 'reply'"),
    (as_lines([*records()[:2], "x"]), r"line 3 of .* is a text \(x\), and an answer is a record"),
    (json.dumps([1, 2, 3]), r"record 1 of .* is a number \(1\)"),
    (json.dumps({"a": {"text": "x"}}), "the answer to 'a' in .* has an object as its answer"),
    ('"x"', r"is a text \(x\)"),
    ("id,text\na,cat\n", "not readable JSON"),
    (b"\x89PNG\r\n\x1a\n\xff\xfe\xfa\xfb", "UTF-8"),
    (bytes(500), "not readable JSON"),
    ("[" * 100_000, "nests brackets too deep"),
    ('{"id": ' + "[" * 100_000, "nests brackets too deep"),
    (as_lines(records())[:-1].replace("a cat", r"\ud83d"), r"line 1 of .* half a character, \\ud83d"),
    ('{"id": "a", "text": "x", "id": "b"}\n' * 3, "line 1 of .* has the key 'id' more than once"),
    ('{"a": "x", "a": "y"}', "has the key 'a' more than once"),
    (('{"id": ' + "9" * 5000 + ', "text": "x"}\n') * 2, "line 1 of .* too many digits"),
]


@pytest.mark.parametrize(("content", "sentence"), REFUSED)
def test_what_is_no_answer_is_refused_in_one_sentence(answered, content, sentence):
    with pytest.raises(EvalError, match=sentence) as error:
        answered(content)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value) and "; " in str(error.value)


@pytest.mark.parametrize("form", ["llava", "jsonl"])
def test_llavas_names_settle_a_doubt(answered, form):
    content = as_lines(records("question_id", answer="the reference", id="x"))
    if form == "llava":
        assert answered(content, form) == ANSWERS
    else:
        with pytest.raises(EvalError, match="different ids"):
            answered(content, form)
    with pytest.raises(EvalError, match="no 'question_id'"):
        answered(MADE["lines"], "llava")


def test_missing_and_unknown_and_repeated_ids_are_counted_and_named(answered):
    cases = [
        (records()[:1], r"lacks 2 ids \(7, é\) of the 3 of asks \(test\); add them"),
        ([], "is empty; write one record"),
        ([*records(), {"id": 8, "text": ""}], r"has predictions for 1 id \(8\) that asks \(test\) doesn't have"),
        ([{"id": f"x{i}", "text": ""} for i in range(9)],
         r"lacks 3 ids \(a, 7, é\) of the 3 of asks \(test\), and has predictions for 9 ids \(x0, x1, x2, ...\) that asks \(test\) doesn't have"),
        ([*records(), {"id": "7", "text": "x"}], r"more than one prediction for 1 id \(7\)"),
        # 7 as a number and as text is one id; all three faults are in one sentence.
        (
            [{"id": key, "text": "x"} for key in (7, "7", "é", "b", "b")],
            r"more than one prediction for 2 ids \(7, b\), lacks 1 id \(a\) of the 3 of asks \(test\), "
            r"and has predictions for 1 id \(b\) that asks",
        ),
        ([{"id": key, "text": "x"} for key in ("a", "007", "é")], r"lacks 1 id \(7\).*1 id \(007\).*'7' for 007"),
        ([*records(), {"id": "x" * 5000, "text": ""}], r"1 id \(x{60}\.\.\.\)"),
    ]  # fmt: skip
    for rows, sentence in cases:
        with pytest.raises(EvalError, match=sentence):
            answered(as_lines(rows))


@pytest.mark.parametrize("content", ["", "\n", "\ufeff", "\u200b\n", "[]", "{}"])
def test_an_empty_file_is_reported_with_the_cure_of_its_origin(answered, tmp_path, content):
    with pytest.raises(
        EvalError, match="(is empty|lacks 3 ids).*; write one record with 'id' and 'text' for every example"
    ):
        answered(content)
    (tmp_path / "answers.made_by.json").write_text("{}")
    with pytest.raises(EvalError, match="(is empty|lacks 3 ids).*; run the same `predict` command again"):
        answered(content)


@pytest.mark.parametrize("content", ["id,text\n", "id,text\na,cat\n", "id\ttext\n", "a cat\na dog\n"])
def test_a_table_is_refused_as_json_is_read(answered, content):
    with pytest.raises(EvalError, match="not readable JSON.*; write JSON or lines of JSON") as caught:
        answered(content)
    assert "predict" not in str(caught.value)


def test_a_folder_and_a_pipe_are_no_files_of_answers(asks, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(EvalError, match="is not a file of answers"):
            read_answers(path, asks)


def test_the_command_takes_the_form(asks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llava_keeplora_eval.cli._load", lambda arguments: asks)
    path = tmp_path / "answers.jsonl"
    path.write_text(as_lines(records("question_id", answer="the reference")))
    command = ["score", "--task", "asks", "--predictions", str(path)]
    assert main(command) == 2 and "in doubt" in capsys.readouterr().err
    assert main([*command, "--from", "llava"]) == 0 and "(1/3)" in capsys.readouterr().out


CELLS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.characters(categories=["Cs"])
    | st.lists(st.text(max_size=3), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)  # fmt: skip
LAYOUTS = {
    "lines": as_lines,
    "list": json.dumps,
    "indented": lambda rows: json.dumps(rows, indent=1),
    "object": lambda rows: json.dumps(
        {str(next(iter(row.values()))): list(row.values())[-1] for row in rows}
    ),
}


def is_readable(cell):
    if isinstance(cell, str):
        return not any("\ud800" <= c <= "\udfff" for c in cell)
    return isinstance(cell, int) and not isinstance(cell, bool)


@given(data=st.data(), cells=st.lists(CELLS, min_size=3, max_size=3))
@settings(max_examples=200, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_cells_of_every_type_are_read_as_said_or_refused_in_one_sentence(asks, answered, data, cells):
    id_key = data.draw(st.sampled_from(["id", "question_id", "questionId", "image_id", "index"]))
    text_key = data.draw(st.sampled_from(["text", "answer", "prediction", "response", "caption"]))
    rows = [{id_key: as_id(key), text_key: cell} for key, cell in zip(IDS, cells)]
    content = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](data.draw(st.permutations(rows)))
    content = data.draw(
        st.sampled_from([content, content.rstrip(), content.replace("\n", "\r\n"), f"\n{content}\n \n"])
    )
    encoded = content.encode(data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])))
    try:
        texts = answered(encoded, name=data.draw(st.sampled_from(["x.jsonl", "x.json", "x.txt"])))
    except EvalError as error:
        assert not all(map(is_readable, cells)), error
        assert str(error).endswith(".") and "\n" not in str(error) and "; " in str(error)
    else:
        assert texts == dict(zip(IDS, map(str, cells))) and all(map(is_readable, cells))
