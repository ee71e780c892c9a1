"""The checks that any reader has to pass: every reader of the package does, and readers with a fault do not."""

from dataclasses import dataclass, replace

import pytest

from llava_keeplora_recipes import RecipeError, load_recipe
from llava_keeplora_recipes.formats import LlavaJson
from llava_keeplora_recipes.readers import READERS
from llava_keeplora_recipes.testing import check_reader

ROWS = [{"id": name, "image": f"{name}.png", "conversations": [
    {"from": "human", "value": "What?"}, {"from": "gpt", "value": "a cat"}]} for name in "ab"]  # fmt: skip
CHATS = [{"id": name, "images": [f"{name}.png"], "messages": [
    {"role": "user", "content": "What?"}, {"role": "assistant", "content": "a cat"}]} for name in "ab"]  # fmt: skip
CAPTIONS = {"images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("ab")],
            "annotations": [{"image_id": i, "caption": "a cat"} for i in range(2)]}  # fmt: skip


@pytest.fixture
def recipe_of(make, tmp_path):
    """Function (source, splits, changes) → a recipe of questions on two images."""
    for i, name in enumerate("ab"):
        (tmp_path / f"{name}.png").write_bytes(make.encoded(i))

    def build(source, file, **changes):
        facts = dict(name="q", version=1, kind="vqa", metric="exact_match", licence="CC0-1.0",
                     source={"path": "."} | source, splits={"test": file}) | changes  # fmt: skip
        return load_recipe(make.yaml(tmp_path / "q.yaml", **facts))

    return build


@pytest.fixture
def llava(recipe_of, make, tmp_path):
    make.json(tmp_path / "rows.json", ROWS)
    return recipe_of({"format": "llava_json"}, "rows.json")


def test_readers_of_conversations_and_captions_keep_the_promises(recipe_of, llava, make, tmp_path):
    check_reader(llava)
    make.json(tmp_path / "chats.json", CHATS)
    check_reader(recipe_of({"format": "messages"}, "chats.json"))
    make.json(tmp_path / "captions.json", CAPTIONS)
    check_reader(
        recipe_of(
            {"format": "coco_captions", "images": "."},
            "captions.json",
            kind="captioning",
            metric="caption_cider",
            prompt="Say.",
        )
    )


@pytest.mark.parametrize("format_name", ["imagefolder", "parquet"])
def test_readers_of_folders_and_tables_keep_the_promises(format_name, request):
    tasks = {load_recipe(path).source["format"]: path for path in request.getfixturevalue("tiny_tasks")}
    check_reader(tasks[format_name])


def test_the_reader_of_the_hub_keeps_the_promises_on_a_folder_in_its_layout(tiny_tasks):
    table = next(recipe for recipe in map(load_recipe, tiny_tasks) if recipe.source["format"] == "parquet")
    folder = str(table.folder / table.source["path"])
    check_reader(
        replace(table, source={"format": "hub", "path": folder}, splits={"train": "train", "test": "test"})
    )


def test_a_reader_with_a_fault_is_found(llava, monkeypatch):
    @dataclass
    class Moody(LlavaJson):
        def read(self, *arguments):
            records = super().read(*arguments)
            counted.append(1)
            return replace(records, questions=[str(len(counted))] * len(records.ids))

    @dataclass
    class Twice(LlavaJson):
        def read(self, *arguments):
            records = super().read(*arguments)
            return replace(records, ids=["same"] * len(records.ids))

    @dataclass
    class Unanswered(LlavaJson):
        def read(self, *arguments):
            records = super().read(*arguments)
            return replace(records, answers=[[] for _ in records.ids])

    class NoKinds(LlavaJson):
        kinds = ("pictures",)

    @dataclass
    class AnyKey(LlavaJson):
        answer: object = None

    counted = []
    faults = {
        "otherwise twice": Moody,
        "an id twice": Twice,
        "without an answer": Unanswered,
        "must be some of": NoKinds,
    }
    faults |= {"another type under 'answer'": AnyKey}
    for sentence, reader in faults.items():
        monkeypatch.setitem(READERS, "faulty", reader)
        with pytest.raises(AssertionError, match=sentence):
            check_reader(replace(llava, source=llava.source | {"format": "faulty"}))


def test_a_reader_that_passes_over_missing_files_is_found(llava, monkeypatch):
    @dataclass
    class Cached(LlavaJson):
        def read(self, recipe, split, data_root, problems=None):
            try:
                kept[split] = super().read(recipe, split, data_root, problems)
            except RecipeError:
                pass
            return kept[split]

    kept = {}
    monkeypatch.setitem(READERS, "faulty", Cached)
    with pytest.raises(AssertionError, match="not refused with a RecipeError"):
        check_reader(replace(llava, source=llava.source | {"format": "faulty"}))
