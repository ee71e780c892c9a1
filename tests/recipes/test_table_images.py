"""Images in tables: where their paths start, what holds nothing, and parquet files without rows."""

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from llava_keeplora_recipes import RecipeError, inspect_split, load_recipe, load_split

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def task(tmp_path, make, monkeypatch):
    """Write tables beside two images, and return the recipe of questions on them."""

    def write(files, **changes):
        folder = tmp_path / "set"
        for i in range(2):
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            (folder / "pictures" / f"{i}.png").write_bytes(make.encoded(i))
        for name, columns in files.items():
            count = len(next(iter(columns.values())))
            rest = {"question": ["what?"] * count, "answers": ["x"] * count}
            (folder / name).parent.mkdir(exist_ok=True)
            pyarrow.parquet.write_table(
                pa.table(columns | {k: v for k, v in rest.items() if k not in columns}), folder / name
            )
        monkeypatch.chdir(tmp_path)  # not where the paths start
        facts = dict(kind="vqa", prompt="{q}", metric="exact_match", classes=None)
        facts |= dict(source={"format": "parquet", "path": "set"}, splits={"train": "*.parquet"})
        return load_recipe(make.yaml(tmp_path / "set.yaml", **make.facts(**(facts | changes))))

    return write


def held(make, *cells):
    """Structs: an index is an image's bytes, text a path."""
    return [
        cell if cell is None else {"bytes": make.encoded(cell) if isinstance(cell, int) else None,
                                   "path": cell if isinstance(cell, str) else None}
        for cell in cells
    ]  # fmt: skip


@pytest.mark.parametrize("lists", [False, True])
def test_paths_in_structs_start_at_the_folder_of_the_task(task, make, tmp_path, lists):
    cells = held(make, "pictures/1.png", 0, str(tmp_path / "set/pictures/0.png"))
    column = pa.array([[c] for c in cells], pa.list_(STRUCT)) if lists else pa.array(cells, STRUCT)
    data = load_split(task({"a.parquet": {"image": column}}), "train", tmp_path)
    expected = [make.encoded(i) for i in (1, 0, 0)]
    files = [pa.py_buffer(data._images._bytes(row)).to_pybytes() for row in range(3)]
    assert files == expected and data.image_counts == [1, 1, 1]


def test_a_path_that_leads_out_is_refused_by_record(task, make, tmp_path):
    cells = pa.array(held(make, "pictures/1.png", "../../x.png"), STRUCT)
    for column in (cells, pa.array(["pictures/1.png", "../../x.png"])):
        data, problems = inspect_split(task({"a.parquet": {"image": column}}), "train", tmp_path)
        assert data.ids == ["train-0"] and "'train-1' in pets/train" in str(*problems)


@pytest.mark.parametrize("form", ["structs", "paths"])
def test_nothing_among_images_is_refused_and_nothing_alone_is_no_image(task, make, tmp_path, form):
    rows = [
        ["pictures/0.png"],
        ["pictures/0.png", None],
        [None],
        [],
        None,
        ["pictures/0.png", "pictures/1.png"],
        [""],
    ]
    if form == "structs":
        column = pa.array([row and held(make, *row) for row in rows], pa.list_(STRUCT))
    else:
        column = pa.array(rows, pa.list_(pa.string()))
    data, problems = inspect_split(task({"a.parquet": {"images": column}}), "train", tmp_path)
    assert data.image_counts == [1, 0, 0, 0, 2, 0]
    assert [p.problem for p in problems] == [
        "record 'train-1' in pets/train has an empty place among the 2 in 'images'"
    ]


def test_one_image_in_two_columns_is_one_in_bytes_and_by_its_path(task, make, tmp_path):
    columns = {
        "image": pa.array(held(make, 0, "pictures/1.png", None), STRUCT),
        "images": pa.array([held(make, 0), None, held(make, "pictures/1.png")], pa.list_(STRUCT)),
    }
    data = load_split(task({"a.parquet": columns}), "train", tmp_path)
    assert data.image_counts == [1, 1, 1] and len(set(data.digests)) == 2


def test_a_broken_image_in_two_columns_is_one_broken_image(task, make, tmp_path):
    broken = pa.array([{"bytes": b"broken", "path": None}, *held(make, 0)], STRUCT)
    recipe = task({"a.parquet": {"image": broken, "images": pa.array([[c] for c in broken.to_pylist()])}})
    with pytest.raises(RecipeError, match=r"1 of 2 images of pets/train cannot be read \(train-0: [^,]*\)"):
        load_split(recipe, "train", tmp_path)
    data, problems = inspect_split(recipe, "train", tmp_path)
    assert data.ids == ["train-1"] and len(problems) == 1


EMPTY, FULL = {"image": pa.array([], pa.string())}, {"image": ["pictures/0.png"]}
HUB = {"source": {"format": "hub", "path": "set"}, "splits": {"train": "train"}}


@pytest.mark.parametrize("changes", [{}, HUB])
def test_parquet_files_without_rows_are_counted(task, tmp_path, changes):
    files = {"train-0.parquet": EMPTY, "train-1.parquet": FULL, "train-2.parquet": EMPTY}
    for name in files:
        files[name] = files[name] | {
            k: pa.array(["x"] * len(files[name]["image"]), pa.string()) for k in ("question", "answers")
        }
    data = load_split(task(files, **changes), "train", tmp_path)
    assert len(data) == 1 and data.left_out == {"without rows": ["train-0.parquet", "train-2.parquet"]}


@pytest.mark.parametrize("changes", [{}, HUB])
def test_a_split_of_parquet_files_without_rows_is_refused(task, tmp_path, changes):
    with pytest.raises(RecipeError, match="train.* has no rows"):
        load_split(task({"train-0.parquet": EMPTY}, **changes), "train", tmp_path)


@pytest.mark.parametrize("changes", [{}, HUB])
def test_a_first_row_group_without_rows_is_passed_over(task, tmp_path, changes):
    recipe = task({"train-0.parquet": FULL}, **changes)
    table = pyarrow.parquet.read_table(tmp_path / "set/train-0.parquet")
    with pyarrow.parquet.ParquetWriter(tmp_path / "set/train-0.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table)
    assert len(load_split(recipe, "train", tmp_path)) == 1


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this datasets has no columns of JSON")
def test_what_datasets_keeps_as_json_is_the_value_without_quotes(task, tmp_path):
    recipe = task({"a.parquet": FULL})
    features = datasets.Features(
        {"image": datasets.Value("string"), "question": datasets.Value("string"), "answers": datasets.Json()}
    )
    rows = [
        {"image": "pictures/0.png", "question": "q", "answers": answer} for answer in ("red", 3, ["a", "b"])
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "set/a.parquet"))
    assert load_split(recipe, "train", tmp_path).answers == [["red"], ["3"], ["a", "b"]]


@pytest.mark.parametrize("changes", [{}, HUB])
def test_a_column_that_is_boolean_in_one_file_and_text_in_another_is_refused(task, tmp_path, changes):
    files = {"train-0.parquet": FULL, "train-1.parquet": FULL | {"answers": [True]}}
    with pytest.raises(RecipeError, match="'answers' is boolean in one of .*train-0.*train-1"):
        load_split(task(files, **changes), "train", tmp_path)
