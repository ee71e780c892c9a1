"""Files of images as they come: what is seen, what is counted as not read, and what is said of those that are not there."""

import io
import os
import socket
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from llava_keeplora_eval.cli import main
from llava_keeplora_recipes import inspect_split, load_recipe, load_split
from llava_keeplora_recipes.errors import RecipeError, UserError


def turned(make) -> tuple[bytes, bytes]:
    """A PNG with EXIF orientation 6, and its pixels upright: 16 wide and 12 high stored, 12 wide and 16 high seen."""
    pixels = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    return file.getvalue(), pixels[::-1].swapaxes(0, 1).tobytes()


def drawing(alpha: int = 0) -> bytes:
    """A black image, transparent in its left half."""
    pixels = np.zeros((4, 8, 4), np.uint8)
    pixels[:, :4, 3], pixels[:, 4:, 3] = alpha, 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def ask(tmp_path, make):
    """Function (images of the records, **changes of the recipe) → a recipe of questions in `tmp_path`/data/q."""

    def build(*images, **changes):
        records = [
            {"id": str(i), "image": image, "text": "q", "answer": "a"} for i, image in enumerate(images)
        ]
        make.json(tmp_path / "data/q/train.json", records)
        source = {"format": "llava_json", "path": "q"} | changes.pop("source", {})
        facts = make.facts(
            kind="vqa",
            metric="exact_match",
            prompt=None,
            classes=None,
            splits={"train": "train.json"},
            source=source,
            **changes,
        )
        return load_recipe(make.yaml(tmp_path / "q.yaml", **facts))

    (tmp_path / "data/q/images").mkdir(parents=True)
    (tmp_path / "data/q/images/a.png").write_bytes(make.encoded(1))
    return build


def refusal(recipe, root=None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_split(recipe, "train", root)
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------ what is seen


def json_task(root, make, data):
    (root / "a.png").write_bytes(data)
    make.json(root / "t.json", [{"id": "a", "image": "a.png", "text": "q", "answer": "x"}])
    return {
        "kind": "vqa",
        "source": {"format": "llava_json", "path": "p"},
        "splits": {"train": "t.json"},
        "prompt": None,
        "classes": None,
    }


def coco_task(root, make, data):
    (root / "a.png").write_bytes(data)
    make.json(
        root / "t.json",
        {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]},
    )
    source = {"format": "coco_captions", "path": "p", "images": "."}
    return {
        "kind": "captioning",
        "source": source,
        "splits": {"train": "t.json"},
        "prompt": "Say.",
        "classes": None,
    }


def parquet_task(root, make, data):
    make.parquet(root / "t.parquet", {"image": [data], "label": ["cat"]})
    return {
        "source": {"format": "parquet", "path": "p"},
        "splits": {"train": "t.parquet"},
        "classes": ["cat", "dog"],
    }


def hub_task(root, make, data):
    make.parquet(root / "data/train-00000-of-00001.parquet", {"image": [data], "label": ["cat"]})
    return {"source": {"format": "hub", "path": "p"}, "splits": {"train": "train"}, "classes": ["cat", "dog"]}


def folder_task(root, make, data):
    (root / "train/cat").mkdir(parents=True)
    (root / "train/cat/a.png").write_bytes(data)
    return {
        "splits": {"train": "train"},
        "source": {"format": "imagefolder", "path": "p"},
        "classes": ["cat", "dog"],
    }


@pytest.mark.parametrize("write", [json_task, coco_task, parquet_task, hub_task, folder_task])
def test_every_reader_turns_images_upright_and_lays_them_over_the_page(tmp_path, make, write):
    data, upright = turned(make)
    for name, content, expected, size in (
        ("one", data, upright, (12, 16)),
        ("two", drawing(), bytes(([1, 2, 3] * 4 + [0] * 12) * 4), (8, 4)),
    ):
        root = tmp_path / name / "p"
        root.mkdir(parents=True)
        facts = make.facts(background="#010203", **write(root, make, content))
        recipe = load_recipe(make.yaml(tmp_path / f"{name}.yaml", **facts))
        data = inspect_split(recipe, "train", tmp_path / name)[0]
        assert data[0].image.tobytes() == expected and data.image_sizes == [[size[::-1]]]


def test_a_fingerprint_changes_only_where_pixels_do(ask, tmp_path, make):
    import hashlib

    (tmp_path / "data/q/t.png").write_bytes(drawing())
    (tmp_path / "data/q/o.png").write_bytes(drawing(alpha=255))
    data = load_split(ask("images/a.png", "o.png", "t.png"), "train", tmp_path / "data")
    plain = [
        hashlib.sha256((tmp_path / "data/q" / name).read_bytes()).hexdigest()
        for name in ("images/a.png", "o.png", "t.png")
    ]
    assert data.digests[:2] == plain[:2], "runs begun before images were shown as seen go on"
    assert data.digests[2] != plain[2] and data.decoding_notes == ["over #ffffff"]
    assert (data[2].image.getpixel((0, 0)), data[2].image.getpixel((7, 0))) == ((255, 255, 255), (0, 0, 0))
    other = load_split(
        ask("images/a.png", "o.png", "t.png", background="#00ff00"), "train", tmp_path / "data"
    )
    assert other.recipe.fingerprint != data.recipe.fingerprint and other.digests[2] not in data.digests
    assert other[2].image.getpixel((0, 0)) == (0, 255, 0)


@pytest.mark.parametrize("colour", ["white", "#fff", "#gggggg", ""])
def test_a_background_that_is_no_colour_is_refused(ask, colour):
    with pytest.raises(RecipeError, match="q.yaml has the background '.*'; write a colour as '#rrggbb'"):
        ask("a.png", background=colour)


def test_an_unquoted_colour_is_a_comment_in_yaml_and_refused(tmp_path):
    (tmp_path / "q.yaml").write_text("name: q\nbackground: #ffffff\n")
    with pytest.raises(
        RecipeError, match="None under 'background', which is not a colour such as '#ffffff', in quotes"
    ):
        load_recipe(tmp_path / "q.yaml")


# ------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize(
    ("image", "cause"),
    [
        ("none.png", "no such file '{root}/q/none.png'"),
        ("https://example.org/a.png", "its name is a URL (https:), and images are read from files"),
        (
            "images\\a.png",
            "its name has backslashes, and folders are parted by '/', as in '{root}/q/images/a.png'",
        ),
        ("C:\\data\\a.png", "its name has backslashes"),
        ("images/images/a.png", "a folder is doubled, '{root}/q/images/a.png' is there"),
        ("Images/A.PNG", "'{root}/q/images/a.png' is there, in another letter case"),
        ("images/cafe\u0301.png", "'{root}/q/images/caf\u00e9.png' is there, in another Unicode form"),
        ("images/caf%C3%A9.png", "'{root}/q/images/caf\u00e9.png' is there, and the name is percent-encoded"),
        ("images/a.jpg", "'{root}/q/images/a.png' is there, with another ending"),
        ("gone.png", "it is a link to 'nowhere.png'"),
        ("loop.png", "'{root}/q/loop.png' cannot be opened: Too many levels of symbolic links"),
        ("images", "'{root}/q/images' is a folder, not a file"),
        ("n" * 300 + ".png", "cannot be opened: File name too long"),
        ("pipe.png", "'{root}/q/pipe.png' is a named pipe, not a file"),
        ("socket.png", "'{root}/q/socket.png' is a socket, not a file"),
        ("empty.png", "the file is empty"),
    ],
)
def test_an_image_that_cannot_be_read_is_reported_with_its_path_and_the_likely_cause(
    ask, tmp_path, make, monkeypatch, image, cause
):
    folder = tmp_path / "data/q"
    (folder / "images" / unicodedata.normalize("NFC", "café.png")).write_bytes(make.encoded(2))
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    monkeypatch.chdir(folder)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        sentence = refusal(ask(image), tmp_path / "data")
    assert sentence.startswith("1 of 1 images of pets/train cannot be read (0: ")
    assert cause.format(root=tmp_path / "data") in sentence


def test_a_doubled_folder_of_the_recipe_and_the_records(ask, tmp_path):
    sentence = refusal(ask("images/a.png", source={"images": "images"}), tmp_path / "data")
    assert (
        f"no such file '{tmp_path}/data/q/images/images/a.png': a folder is doubled, '{tmp_path}/data/q/images/a.png' is there"
        in sentence
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_image_without_permission(ask, tmp_path):
    (tmp_path / "data/q/images/a.png").chmod(0)
    assert "cannot be opened: Permission denied" in refusal(ask("images/a.png"), tmp_path / "data")


def test_a_folder_that_cannot_be_listed_is_refused(pets, tmp_path, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("ant"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"the folder '{tmp_path}/pets/train/ant' cannot be listed (Permission denied)" in refusal(pets())


@pytest.mark.parametrize(
    "form", ["llava_json", "parquet", "idx", "cifar_python", "flowers_mat", "coco_captions", "image_list"]
)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(pets, tmp_path, form):
    for name in ("x", "meta", "imagelabels.mat"):
        os.mkfifo(tmp_path / "pets" / name)
    source = {"format": form, "path": "pets"} | (
        {"pattern": "(?P<image>.*) (?P<label>.*)"} if form == "image_list" else {}
    )
    kinds = {"coco_captions": {"kind": "captioning", "classes": None}}
    splits = {"train": ["x", "x"] if form == "idx" else "x"}
    sentence = refusal(pets(source=source, splits=splits, **kinds.get(form, {})))
    assert any(
        words in sentence for words in ("neither a file nor a folder", "named pipe", "which is no file")
    )


# -------------------------------------------------------------------------- inside the root


def test_a_path_that_stays_in_the_data_root_is_read_whatever_its_way(ask, tmp_path, make):
    root = tmp_path / "data"
    (root / "pool").mkdir()
    (root / "pool/b.png").write_bytes(make.encoded(5))
    data = load_split(ask("../pool/b.png", f"{root}/pool/b.png", "images/../../pool/b.png"), "train", root)
    assert len({e.image.tobytes() for e in data}) == 1
    (root / "list.txt").write_text(f"{root}/pool/b.png cat\n../pool/b.png cat\n")
    source = {"format": "image_list", "path": "q", "pattern": r"(?P<image>\S+) (?P<label>\S+)"}
    facts = make.facts(source=source, splits={"test": "../list.txt"})
    recipe = load_recipe(make.yaml(tmp_path / "l.yaml", **facts))
    assert inspect_split(recipe, "test", root)[0].ids == ["../pool/b.png"] * 2, (
        "an id doesn't depend on where the data lies"
    )


@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/hostname", "a/../../../x.png", "../../data-beside/x.png"]
)
def test_a_path_that_leaves_the_data_root_is_refused(ask, tmp_path, name):
    assert f"has the path {name!r}, which leads out of its data folder" in refusal(
        ask(name), tmp_path / "data"
    )


# ------------------------------------------------------------------------- what is left out


def test_files_that_are_not_read_are_counted_by_data_check_and_kept_in_the_data(
    pets, tmp_path, make, capsys, caplog
):
    folder = tmp_path / "pets/train/cat"
    for name in ("a.HEIC", "b.heic", "c.svg", "noending", ".DS_Store", "d.pdf", "e.eps"):
        (folder / name).write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache/x.png").write_bytes(make.encoded(1))
    (folder / "back").symlink_to("..")
    recipe = pets()
    data = load_split(recipe, "train")
    assert len(data) == 12
    counts = {kind: len(names) for kind, names in data.left_out.items()}
    assert counts == {
        ".heic": 2,
        ".svg": 1,
        ".pdf": 1,
        ".eps": 1,
        "without an ending": 1,
        "hidden": 2,
        "link to a folder around it": 1,
    }
    sentence = (
        "9 files are not read and left out (.eps: 1, .heic: 2, .pdf: 1, .svg: 1, hidden: 2, link to a folder around it: 1, without an ending: 1; "
        "train/cat/.DS_Store, train/cat/.cache, train/cat/a.HEIC, ...)"
    )
    assert sentence in caplog.text and data.take([0]).left_out == data.left_out
    main(["data", "check", str(tmp_path / "pets.yaml"), "--split", "train"])
    assert f"warning: {sentence}" in capsys.readouterr().out


def test_a_folder_of_files_that_are_not_read_says_so(pets, tmp_path):
    (tmp_path / "pets/none/cat").mkdir(parents=True)
    (tmp_path / "pets/none/cat/a.heic").write_bytes(b"x")
    assert refusal(pets(splits={"train": "none"})).startswith(
        "pets/train holds no examples (1 files are not read: .heic); "
    )


def test_what_is_no_image_is_counted_and_reported_by_data_check(pets, tmp_path, make, capsys):
    folder = tmp_path / "pets/train/cat"
    (folder / "0.png").write_bytes(b"<html>not found</html>")
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").write_bytes(make.encoded(1)[:100])
    os.mkfifo(folder / "pipe.png")
    (folder / "dir.png").mkdir()
    pets()
    assert main(["data", "check", str(tmp_path / "pets.yaml"), "--split", "train"]) == 2
    out = capsys.readouterr().out
    assert "4 examples left out because one cannot be read" in out
    for part in (
        "'train/cat/0.png' in pets/train cannot be read (cannot identify image file: it is a web page",
        "(the file is empty)",
        "is a named pipe",
    ):
        assert part in out


def test_files_that_a_pattern_passes_over_are_counted(pets):
    source = {"format": "random_split", "path": "pets", "pattern": r"train/(?P<label>[^/]+)/[012]\.png"}
    data = load_split(pets(source=source, splits={"train": "first", "test": "rest"}), "train")
    assert len(data.left_out["not in the pattern"]) == 24 - 9


# ------------------------------------------------------------------------- more than once


def test_images_under_two_labels_and_in_both_splits_are_reported(pets, tmp_path, make, capsys):
    folder = tmp_path / "pets"
    same = make.encoded(99)
    for name in ("train/cat/same.png", "train/ant/same.png", "train/ant/again.png", "test/cat/same.png"):
        (folder / name).write_bytes(same)
    pets()
    assert main(["data", "check", str(tmp_path / "pets.yaml")]) == 0
    out = capsys.readouterr().out
    assert "warning: 1 images are under several labels (train/ant/again.png = train/cat/same.png)" in out
    assert (
        "warning: 1 examples say what another says, and count twice (train/ant/again.png = train/ant/same.png)"
        in out
    )
    assert "warning: 1 different images are in 'test' too (train/ant/again.png = test/cat/same.png)" in out


def test_the_same_record_under_two_ids_is_reported(ask, tmp_path, capsys):
    ask("images/a.png", "images/a.png", None, None)
    main(["data", "check", str(tmp_path / "q.yaml"), "--data-root", str(tmp_path / "data")])
    assert (
        "warning: 2 examples say what another says, and count twice (0 = 1, 2 = 3)" in capsys.readouterr().out
    )


# ---------------------------------------------------------------------------- names to print


def test_control_characters_of_names_do_not_reach_the_terminal(pets, tmp_path, make, capsys):
    (tmp_path / "pets/train/cat/a\x1b[31m\n\u202egnp.png").write_bytes(b"x")
    (tmp_path / "pets/train/cat/b\x07.heic").write_bytes(b"x")
    pets()
    main(["data", "check", str(tmp_path / "pets.yaml"), "--split", "train"])
    printed = capsys.readouterr()
    assert not set("\x1b\x07\u202e") & set(printed.out + printed.err)
    assert "a\\x1b[31m \\u202egnp.png" in printed.out and "b\\x07.heic" in printed.out


def test_a_file_name_that_is_no_text_is_refused(pets, tmp_path, make):
    path = os.fsencode(tmp_path / "pets/train/cat") + b"/\xff.png"
    try:
        with open(path, "wb") as file:
            file.write(make.encoded(1))
    except OSError:
        pytest.skip("this file system has text names only")
    assert "/\\udcff.png' is no UTF-8; rename it." in refusal(pets())


def test_messages_hold_no_address_and_are_one_line():
    assert str(UserError("<_io.BytesIO object at 0x7f3a12345678>\nx", "y")) == "<_io.BytesIO object> x; y."


def test_a_hub_cell_that_names_a_file_says_which_is_missing(tmp_path, make):
    root = tmp_path / "data/pets"
    root.mkdir(parents=True)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": None, "path": str(root / "gone.png")}], kind)
    pa.parquet.write_table(pa.table({"image": cells, "label": ["cat"]}), root / "train.parquet")
    facts = make.facts(source={"format": "parquet", "path": "pets"}, splits={"train": "train.parquet"})
    recipe = load_recipe(make.yaml(tmp_path / "pets.yaml", **facts))
    assert f"no such file '{root}/gone.png'" in refusal(recipe, tmp_path / "data")
