"""A damaged tree of MTIL is told in one sentence, and no file of it is ever run."""

import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
from scipy.io import savemat

from llava_keeplora_recipes import RecipeError, load_recipe, load_split
from llava_keeplora_recipes.pixel_arrays import unpickle


@pytest.fixture
def refusal(mtil, mtil_recipes, tmp_path):
    """Function (task, path in the tree, content or function of the old bytes) → the sentence that the training split is refused with."""

    def told(task: str, path: str, content) -> str:
        recipe = load_recipe(mtil_recipes[f"mtil/{task}"])
        top = recipe.source["path"].split("/")[0]
        shutil.copytree(mtil.root / top, tmp_path / top)
        file = tmp_path / path
        if content is None:
            file.unlink()
        elif isinstance(content, dict):
            savemat(file, content)
        else:
            file.write_bytes(content(file.read_bytes()) if callable(content) else content)
        with pytest.raises(RecipeError) as caught:
            load_split(recipe, "train", tmp_path)
        return str(caught.value).replace(str(tmp_path), "ROOT")

    return told


PICKLED = "put the extracted archive there."
OFFICIAL = "replace it by the official file."


@pytest.mark.parametrize(
    ("task", "path", "content", "sentence"),
    [
        ("dtd", "dtd/dtd/labels/train1.txt", None, "the train split of 'mtil/dtd' is not there: no 'ROOT/dtd/dtd/labels/train1.txt'; add the file, or correct 'splits' in the recipe."),
        ("dtd", "dtd/dtd/labels/train1.txt", b"banded/a.jpg\nnobody\n", "line 2 of train1.txt is 'nobody', which 'source.pattern' of recipe 'mtil/dtd' does not fit; correct the line, or the pattern in the recipe."),
        ("dtd", "dtd/dtd/labels/train1.txt", b"banded/../../../x.jpg\n", "1 of 1 images of mtil/dtd/train cannot be read (banded/../../../x.jpg: no such file 'ROOT/dtd/dtd/images/banded/../../../x.jpg'); replace them, or leave them out with on_bad_image: drop."),
        ("dtd", "dtd/dtd/labels/train1.txt", b"\n\n", "mtil/dtd/train holds no examples; add files, or correct 'splits' in the recipe."),
        ("dtd", "dtd/dtd/labels/train1.txt", b"banded/gone.jpg\n", "1 of 1 images of mtil/dtd/train cannot be read (banded/gone.jpg: no such file 'ROOT/dtd/dtd/images/banded/gone.jpg'); replace them, or leave them out with on_bad_image: drop."),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_train.txt", b"0034309 F/A-0\n", "mtil/aircraft/train has 1 classes and recipe 'mtil/aircraft' expects 3; use the right dataset, or correct num_classes."),
        ("flowers", "flowers-102/setid.mat", None, "there is no 'ROOT/flowers-102/setid.mat'; put the file there."),
        ("flowers", "flowers-102/setid.mat", b"no file of MATLAB", f"ROOT/flowers-102/setid.mat cannot be read as a MATLAB file (MatReadError: Mat file appears to be truncated); {OFFICIAL}"),
        ("flowers", "flowers-102/setid.mat", {"x": [1]}, "ROOT/flowers-102/setid.mat has no variable 'trnid'; replace it by the official file, or correct 'splits' in the recipe."),
        ("flowers", "flowers-102/setid.mat", {"trnid": np.array([[1, 77]])}, "setid.mat names the image 77, and imagelabels.mat has labels of 9; use the files of one release."),
        ("flowers", "flowers-102/imagelabels.mat", {"labels": np.zeros((1, 9), np.uint8)}, "imagelabels.mat has the class 0, and classes count from 1 (and 5 more, which `llava-keeplora-eval data check` lists); replace it by the official file."),
        ("stanfordcars", "stanford_cars/devkit/cars_train_annos.mat", {"annotations": np.array([[(1, "a.jpg")]], [("bbox_x1", object), ("fname", object)])}, "annotation 1 of cars_train_annos.mat has no 'fname' or no 'class'; use the file that has the labels."),
        ("cifar100", "cifar-100-python/meta", None, f"there is no 'ROOT/cifar-100-python/meta'; {PICKLED}"),
        ("cifar100", "cifar-100-python/train", b"x", f"ROOT/cifar-100-python/train cannot be read as a pickle (UnpicklingError: invalid load key, 'x'.); {OFFICIAL}"),
        ("cifar100", "cifar-100-python/train", pickle.dumps([1]), f"ROOT/cifar-100-python/train holds a list, not a dict; {OFFICIAL}"),
        ("cifar100", "cifar-100-python/train", pickle.dumps({"data": [1], "labels": [1]}), f"ROOT/cifar-100-python/train or meta next to it is none of CIFAR-100's files; {PICKLED}"),
        ("cifar100", "cifar-100-python/train", pickle.dumps({"data": np.zeros((1, 9), np.uint8), "fine_labels": [0]}, 2), f"ROOT/cifar-100-python/train holds 1 labels and pixels of the shape (1, 9); {PICKLED}"),
        ("cifar100", "cifar-100-python/train", pickle.dumps({"data": np.zeros((1, 3072)), "fine_labels": [0]}, 2), f"ROOT/cifar-100-python/train holds an array that is none of CIFAR's (ValueError: no bytes, row by row); {OFFICIAL}"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", lambda b: b[:-1], "ROOT/MNIST/raw/train-images-idx3-ubyte is no IDX file of bytes in 3 dimensions, or is cut off; replace it by the official file, unpacked."),
        ("mnist", "MNIST/raw/train-labels-idx1-ubyte", b"\x1f\x8b", "ROOT/MNIST/raw/train-labels-idx1-ubyte is no IDX file of bytes in 1 dimension, or is cut off; replace it by the official file, unpacked."),
        ("mnist", "MNIST/raw/train-labels-idx1-ubyte", struct.pack(">2I", 0x801, 1) + b"\0", "train-images-idx3-ubyte holds 6 images and train-labels-idx1-ubyte 1 labels; use the two files of one release."),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(refusal, task, path, content, sentence):
    assert refusal(task, path, content) == sentence


def test_an_image_that_is_a_link_out_of_the_data_root_is_refused(mtil, mtil_recipes, tmp_path):
    shutil.copytree(mtil.root / "eurosat", tmp_path / "root/eurosat")
    (tmp_path / "secret.jpg").write_bytes(b"x")
    for image in (tmp_path / "root/eurosat/2750/Forest").iterdir():
        image.unlink()
        image.symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(RecipeError, match="leads to '.*/secret.jpg' and so out of"):
        load_split(load_recipe(mtil_recipes["mtil/eurosat"]), "train", tmp_path / "root")


# --- pickles -----------------------------------------------------------------------------------------


class Runs:
    """What a stranger's pickle may do: call a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_a_function_is_refused_and_does_not_run(refusal, tmp_path, protocol):
    mark = tmp_path / "it-ran"
    sentence = refusal(
        "cifar100", "cifar-100-python/train", pickle.dumps({"data": Runs(os.mkdir, str(mark))}, protocol)
    )
    assert (
        "is a pickle that would call " in sentence
        and "mkdir, and nothing in a data set has to be run; replace it by the official file." in sentence
    )
    assert not mark.exists()


@pytest.mark.parametrize(
    "hidden",
    [
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cbuiltins\ngetattr\n.",
        b"cnumpy\nndarray.__class__\n.",
    ],
)
def test_of_numpy_and_of_python_only_an_arrays_three_names_are_known(tmp_path, hidden):
    (tmp_path / "x").write_bytes(hidden)
    with pytest.raises(RecipeError, match="is a pickle that would call "):
        unpickle(tmp_path / "x")


def test_a_file_as_python_2_wrote_it_is_read_as_numpy_reads_it(tmp_path):
    """The official files are of Python 2, which pickles bytes as text; such a pickle is put together here by its codes."""
    pixels = bytes(range(256)) * 24

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    kind = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
        + text(b"b")
        + b"tR(K\x01(K\x02M\x00\x0ct"
        + kind
        + b"I00\n"
        + text(pixels)
        + b"tb"
    )
    data = b"\x80\x02}(" + text(b"fine_labels") + b"](K\x05K\x07e" + text(b"data") + array + b"u."
    (tmp_path / "train").write_bytes(data)
    trusted = pickle.loads(data, encoding="latin1")
    content = unpickle(tmp_path / "train")
    assert content["fine_labels"] == trusted["fine_labels"] == [5, 7]
    assert trusted["data"].shape == (2, 3072)
    np.testing.assert_array_equal(content["data"].values(tmp_path), trusted["data"])


# --- recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            {"format": "image_list", "path": "x"},
            "mine.yaml lacks the key 'source.pattern'; add 'pattern:' under 'source' in ",
        ),
        (
            {"format": "image_list", "path": "x", "pattern": "(?P<label>.*)"},
            "mine.yaml has no group 'image' in 'source.pattern'; write (?P<image>...) where the image stands, in ",
        ),
        (
            {"format": "image_list", "path": "x", "pattern": "(?P<image>.*)"},
            "mine.yaml has no group 'label' in 'source.pattern'",
        ),
        (
            {"format": "random_split", "path": "x", "pattern": "(?P<label>"},
            "under 'source.pattern', which is no regular expression (missing ), unterminated subpattern",
        ),
        (
            {"format": "idx", "path": "x", "pattern": "x"},
            "mine.yaml has the unknown key 'source.pattern' for format idx",
        ),
    ],
)
def test_a_source_that_cannot_be_is_refused_when_the_recipe_is_read(tmp_path, source, words):
    (tmp_path / "mine.yaml").write_text(json.dumps({"extends": "mtil/dtd", "source": source}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "mine.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("task", "split", "words"),
    [
        ("eurosat", "all", "recipe 'mtil/eurosat' has 'all' as its train split; valid names are first, rest"),
        (
            "mnist",
            "train-images-idx3-ubyte",
            "recipe 'mtil/mnist' names 1 files as its train split; list two",
        ),
    ],
)
def test_a_split_that_a_format_does_not_have_is_refused(mtil, tmp_path, task, split, words):
    (tmp_path / "mine.yaml").write_text(json.dumps({"extends": f"mtil/{task}", "splits": {"train": split}}))
    with pytest.raises(RecipeError, match=words):
        load_split(load_recipe(tmp_path / "mine.yaml"), "train", mtil.root)
