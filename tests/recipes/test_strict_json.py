"""JSON from anywhere is read as it stands, or refused with the reason."""

import json

import pytest

from llava_keeplora_recipes import RecipeError
from llava_keeplora_recipes.json_files import read_json, read_rows
from llava_keeplora_recipes.strict_json import decode_text, parse_json


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_unicode_encoding_and_line_end_is_read(encoding, end):
    assert decode_text(f'["é",{end}"\u2028"]'.encode(encoding)) == '["é",\n"\u2028"]'


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(ValueError, match="UTF-8.*byte 1"):
        decode_text(b'"\xff\xfe\xfd"')


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nests brackets too deep"),
        ('{"a":' * 100_000, "nests brackets too deep"),
        ('{"a": {"id": 1, "b": 2, "id": 3}}', "key 'id' more than once"),
        (r'["\ud83d"]', r"half a character, \\ud83d"),
        (r'{"a": {"\uDC00": 1}}', r"half a character, \\udc00"),
        ("9" * 5000, "too many digits"),
        ("\0" * 8, "is not readable JSON"),
        ('["\0"]', "is not readable JSON"),
        ("", "is not readable JSON"),
    ],
)
def test_what_the_standard_reader_takes_silently_or_fails_on_is_refused_with_its_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize("value", [{"a": [1, None, 2.5, "\ud83d\ude00 x\0"]}, "\\ud83d", [], 10**300])
def test_anything_else_is_read_as_by_the_standard_reader(value):
    assert parse_json(json.dumps(value)) == json.loads(json.dumps(value))


def test_the_records_of_a_task_are_read_so_too(tmp_path):
    (tmp_path / "a.json").write_bytes('[{"id": "é"}]\r\n'.encode("utf-16"))
    assert read_json(tmp_path / "a.json", list) == [{"id": "é"}]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n{"id": 2, "id": 3}')
    with pytest.raises(RecipeError, match="line 2 of b.jsonl has the key 'id' more than once"):
        read_rows(tmp_path / "b.jsonl")
