"""The lists in docs/ are what the code says; see scripts/write_docs.py."""

import dataclasses
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava_keeplora.config import schema
from llava_keeplora.methods import METHODS
from llava_keeplora_eval.metrics import METRICS
from llava_keeplora_recipes import Reader
from llava_keeplora_recipes.readers import READERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def write_docs():
    sys.path.insert(0, str(ROOT / "scripts"))  # As if the script were started.
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts/write_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "scripts"))


def test_no_page_is_out_of_date(write_docs):
    stale = [path.name for path in write_docs.stale_pages()]
    assert not stale, f"run python scripts/write_docs.py: {stale}"


def test_every_list_stands_on_a_page(write_docs):
    names = {
        name
        for path in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"<!-- generated: ([\w-]+) -->", path.read_text())
    }
    assert names == set(write_docs.GENERATED)


def test_a_page_that_is_out_of_date_is_named_and_what_is_written_by_hand_stays(write_docs, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# By hand\n\n<!-- generated: metrics -->\nold\n<!-- end -->\n\nBy hand too.\n")
    ((path, text),) = write_docs.stale_pages(tmp_path).items()
    assert (
        path == page
        and text.startswith("# By hand\n\n<!-- generated: metrics -->\n")
        and text.endswith("<!-- end -->\n\nBy hand too.\n")
    )
    page.write_text(text)
    assert not write_docs.stale_pages(tmp_path)


def test_the_lists_name_everything(write_docs):
    assert re.findall(r"^\| \[(.*?)\]", write_docs.methods(), flags=re.M) == list(METHODS)
    assert re.findall(r"^\| `(\w+)`", write_docs.metrics(), flags=re.M) == list(METRICS)
    commands = write_docs.commands() + write_docs.eval_commands()
    assert "### `llava-keeplora train`" in commands and "### `llava-keeplora-eval data check`" in commands
    assert "`--gpu-memory GB`" in commands and "--local_rank" not in commands
    for row in re.findall(r"^\| (.*) \|$", commands, flags=re.M):
        *_, meaning = cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        assert len(cells) == 3 and meaning and not meaning.startswith("(default"), row


def test_every_setting_of_a_method_is_listed_once(write_docs):
    rows = re.findall(r"^\| `([\w+-]+)` \| `(\w+)` \|", write_docs.method_options(), flags=re.M)
    assert len(rows) == len(set(rows))
    for name, method in METHODS.items():
        for option in dataclasses.fields(method.Options) if dataclasses.is_dataclass(method.Options) else ():
            assert (name, option.name) in rows or ("keeplora", option.name) in rows


def test_every_section_of_a_configuration_is_on_a_page(write_docs):
    sections = {kind for kind, _ in write_docs.SECTIONS.values()}
    records = {
        kind for kind in vars(schema).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)
    }
    assert records <= sections


def test_a_key_of_a_reader_without_a_meaning_stops_the_page(write_docs, monkeypatch):
    @dataclass
    class Undocumented(Reader):
        """A reader that says nothing of its key."""

        depth: int = 1

    monkeypatch.setitem(READERS, "undocumented", Undocumented)
    with pytest.raises(KeyError, match="depth"):
        write_docs.source_keys("undocumented")
    Undocumented.__doc__ += "\n\n    Args:\n        depth: how deep\n            it looks.\n    "
    assert "| `depth` | a whole number | `1` | how deep it looks |" in write_docs.source_keys("undocumented")


def test_the_index_names_every_page():
    index = (ROOT / "docs/index.md").read_text()
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} == set(
        re.findall(r"\]\(([\w-]+\.md)\)", index)
    )


def test_the_reference_has_every_public_name_with_its_arguments(write_docs):
    page = write_docs.api_reference()
    headings = re.findall(r"^### `(\w+)`$", page, flags=re.M)
    names = [
        name
        for module in write_docs.api_reference.__globals__["MODULES"]
        for name in importlib.import_module(module).__all__
    ]
    assert headings == [*(name for name in names if name in headings), "RunMatrix", "Exported"]
    assert {"KeepLora", "Run", "freeze_A", "check_method", "check_family"} <= set(headings)
    section = page.split("#### `KeepLora.begin_task`\n")[1].split("\n### ")[0].split("\n#### ")[0]
    assert (
        "    loss: Loss | None = None,\n" in section
        and ") -> PeftModel\n" in section
        and "self" not in section
    )
    for argument in ("batches", "loss", "name"):
        assert f"\n- `{argument}`: " in section
    assert "update reads are protected instead" in page  # Entries of several lines are whole.
    assert "#### `Run.open`" in page and "#### `Run.matrix`" in page and "._" not in page


def test_a_public_name_without_a_docstring_stops_the_page(write_docs, monkeypatch):
    monkeypatch.setattr("llava_keeplora.memory.KeepLora.begin_task.__doc__", None)
    with pytest.raises(ValueError, match="KeepLora.begin_task"):
        write_docs.api_reference()
