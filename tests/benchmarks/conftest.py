"""Tiny trees in the layouts in which the benchmarks' files are published."""

from __future__ import annotations

import gc
import itertools
import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from llava_keeplora_recipes import load_recipe, load_sequence

#: Images per class where a set has an official split.
EACH = {"train": 2, "test": 1}


class MtilTree:
    """The eleven sets of MTIL under one folder; every image is of one grey.

    Args:
        root: an empty folder.
        classes: task → its classes' names in the recipe, as many as it shall have.

    Attributes:
        said: (task, split) → (class, grey) of every image; the split is `all` where the images are cut at random.
    """

    def __init__(self, root: Path, classes: dict[str, list[str]]):
        self.root, self.said = root, {}
        for task, names in classes.items():
            self._greys = itertools.cycle(range(10, 250, 12))
            getattr(self, f"_{task}")(f"mtil/{task}", names)

    def _images(
        self, task: str, split: str, names: list[str], each: int | None = None
    ) -> Iterator[tuple[int, str, int]]:
        """(number of the class, class, grey) of the images of a split, one class after another and then once more."""
        for _ in range(EACH[split] if each is None else each):
            for number, name in enumerate(names):
                grey = next(self._greys)
                self.said.setdefault((task, split), []).append((name, grey))
                yield number, name, grey

    def _jpeg(self, path: str, grey: int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (grey, grey, grey)).save(file, "JPEG", quality=95)

    def _text(self, path: str, lines: list[str]) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines))

    # --- an official split in a list of images ---------------------------------------------------

    def _aircraft(self, task: str, names: list[str]) -> None:
        top, numbers = "fgvc-aircraft-2013b/data", itertools.count(34309)
        self._text(f"{top}/variants.txt", names)
        for split in EACH:
            lines = []
            for _, name, grey in self._images(task, split, names):
                lines.append(f"{next(numbers):07d} {name}")
                self._jpeg(f"{top}/images/{lines[-1][:7]}.jpg", grey)
            self._text(f"{top}/images_variant_{split}.txt", lines)
        self._text(f"{top}/images_variant_val.txt", [])

    def _dtd(self, task: str, names: list[str]) -> None:
        for split in EACH:
            lines = []
            for _, name, grey in self._images(task, split, names):
                lines.append(f"{name}/{name}_{split}_{len(lines):04d}.jpg")
                self._jpeg(f"dtd/dtd/images/{lines[-1]}", grey)
            self._text(f"dtd/dtd/labels/{split}1.txt", lines)

    def _food(self, task: str, names: list[str]) -> None:
        numbers = itertools.count(1005649)
        for split in EACH:
            lines = []
            for _, name, grey in self._images(task, split, names):
                lines.append(f"{name}/{next(numbers)}")
                self._jpeg(f"food-101/images/{lines[-1]}.jpg", grey)
            self._text(f"food-101/meta/{split}.txt", lines)

    def _oxfordpet(self, task: str, names: list[str]) -> None:
        numbers = itertools.count(1)
        for split, file in (("train", "trainval"), ("test", "test")):
            lines = []
            for number, name, grey in self._images(task, split, names):
                # Cats are written with capitals and dogs without.
                image = f"{name.replace(' ', '_') if number % 2 == 0 else name.replace(' ', '_').lower()}_{next(numbers)}"
                lines.append(f"{image} {number + 1} {number % 2 + 1} 1")
                self._jpeg(f"oxford-iiit-pet/images/{image}.jpg", grey)
            self._text(f"oxford-iiit-pet/annotations/{file}.txt", lines)

    # --- MATLAB -----------------------------------------------------------------------------------

    def _flowers(self, task: str, names: list[str]) -> None:
        labels, ids = [], {"trnid": [], "valid": [], "tstid": []}
        for split, variable in (("test", "tstid"), ("train", "trnid")):
            for number, _, grey in self._images(task, split, names):
                labels.append(number + 1)
                ids[variable].append(len(labels))
                self._jpeg(f"flowers-102/jpg/image_{len(labels):05d}.jpg", grey)
        savemat(self.root / "flowers-102/imagelabels.mat", {"labels": np.array([labels], np.uint8)})
        savemat(
            self.root / "flowers-102/setid.mat",
            {name: np.array([numbers], np.uint16) for name, numbers in ids.items()},
        )

    def _stanfordcars(self, task: str, names: list[str]) -> None:
        top = "stanford_cars"
        (self.root / top / "devkit").mkdir(parents=True)
        savemat(self.root / top / "devkit/cars_meta.mat", {"class_names": np.array([names], object)})
        for split, file in (
            ("train", "devkit/cars_train_annos.mat"),
            ("test", "cars_test_annos_withlabels.mat"),
        ):
            notes = []
            for number, _, grey in self._images(task, split, names):
                notes.append((1, 16, np.uint8(number + 1), f"{len(notes) + 1:05d}.jpg"))
                self._jpeg(f"{top}/cars_{split}/{notes[-1][-1]}", grey)
            fields = [("bbox_x1", object), ("bbox_x2", object), ("class", object), ("fname", object)]
            savemat(self.root / top / file, {"annotations": np.array([notes], fields)})

    # --- arrays -----------------------------------------------------------------------------------

    def _cifar100(self, task: str, names: list[str]) -> None:
        top = self.root / "cifar-100-python"
        top.mkdir()
        (top / "meta").write_bytes(
            pickle.dumps({"fine_label_names": names, "coarse_label_names": []}, protocol=2)
        )
        for split in EACH:
            images = list(self._images(task, split, names))
            pixels = np.repeat(np.array([grey for _, _, grey in images], np.uint8), 3072).reshape(-1, 3072)
            batch = {
                "data": pixels,
                "fine_labels": [n for n, _, _ in images],
                "coarse_labels": [0] * len(images),
                "filenames": ["x"] * len(images),
            }
            (top / split).write_bytes(pickle.dumps(batch, protocol=2))

    def _mnist(self, task: str, names: list[str]) -> None:
        top = self.root / "MNIST/raw"
        top.mkdir(parents=True)
        for split, file in (("train", "train"), ("test", "t10k")):
            images = list(self._images(task, split, names))
            pixels = b"".join(bytes([grey]) * 28 * 28 for _, _, grey in images)
            (top / f"{file}-images-idx3-ubyte").write_bytes(
                struct.pack(">4I", 0x803, len(images), 28, 28) + pixels
            )
            (top / f"{file}-labels-idx1-ubyte").write_bytes(
                struct.pack(">2I", 0x801, len(images)) + bytes(n for n, _, _ in images)
            )

    # --- a split at random ------------------------------------------------------------------------

    def _caltech101(self, task: str, names: list[str]) -> None:
        top, folders = "caltech101/101_ObjectCategories", folders_of(task)
        self._cut(
            task,
            [(name, f"{top}/{folders.get(name, name.replace(' ', '_'))}") for name in names],
            "image_{:04d}.jpg",
        )
        self._jpeg(f"{top}/BACKGROUND_Google/image_0001.jpg", 0)

    def _eurosat(self, task: str, names: list[str]) -> None:
        folders = folders_of(task)
        self._cut(task, [(name, f"eurosat/2750/{folders[name]}") for name in names], "land_{:03d}.jpg")

    def _sun397(self, task: str, names: list[str]) -> None:
        self._cut(task, [(name, f"SUN397/{name[0]}/{name}") for name in names], "sun_{:04d}.jpg")
        self._text("SUN397/ClassName.txt", [f"/{name[0]}/{name}" for name in names])

    def _cut(self, task: str, folders: list[tuple[str, str]], file: str) -> None:
        """Images of every class in folder order, so many that each class has some in the first part of the cut."""
        folders = sorted(folders, key=lambda item: PurePosixPath(item[1]).parts)
        names = [(name, f"{folder}/{file}") for name, folder in folders]
        for owner, number in zip(owners(len(names)), itertools.count(1)):
            name, pattern = names[owner]
            grey = next(self._greys)
            self._jpeg(pattern.format(number), grey)
            self.said.setdefault((task, "all"), []).append((name, grey))


def folders_of(task: str) -> dict[str, str]:
    """class → the folder that the set itself calls it by, where that is another name."""
    names: dict[str, str] = {}
    for folder, name in load_recipe(task).class_names.items():
        names.setdefault(name, folder)
    return names


def owners(classes: int) -> list[int]:
    """The class of each of the fewest images, in order, of which PyTorch's random split gives every class one in its first part."""
    for count in itertools.count(classes + 1):
        parts = torch.utils.data.random_split(
            range(count), [int(0.8 * count), count - int(0.8 * count)], torch.Generator().manual_seed(42)
        )
        first, owner, found = set(parts[0].indices), 0, []
        for image in range(count):
            found.append(min(owner, classes - 1))
            owner += image in first
        if owner >= classes:
            return found


def mtil_classes(count: int | None = None) -> dict[str, list[str]]:
    """task → classes, as many as there are or the first few; where the data name them, names of our own."""
    made = {"aircraft": "F/A-{}", "stanfordcars": "Maker Model {} 2012", "sun397": "place_{}/outdoor"}
    classes = {}
    for task in load_sequence("mtil-order1").tasks:
        recipe, name = load_recipe(task), task.removeprefix("mtil/")
        listed = recipe.classes or [made[name].format(i) for i in range(recipe.num_classes)]
        classes[name] = listed[:count]
    return classes


@pytest.fixture(scope="session")
def mtil(tmp_path_factory) -> MtilTree:
    """Three classes of each set."""
    return MtilTree(tmp_path_factory.mktemp("mtil"), mtil_classes(3))


@pytest.fixture(scope="session")
def mtil_recipes(mtil) -> dict[str, Path]:
    """task → the shipped recipe for these three classes alone."""
    folder = mtil.root / "recipes"
    folder.mkdir(exist_ok=True)
    paths = {}
    for name, classes in mtil_classes(3).items():
        facts = {"extends": f"mtil/{name}", "num_classes": 3, "expected_sizes": {}}
        recipe = load_recipe(f"mtil/{name}")
        if recipe.classes is not None:
            facts |= {
                "classes": classes,
                "class_names": {k: v for k, v in recipe.class_names.items() if v in classes},
            }
        paths[f"mtil/{name}"] = folder / f"{name}.yaml"
        paths[f"mtil/{name}"].write_text(json.dumps(facts))  # JSON is YAML
    return paths


@pytest.fixture(scope="session")
def imagenet(mtil) -> Path:
    """The shipped recipe of ZSCL's reference images for two classes alone; images and captions lie beside MTIL's sets."""
    for split, name, grey in itertools.product(("train", "val"), ("n01440764", "n01443537"), (40, 200)):
        mtil._jpeg(f"imagenet/{split}/{name}/{name}_{grey}.JPEG", grey)
    mtil._text("conceptual-captions/validation.txt", ["a boat on the water", "two people in a street"])
    path = mtil.root / "recipes" / "imagenet.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"extends": "mtil/imagenet", "num_classes": 2, "expected_sizes": {}}))
    return path


#: What a record of a test asks in addition, or instead, by task.
ASKED = {
    "coin/grounding": {"answer_bbox": "[0.10, 0.2, 0.6, 0.71]", "size": [16, 16]},
    "coin/scienceqa": {"answer": "A"},
    "coin/gqa": {"answer": "yes"},
    "mllm_acl/ocr": {"answer_type": "Regular Text Recognition"},
}


def write_conversations(root: Path, task: str, count: int = 3) -> None:
    """A few records of each split where a recipe of LLaVA's JSON says that they lie."""
    recipe = load_recipe(task)
    top, source = root / recipe.source["path"], recipe.source
    for side, split in recipe.splits.items():
        within = source.get("images", ".")
        images = top / (within[side] if isinstance(within, dict) else within) / "images"
        images.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (16, 16), (60 * i, 90, 30)).save(images / f"AI2D_{side}{i}.png")
        shown = [f"images/AI2D_{side}{i}.png" for i in range(count)]
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Yes"}]
        asked = {"text": "What?", "answer": "Yes"} | ASKED.get(task, {})
        file = top / split
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = {
            "train": [
                {"id": str(i), "image": image, "conversations": turns} for i, image in enumerate(shown)
            ],
            "test": [{"question_id": i, "image": image} | asked for i, image in enumerate(shown)],
        }
        file.write_text(json.dumps(rows[side]))
        if side in source.get("references", {}):
            numbered = [{"id": i + 1, "file_name": Path(image).name} for i, image in enumerate(shown)]
            notes = [{"id": i, "image_id": i + 1, "caption": f"a picture of {i}"} for i in range(count)]
            ten = [{"question_id": i, "answers": ["Yes"] * 10} for i in range(count)]
            answers = {"data": ten} if task == "coin/textvqa" else {"images": numbered, "annotations": notes}
            (top / source["references"][side]).parent.mkdir(parents=True, exist_ok=True)
            (top / source["references"][side]).write_text(json.dumps(answers))


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """UCIT, MLLM-DCL, CoIN and MLLM-ACL in their official layouts, three records per split."""
    root = tmp_path_factory.mktemp("conversations")
    for sequence in ("ucit", "mllm-dcl", "coin", "mllm-acl"):
        for task in load_sequence(sequence).tasks:
            write_conversations(root, task)
    return root


@pytest.fixture(scope="session")
def whole_mtil(tmp_path_factory) -> MtilTree:
    """Every class of every set."""
    return MtilTree(tmp_path_factory.mktemp("whole-mtil"), mtil_classes())


def write_random_clip(folder: Path, length: int, **width: int) -> Path:
    """A random CLIP with the embedded one's tokenizer and images.

    Args:
        folder: where.
        length: tokens that it takes.
        width: of both encoders' configurations, where that isn't the embedded one's.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    from llava_keeplora_eval.models import resolve_model

    source = resolve_model("tiny-clip")
    config, processor = CLIPConfig.from_pretrained(source), CLIPProcessor.from_pretrained(source)
    for encoder in (config.text_config, config.vision_config):
        encoder.update(width)
    config.text_config.max_position_embeddings = processor.tokenizer.model_max_length = length
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory) -> Path:
    """Of the embedded CLIP's size, taking 77 tokens as the real ones do."""
    return write_random_clip(tmp_path_factory.mktemp("long-clip"), 77)


@pytest.fixture(scope="session")
def narrow_clip(tmp_path_factory) -> Path:
    """A few thousand weights, for many rows in a moment."""
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return write_random_clip(tmp_path_factory.mktemp("narrow-clip"), 77, **width)


@pytest.fixture
def reproduce(tmp_path, monkeypatch, capfd):
    """Function (configuration, *arguments) → (exit code, stdout, stderr, run folder) of `llava-keeplora reproduce` on a CPU, one epoch."""
    from llava_keeplora import cli
    from llava_keeplora.sequence import runner

    monkeypatch.setattr(runner, "write_run_report", lambda root: None)
    # The Trainer collects garbage after every task; without the libraries' own objects that is ten times quicker.
    gc.freeze()
    small = [
        "training.num_train_epochs=1",
        "training.per_device_train_batch_size=8",
        "training.gradient_accumulation_steps=1",
        "training.use_cpu=true",
    ]

    def run(name: str, *arguments: object) -> SimpleNamespace:
        code = cli.main(
            ["reproduce", str(name), "--output-dir", str(tmp_path / name), *small, *map(str, arguments)]
        )
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, folder=tmp_path / name)

    run.small = small
    return run
