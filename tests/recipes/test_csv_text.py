"""CSV cells of a dataset in the Hub's layout are the text that is written; other tables' small traps."""

import pyarrow
import pyarrow.parquet
import pytest

from llava_keeplora_recipes import RecipeError, load_recipe, load_split

WRITTEN = ["007", "True", "NA", "None", "null", "nan", "1.50"]


@pytest.fixture
def metadata(tmp_path, make):
    """Write `metadata.csv` beside images `0.png`, `1.png`, ... and load it as visual questions."""

    def load(text, encoding="utf-8", **changes):
        folder = tmp_path / "set" / "train"
        folder.mkdir(parents=True)
        for i in range(len(WRITTEN)):
            (folder / f"{i}.png").write_bytes(make.encoded(i))
        (folder / "metadata.csv").write_bytes(text.encode(encoding))
        facts = dict(
            kind="vqa",
            prompt="{q}",
            metric="exact_match",
            classes=None,
            source={"format": "hub", "path": "set"},
            splits={"train": "train"},
        )
        recipe = load_recipe(make.yaml(tmp_path / "set.yaml", **make.facts(**(facts | changes))))
        return load_split(recipe, "train", tmp_path)

    return load


def rows(answers=WRITTEN):
    return "file_name,question,answers\n" + "".join(f"{i}.png,what?,{a}\n" for i, a in enumerate(answers))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_cells_of_metadata_csv_are_the_text_that_is_written(metadata, encoding):
    data = metadata(rows(), encoding)
    assert [data[i].answers for i in range(len(data))] == [[text] for text in WRITTEN]


def test_cells_of_a_csv_table_are_the_text_that_is_written(tmp_path, make):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").write_bytes(make.encoded(0))
    text = "image,question,answers\n" + "".join(f"0.png,what?,{answer}\n" for answer in WRITTEN)
    (tmp_path / "set" / "train.csv").write_text(text)
    source = {"format": "hub", "path": "set"}
    facts = dict(kind="vqa", prompt="{q}", metric="exact_match", classes=None, source=source)
    facts = make.facts(**facts, splits={"train": "train"})
    data = load_split(load_recipe(make.yaml(tmp_path / "set.yaml", **facts)), "train", tmp_path)
    assert [data[i].answers for i in range(len(data))] == [[text] for text in WRITTEN]


def test_labels_of_metadata_csv_that_are_whole_numbers_are_positions(metadata):
    text = "file_name,label\n" + "".join(f"{i}.png,{i}\n" for i in range(3))
    facts = dict(kind="classification", prompt="a photo of a {c}.", metric="accuracy")
    assert metadata(text, classes=["ant", "bee", "cat"], **facts).labels == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file_name,question,answers,answers\n0.png,what?,a,b\n", "'answers' more than once"),
        ("file_name,question,answers\n", "has no rows"),
        ("file_name,question,answers\n0.png,what?\n", "row 1 of .* has 2 cells and the header has 3"),
        ('file_name,question,answers\n0.png,"what?,a\n', "cannot be read as CSV"),
    ],
)
def test_a_malformed_metadata_csv_is_refused(metadata, text, match):
    with pytest.raises(RecipeError, match=match):
        metadata(text)


@pytest.fixture
def parquet(tmp_path, make):
    """Load `pets/*.parquet` files of these labels as a training split of these patterns."""

    def load(files, patterns="*.parquet"):
        (tmp_path / "pets").mkdir()
        (tmp_path / "pets" / "0.png").write_bytes(make.encoded(0))
        for name, labels in files.items():
            kind = pyarrow.string() if any(isinstance(label, str) for label in labels) else pyarrow.float64()
            columns = {
                "image": pyarrow.array(["0.png"] * len(labels), pyarrow.string()),
                "label": pyarrow.array(labels, kind),
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "pets" / name)
        facts = make.facts(source={"format": "parquet", "path": "pets"}, splits={"train": patterns})
        return load_split(load_recipe(make.yaml(tmp_path / "pets.yaml", **facts)), "train", tmp_path)

    return load


def test_labels_stored_as_floats_without_a_fraction_are_whole_numbers(parquet):
    assert parquet({"a.parquet": [0.0, 1.0, 2.0]}).labels == [0, 1, 2]


def test_a_label_with_a_fraction_is_refused(parquet):
    with pytest.raises(RecipeError, match="label 0.5"):
        parquet({"a.parquet": [0.0, 1.0, 2.0, 0.5]})


def test_an_empty_parquet_file_among_full_ones_is_passed_over(parquet):
    assert parquet({"a.parquet": [], "b.parquet": [0.0, 1.0, 2.0]}).labels == [0, 1, 2]


def test_parquet_files_without_rows_are_refused(parquet):
    with pytest.raises(RecipeError, match="no rows"):
        parquet({"a.parquet": []})


def test_a_file_matched_by_two_patterns_is_refused(parquet):
    with pytest.raises(RecipeError, match="a.parquet' more than once"):
        parquet({"a.parquet": [0.0, 1.0, 2.0]}, ["*.parquet", "a*"])
