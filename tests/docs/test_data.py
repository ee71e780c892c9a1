"""The examples of docs/data.md: the files that they make are read as the page says, by the command line too."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import ImageColor

from llava_keeplora_eval.cli import main
from llava_keeplora_recipes import load_recipe, load_split
from llava_keeplora_recipes.readers import READERS

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()
COLOURS = ("black", "blue", "lime", "red", "white")
#: Keys of which only a dataset on the Hub can have an example.
ONLINE = {"config", "revision"}
#: Keys that several formats have and one of them shows.
CHOICES = {"options", "meta", "where"}
SHOWN_ONCE = {
    "llava_json": {"frames"},
    "llama_factory": {"frames"},
    "parquet": CHOICES,
    "hub": CHOICES,
}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def sections() -> dict[str, str]:
    """The text of every format's section by its title."""
    formats = PAGE.split("\n## The formats\n")[1].split("\n## ")[0]
    titled = re.split(r"^### (\w+)$", formats, flags=re.M)
    return dict(zip(titled[1::2], titled[2::2], strict=True))


SECTIONS = sections()
HELPER = blocks("python", PAGE.split("\n## The formats\n")[1])[0]
#: Per format the YAMLs, the Python and the records of its examples.
EXAMPLES = {
    name: list(zip(*(blocks(language, text) for language in ("yaml", "python", "json")), strict=True))
    for name, text in SECTIONS.items()
    if name not in ("rendered", "dataset")  # Pictures that are drawn, and objects (test_library.py).
}


def colour(image) -> str:
    pixel = np.asarray(image, int)[0, 0]
    return min(COLOURS, key=lambda name: abs(pixel - ImageColor.getrgb(name)).sum())


def content(example) -> dict:
    fields = {
        "id": example.id,
        "images": [colour(image) for image in example.images],
        "question": example.question,
        "answers": example.answers,
        "label": example.label,
        "meta": example.meta,
        "videos": [list(span) for span in example.videos],
        "history": [[message.role, message.text] for message in example.history],
    }
    return {key: value for key, value in fields.items() if value not in (None, {}, [])}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, and a cache of datasets for this test alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def write(text: str, folder: Path) -> Path:
    """Write a YAML of the page under the name of its first line."""
    path = folder / re.match(r"# (\S+)", text)[1]
    path.write_text(text)
    return path


def test_every_format_has_a_row_a_section_and_a_table_of_its_keys():
    assert list(SECTIONS) == list(READERS)
    rows = PAGE.split("## Which format do I have?")[1].split("## ")[0]
    assert set(re.findall(r"\[`(\w+)`\]\(#\w+\)", rows)) == set(READERS)
    for name, text in SECTIONS.items():
        assert f"<!-- generated: source-{name} -->" in text


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_read_as_the_page_says(name, folder):
    used = set()
    for text, snippet, expected in EXAMPLES[name]:
        exec(HELPER + snippet, {})
        recipe = load_recipe(write(text, folder))
        assert recipe.source["format"] == name
        records = {split: [content(e) for e in load_split(recipe, split)] for split in recipe.splits}
        assert records == json.loads(expected)
        used |= recipe.source.keys()
    assert READERS[name].keys().keys() - ONLINE - {"fps"} - SHOWN_ONCE.get(name, set()) <= used


def test_the_drawn_example_is_read(folder):
    (text,) = blocks("yaml", SECTIONS["rendered"])
    data = load_split(load_recipe(write(text, folder)), "test")
    assert len(data) and data[0].answers[0] in data.recipe.classes


def test_the_other_source_of_the_hubs_section_has_keys_of_the_format():
    (source,) = re.findall(r"`(\{format: hub.*?\})`", SECTIONS["hub"])
    assert yaml.safe_load(source).keys() - {"format"} <= READERS["hub"].keys().keys()


def test_the_check_of_data_finds_nothing_wrong_with_an_example(folder, capsys):
    (text, snippet, _), *_ = EXAMPLES["imagefolder"]
    exec(HELPER + snippet, {})
    assert main(["data", "check", str(write(text, folder))]) == 0
    assert "train: 2 examples" in capsys.readouterr().out


def test_the_keys_of_a_reader_are_all_explained():
    tables = {
        name: re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", text, flags=re.M) for name, text in SECTIONS.items()
    }
    for name, rows in tables.items():
        keys = dict(rows)
        assert all(keys.get(key, "").strip() for key in READERS[name].keys()), name
