"""The recipes of published benchmarks read their official layouts, on tiny files of the same shape."""

from pathlib import Path

import pytest

from llava_keeplora_recipes import list_recipes, load_recipe, load_sequence, load_split

COIN = "CoIN/playground/Instructions_Original"

#: task: (train file, test file, image folder of train, image folder of test), all under the data root
LAYOUT = {
    f"ucit/{name}": (
        f"UCIT/instructions/{folder}/{train}",
        f"UCIT/instructions/{folder}/test_3000.json",
        *["UCIT/datasets"] * 2,
    )
    for name, folder, train in (
        ("imagenet-r", "ImageNet-R", "train.json"),
        ("arxivqa", "ArxivQA", "train_4w.json"),
        ("vizwiz", "VizWiz", "train.json"),
        ("iconqa", "IconQA", "train.json"),
        ("clevr-math", "CLEVR", "train_4w.json"),
        ("flickr30k", "Flickr30k", "train_brief_4w.json"),
    )
}
LAYOUT |= {
    f"mllm_dcl/{d.lower()}": (f"MLLM-CL/{d}/train.json", f"MLLM-CL/{d}/test.json", *[f"MLLM-CL/{d}"] * 2)
    for d in ("RS", "Med", "AD", "Sci", "Fin")
}
LAYOUT |= {
    f"mllm_acl/{name}": (
        f"MLLM-CL/{train}/train.json",
        f"MLLM-CL/{test}/test.json",
        f"MLLM-CL/{train}",
        f"MLLM-CL/{test}",
    )
    for name, train, test in (("ocr", "OCR", "OCR_test"), ("vp", "VP", "CV-Benchv2"))
}
LAYOUT |= {
    f"coin/{folder.lower()}": (
        f"{COIN}/{folder}/train.json",
        f"{COIN}/{folder}/{test}.json",
        *["CoIN/cl_dataset"] * 2,
    )
    for folder, test in (
        ("ScienceQA", "test"),
        ("TextVQA", "val"),
        ("ImageNet", "test"),
        ("GQA", "test"),
        ("VizWiz", "val"),
        ("Grounding", "test"),
        ("VQAv2", "val"),
        ("OCRVQA", "test"),
    )
}
CAPTIONS = {
    f"ucit/{n}": f"UCIT/instructions/{f}/val_coco_type_3000.json"
    for n, f in (("vizwiz", "VizWiz"), ("flickr30k", "Flickr30k"))
}
TEXTVQA = "CoIN/cl_dataset/TextVQA/TextVQA_0.5.1_val.json"

#: What a test record of the task says besides `question_id`, `image` and `text`.
MORE = {
    "coin/grounding": {"answer_bbox": "[0.1, 0.2, 0.3, 0.4]", "size": [8, 8]},
    "mllm_acl/ocr": {"answer": ["A", "B"], "answer_type": "Digit String Recognition"},
    "mllm_acl/vp": {"answer": "(A)", "type": "2D", "task": "Count"},
    "coin/textvqa": {},
} | dict.fromkeys(CAPTIONS, {})
ANSWERS = {
    "coin/grounding": [["[0.1, 0.2, 0.3, 0.4]"]] * 3,
    "mllm_acl/ocr": [["A", "B"]] * 3,
    "mllm_acl/vp": [["(A)"]] * 3,
    "coin/textvqa": [[f"a{i}"] * 10 for i in range(3)],
} | dict.fromkeys(CAPTIONS, [[f"first of {i}", f"second of {i}"] for i in range(3)])


@pytest.fixture
def tree(tmp_path, make):
    """Write a task's files: three records per split, the ids of train all the same, the first without an image."""

    def write(task: str) -> Path:
        train, test, *folders = LAYOUT[task]
        for side, folder in zip(("train", "test"), folders, strict=True):
            for i in range(3):
                path = tmp_path / folder / "images" / f"AI2D_{side}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(make.encoded(i, side=8))
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}]
        rows = [{"id": "0", "image": f"./images/AI2D_train{i}.png", "conversations": turns} for i in range(2)]
        words_only = [{"from": "human", "value": "What?"}, turns[1]]
        make.json(tmp_path / train, [{"id": "0", "conversations": words_only}, *rows])
        asked = {"text": "What?"} | MORE.get(task, {"answer": "that"})
        make.json(
            tmp_path / test,
            [{"question_id": f"q{9 - i}", "image": f"images/AI2D_test{i}.png"} | asked for i in range(3)],
        )
        if task in CAPTIONS:
            images = [{"id": i + 1, "file_name": f"AI2D_test{i}.png"} for i in range(3)]
            notes = [
                {"id": 0, "image_id": i + 1, "caption": f"{n} of {i}"}
                for n in ("first", "second")
                for i in (2, 0, 1)
            ]
            make.json(tmp_path / CAPTIONS[task], {"images": images, "annotations": notes})
        make.json(
            tmp_path / TEXTVQA,
            {"data": [{"question_id": f"q{9 - i}", "answers": [f"a{i}"] * 10} for i in (1, 2, 0)]},
        )
        return tmp_path

    return write


def test_every_task_of_the_benchmarks_has_a_recipe():
    others = ("mtil/", "cl_vista/", "pope/")
    assert set(LAYOUT) == {n for n in list_recipes() if "/" in n and not n.startswith(others)}


@pytest.mark.parametrize("task", LAYOUT)
def test_a_task_loads_from_its_official_layout(task, tree):
    root, recipe = tree(task), load_recipe(task)
    train, test = load_split(recipe, "train", root), load_split(recipe, "test", root)
    assert train.ids == ["train-0", "train-1", "train-2"]
    assert (
        train.questions == ["What?"] * 3
        and train.answers == [["that"]] * 3
        and train.image_counts == [0, 1, 1]
    )
    assert test.ids == ([f"test-{i}" for i in range(3)] if task == "coin/imagenet" else ["q9", "q8", "q7"])
    assert test.answers == ANSWERS.get(task, [["that"]] * 3) and test.image_counts == [1] * 3
    assert test[0].image.size == (8, 8)


@pytest.mark.parametrize("task", LAYOUT)
def test_a_test_question_is_asked_as_its_official_runner_asks(task, tree):
    suffix = {
        "mllm_dcl/med": " Answer the question with a single word (or phrase).",
        "mllm_dcl/fin": " Answer with the given letter directly, e.g., A, B, C, D.",
    }.get(task, "")
    assert load_split(load_recipe(task), "test", tree(task)).questions == [f"What?{suffix}"] * 3


@pytest.mark.parametrize("answer", ["Yes", "No"])
def test_finance_asks_for_yes_or_no_where_that_is_the_answer(tree, monkeypatch, answer):
    monkeypatch.setitem(MORE, "mllm_dcl/fin", {"answer": answer})
    questions = load_split(load_recipe("mllm_dcl/fin"), "test", tree("mllm_dcl/fin")).questions
    assert questions == ["What? Only answer with yes or no directly."] * 3


def test_what_a_metric_needs_of_an_example_comes_with_it(tree):
    science = load_split(load_recipe("mllm_dcl/sci"), "test", tree("mllm_dcl/sci"))
    assert science.meta[1] == {"image": "images/AI2D_test1.png"}
    ocr = load_split(load_recipe("mllm_acl/ocr"), "test", tree("mllm_acl/ocr"))
    assert ocr.meta[1] == {"answer_type": "Digit String Recognition"}


@pytest.mark.parametrize("task", [t for t in LAYOUT if t.startswith("ucit/")])
def test_ucit_has_the_published_sizes(task):
    published = {"imagenet-r": 23998, "iconqa": 29859}.get(task.split("/")[1], 40000)
    assert load_recipe(task).expected_sizes == {"train": published, "test": 3000}


def test_another_layout_needs_only_a_recipe_that_extends(tree, make):
    """MCITlib keeps the questions and the images of a task side by side."""
    root = tree("ucit/vizwiz")
    (root / "UCIT" / "instructions" / "VizWiz").rename(root / "UCIT" / "VizWiz-caption")
    source = {"format": "llava_json", "path": "UCIT", "images": "datasets", "positional_ids": ["train"]}
    source["references"] = {"test": "VizWiz-caption/val_coco_type_3000.json"}
    splits = {"train": "VizWiz-caption/train.json", "test": "VizWiz-caption/test_3000.json"}
    mine = load_recipe(make.yaml(root / "mine.yaml", extends="ucit/vizwiz", source=source, splits=splits))
    assert load_split(mine, "test").answers == ANSWERS["ucit/vizwiz"] and mine.metric == "ucit_caption_mean"


@pytest.mark.parametrize(
    ("name", "tasks", "epochs"),
    [
        ("ucit", "imagenet-r arxivqa vizwiz iconqa clevr-math flickr30k", [1] * 6),
        ("mllm-dcl", "rs med ad sci fin", [1, 3, 1, 2, 1]),
        ("mllm-acl", "ocr vp", [3, 1]),
        ("coin", "scienceqa textvqa imagenet gqa vizwiz grounding vqav2 ocrvqa", [1] * 8),
        ("cl-vista", "counting traffic movie gui science sports star", [1] * 7),
    ],
)
def test_the_orders_and_epochs_are_the_published_ones(name, tasks, epochs):
    sequence = load_sequence(name)
    assert (
        sequence.tasks == [f"{name.replace('-', '_')}/{t}" for t in tasks.split()]
        and sequence.epochs == epochs
    )


def test_the_abilities_that_nothing_here_can_score_are_named_with_the_reason():
    assert list(load_sequence("mllm-acl").not_scored) == ["Math", "APP"]
    assert list(load_sequence("cl-vista").not_scored) == ["Space"]
    assert not load_sequence("ucit").not_scored
