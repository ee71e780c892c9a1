"""A reader from a user's own file or package: its keys, its records, its identity, and what is refused in a sentence."""

import importlib.metadata

import pytest

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split
from llava_keeplora_recipes.readers import READERS

READER = '''
import csv
from dataclasses import dataclass
from typing import ClassVar

from llava_keeplora_recipes import Reader, RecipeError, Records, load_split, inspect_split
from llava_keeplora_recipes.errors import collect_errors
from llava_keeplora_recipes.paths import split_file
from llava_keeplora_recipes.records import image_files


@dataclass
class Csv(Reader):
    """Questions without pictures in a CSV file."""

    kinds: ClassVar = ("vqa",)

    delimiter: str = ","
    skip: int = 0

    def read(self, recipe, split, data_root, problems=None):
        with open(split_file(recipe, split, data_root), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=self.delimiter))[self.skip :]

        def check(row):
            if not row["answer"]:
                raise RecipeError(f"record '{row['id']}' has no answer", "write one")
            return row

        rows = collect_errors(check, rows, problems)
        return Records(
            ids=[row["id"] for row in rows],
            images=image_files([[] for _ in rows]),
            labels=[None for _ in rows],
            label_names=None,
            questions=[row["question"] for row in rows],
            answers=[[row["answer"]] for row in rows],
        )


class Short(Csv):
    def read(self, recipe, split, data_root, problems=None):
        records = super().read(recipe, split, data_root, problems)
        records.answers.pop()
        return records


class Nothing(Csv):
    def read(self, recipe, split, data_root, problems=None):
        return [split]
'''
RECIPE = """
name: sums
version: 1
kind: {kind}
metric: exact_match
licence: CC0-1.0
source: {{format: "{format}", path: data, delimiter: {delimiter}}}
splits: {{train: train.csv, test: test.csv}}
"""


@pytest.fixture
def write(tmp_path):
    """Function (settings) → a recipe beside its reader and its data."""
    (tmp_path / "csv_reader.py").write_text(READER)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"data/{split}.csv").write_text("id;question;answer\na;1 + 1?;2\nb;2 + 2?;4\n")

    def write(name="csv_reader.py:Csv", kind="vqa", delimiter='";"'):
        (tmp_path / "sums.yaml").write_text(RECIPE.format(format=name, kind=kind, delimiter=delimiter))
        return tmp_path / "sums.yaml"

    return write


def test_a_reader_next_to_the_recipe_reads_with_the_keys_that_its_fields_are(write):
    data = load_split(load_recipe(write()), "test")
    assert (data.ids, data.questions, [list(a) for a in data.answers]) == (
        ["a", "b"],
        ["1 + 1?", "2 + 2?"],
        [["2"], ["4"]],
    )


def test_a_broken_record_is_named_and_with_inspect_left_out(write, tmp_path):
    recipe = load_recipe(write())
    (tmp_path / "data/test.csv").write_text("id;question;answer\na;1 + 1?;2\nb;2 + 2?;\n")
    with pytest.raises(RecipeError, match="'b' has no answer"):
        load_split(recipe, "test")
    data, problems = inspect_split(recipe, "test")
    assert data.ids == ["a"] and len(problems) == 1


def test_the_fingerprint_knows_no_path_of_this_machine(write, tmp_path_factory):
    recipe, other = load_recipe(write()), tmp_path_factory.mktemp("other")
    for file in ("sums.yaml", "csv_reader.py"):
        (other / file).write_text((recipe.folder / file).read_text())
    assert load_recipe(other / "sums.yaml").fingerprint == recipe.fingerprint
    assert recipe.format_name == "csv_reader:Csv"


def test_an_entry_point_of_an_installed_package_is_a_format(write, tmp_path, monkeypatch):
    (tmp_path / "installed_readers.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = importlib.metadata.EntryPoint("csv", "installed_readers:Csv", "llava_keeplora.readers")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == point.group else []
    )
    assert load_split(load_recipe(write("csv")), "train").ids == ["a", "b"]
    assert READERS.source_hash("csv") and "csv" not in list(READERS)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"delimiter": "3"}, "3 under 'source.delimiter', which is not text"),
        ({"delimiter": '";", skip: true'}, "True under 'source.skip', which is not a whole number"),
        ({"delimiter": '";", skips: 1'}, "unknown key 'source.skips' for format .*did you mean 'skip'"),
        ({"kind": "captioning"}, "kind captioning, which the format .* does not hold; use vqa"),
        ({"name": "nowhere.py:Csv"}, "sums.yaml cannot be read: the reader .* is not installed"),
        ({"name": "csv_reader.py:Tsv"}, "'.*Tsv' is not in .*csv_reader.py; valid names are|did you mean"),
        ({"name": "csv_reader.py:csv"}, "no subclass of llava_keeplora_recipes.Reader"),
        ({"name": "parqet"}, "source format 'parqet'; did you mean 'parquet'"),
    ],
)
def test_what_a_recipe_cannot_say_is_refused_in_a_sentence(write, settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(write(**settings))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "csv_reader.py:Short"}, "gave no records .*: 2 ids and 1 answers"),
        ({"name": "csv_reader.py:Nothing"}, "gave no records .*: a list"),
        ({"delimiter": '","'}, "failed on the test split of 'sums' .KeyError: 'answer'"),
    ],
)
def test_a_reader_that_fails_is_said_to(write, settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        load_split(load_recipe(write(**settings)), "test")
