"""POPE, MME, MMBench and SEED-Bench in their official layouts and in the Hub's: checked, read and scored."""

import base64
import json
import re
from pathlib import Path

import datasets
import pytest
import yaml

from llava_keeplora_eval.data_check import check
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.scoring import score
from llava_keeplora_recipes import load_recipe, load_split
from llava_keeplora_recipes.errors import RecipeError

PAGE = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()
HUB = dict(
    re.findall(r"# (\S+)-hub\.yaml\n(.*?)(?:---|```)", PAGE.split("## General ability")[1], flags=re.S)
)
LETTER = "\nAnswer with the option's letter from the given choices directly."


def answered(tmp_path, data, texts):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in zip(data.ids, texts)))
    return score(data, path)


def checked(name, root):
    """The report of `data check`, without its warning on the published size."""
    return [line for line in check(str(name), root) if "not comparable" not in line]


@pytest.fixture
def save(tmp_path, make):
    def image(path, seed=0):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make.encoded(seed))

    return image


@pytest.mark.parametrize("category", ["random", "popular", "adversarial"])
def test_popes_files_are_read_checked_and_scored(tmp_path, save, category):
    rows = [
        {"question_id": i, "image": f"COCO_{i // 2}.png", "text": f"Is there a {w} in the image?", "label": a}
        for i, (w, a) in enumerate([("dog", "yes"), ("cat", "no"), ("car", "yes"), ("cup", "no")])
    ]
    for i in range(2):
        save(f"POPE/val2014/COCO_{i}.png", i)
    (tmp_path / f"POPE/coco_pope_{category}.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert not any("error" in line for line in checked(f"pope/{category}", tmp_path))
    data = load_split(load_recipe(f"pope/{category}"), "test", tmp_path)
    assert data.ids == ["0", "1", "2", "3"] and data.answers == [["yes"], ["no"], ["yes"], ["no"]]
    assert (
        data[1].question == "Is there a cat in the image?\nAnswer the question using a single word or phrase."
    )
    result = answered(tmp_path, data, ["Yes", "Yes.", "There is no car.", "No, not here"])
    assert result.score == 50 and result.correct == 2 and result.units is None
    assert result.details == {"precision": 50, "recall": 50, "f1": 50, "yes_ratio": 50}


def test_mmes_folders_are_read_in_both_forms_checked_and_scored(tmp_path, save):
    top = tmp_path / "MME/MME_Benchmark_release_version"
    save(top / "OCR/0001.jpg")
    save(top / "scene/images/a.png", 1)
    (top / "scene/questions_answers_YN").mkdir()
    text = "Is it {}? Please answer yes or no.\tYes\nIs it {}? Please answer yes or no.\tNo\n\n"
    (top / "OCR/0001.txt").write_text(text.format("x", "y"))
    (top / "scene/questions_answers_YN/a.txt").write_text(text.format("p", "q"))
    assert not any("error" in line for line in checked("mme", tmp_path))
    data = load_split(load_recipe("mme"), "test", tmp_path)
    assert data.ids == ["OCR/0001.jpg#1", "OCR/0001.jpg#2", "scene/a.png#1", "scene/a.png#2"]
    assert data[0].question == "Is it x? Please answer yes or no."
    result = answered(tmp_path, data, ["yes", "No, it is", "yes", "yes"])
    # OCR: acc 1, acc+ 1. scene: acc 1/2, acc+ 0. So (200 + 50) of 400.
    assert result.score == 62.5 and (result.n, result.units) == (4, 2)
    assert result.details["scene acc"] == 50 and result.details["scene acc_plus"] == 0
    assert result.details["perception"] is None


def test_an_mme_file_without_its_image_or_second_question_is_an_error_of_the_check(tmp_path, save):
    top = tmp_path / "MME/MME_Benchmark_release_version"
    save(top / "OCR/1.jpg")
    (top / "OCR/1.txt").write_text("Is it?\tYes\n")
    (top / "OCR/2.txt").write_text("Is it?\tYes\nIsn't it?\tNo\n")
    lines = []
    with pytest.raises(EvalError, match="mme has"):
        lines += check("mme", tmp_path)
    with pytest.raises(RecipeError, match=r"OCR/1\.txt.*two lines"):
        load_split(load_recipe("mme"), "test", tmp_path)
    (top / "OCR/1.txt").unlink()
    with pytest.raises(RecipeError, match=r"OCR/2\.txt.*no image '2'"):
        load_split(load_recipe("mme"), "test", tmp_path)


HEADER = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category"]


def mmbench_rows(make, legacy):
    """Question 7 of two options and 9 of three, in all rotations; images by reference unless legacy."""
    first, second = (base64.b64encode(make.encoded(i)).decode() for i in range(2))
    return [
        [7, "Which?", "A\thint", "dogs", "cats", "", "", "B", "naming", first, "fine"],
        [9, "What?", "", "1", "2", "3", "", "A", "ocr", second, "fine"],
        [
            1_000_007,
            "Which?",
            "A\thint",
            "cats",
            "dogs",
            "",
            "",
            "A",
            "naming",
            first if legacy else 7,
            "fine",
        ],
        [1_000_009, "What?", "", "2", "3", "1", "", "C", "ocr", second if legacy else 9, "fine"],
        [2_000_009, "What?", "", "3", "1", "2", "", "B", "ocr", second if legacy else 9, "fine"],
    ]


@pytest.mark.parametrize("legacy", [True, False])
def test_mmbenchs_table_is_read_in_both_forms_checked_and_scored(tmp_path, make, legacy):
    path = tmp_path / "MMBench/MMBench_DEV_EN.tsv"
    path.parent.mkdir()
    rows = [HEADER, *mmbench_rows(make, legacy)]
    path.write_text(
        "".join("\t".join(f'"{c}"' if "\t" in str(c) else str(c) for c in row) + "\n" for row in rows)
    )
    assert not any("error" in line for line in checked("mmbench", tmp_path))
    data = load_split(load_recipe("mmbench"), "test", tmp_path)
    assert data.ids == ["7", "9", "1000007", "1000009", "2000009"]
    assert data[0].question == "A\thint\nWhich?\nA. dogs\nB. cats" + LETTER
    assert data[4].question == "What?\nA. 3\nB. 1\nC. 2" + LETTER
    assert len(set(data.digests)) == 2 and data[0].images[0].tobytes() == data[2].images[0].tobytes()
    result = answered(tmp_path, data, ["B", "A.", "It shows cats", "(C)", "I can't tell"])
    assert (result.score, result.n, result.units) == (50, 5, 2)
    assert result.details == {
        "single_pass": 80, "needs_judge": 20, "l2_category fine": 50, "category naming": 100, "category ocr": 0,
    }  # fmt: skip


def test_mmbenchs_hidden_answers_and_a_lost_image_are_refused(tmp_path, make):
    path = tmp_path / "MMBench/MMBench_DEV_EN.tsv"
    path.parent.mkdir()
    row = mmbench_rows(make, False)[2]
    path.write_text("\t".join(HEADER) + "\n" + "\t".join(map(str, row)).replace("A\thint", "") + "\n")
    with pytest.raises(RecipeError, match="row 1 .*neither in base64 nor the id"):
        load_split(load_recipe("mmbench"), "test", tmp_path)
    path.write_text(
        "index\tquestion\tA\tB\tC\tD\timage\n7\tWhich?\tx\ty\t\t\t" + str(mmbench_rows(make, True)[0][9])
    )
    with pytest.raises(RecipeError, match="no column 'answer'"):
        load_split(load_recipe("mmbench"), "test", tmp_path)


def seed_rows():
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    return [
        {"question_id": f"{i}", "question": f"How many {i}?", "data_id": "145_2", "data_type": "image",
         "question_type_id": kind, "answer": "ABCD"[i], **choices}
        for i, kind in enumerate((5, 5, 1))
    ] + [{"question_id": "v1", "question": "What?", "data_id": "1.webm", "data_type": "video",
          "question_type_id": 10, "answer": "B", "segment": [1, 2.5], **choices}]  # fmt: skip


def test_seed_benchs_json_is_read_checked_and_scored_without_its_videos(tmp_path, save):
    save("SEED-Bench/SEED-Bench-image/145_2")
    content = {"questions": seed_rows(), "question_type": {"Instances Counting": 5}}
    (tmp_path / "SEED-Bench/SEED-Bench.json").write_text(json.dumps(content))
    assert not any("error" in line for line in checked("seed-bench", tmp_path))
    data = load_split(load_recipe("seed-bench"), "test", tmp_path)
    assert data.ids == ["0", "1", "2"]
    assert data[0].question == "How many 0?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER
    result = answered(tmp_path, data, ["A", "B. Two", "C"])
    assert result.score == pytest.approx(200 / 3)
    assert result.details["dimension 5"] == 50 and result.details["dimension 1"] == 100


def hub_rows(make, name):
    image = {"bytes": make.encoded(0), "path": None}
    if name == "pope":
        row = {"question": "Is there a dog?", "category": "adversarial", "image": image, "image_source": "x"}
        return [{"id": str(i), "question_id": "1", **row, "answer": a} for i, a in enumerate(["yes", "no"])]
    if name == "mme":
        row = {"question_id": "OCR/1.jpg", "question": "Is it?", "category": "OCR", "image": image}
        return [{**row, "answer": "Yes"}, {**row, "answer": "No"}]
    if name == "mmbench":
        row = {"question": "Which?", "hint": "nan", "C": "nan", "D": "nan", "category": "x", "image": image}
        row |= {"L2-category": "y", "source": "s", "comment": "nan", "split": "dev"}
        return [{"index": 7, "A": "dogs", "B": "cats", "answer": "A", **row},
                {"index": 1_000_007, "A": "cats", "B": "dogs", "answer": "B", **row}]  # fmt: skip
    return [{**{k: v for k, v in row.items() if k != "segment"}, "image": [image]} for row in seed_rows()]


@pytest.mark.parametrize(("name", "texts", "expected"), [
    ("pope", ["Yes", "Yes"], 50),
    ("mme", ["Yes", "no"], 100),
    ("mmbench", ["dogs", "dogs"], 100),
    ("seed-bench", ["A", "B", "D"], 200 / 3),
])  # fmt: skip
def test_the_recipes_for_the_hub_read_tables_of_its_columns(
    tmp_path, make, monkeypatch, name, texts, expected
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    facts = yaml.safe_load(HUB[name])
    source = {k: v for k, v in facts["source"].items() if k not in ("config", "path")}
    table = datasets.Dataset.from_list(hub_rows(make, name))
    feature = datasets.Image() if name != "seed-bench" else datasets.List(datasets.Image())
    (tmp_path / "copy").mkdir()
    table.cast_column("image", feature).to_parquet(tmp_path / "copy/test.parquet")
    path = tmp_path / f"{name}-hub.yaml"
    path.write_text(yaml.safe_dump(facts | {"source": source | {"format": "parquet", "path": "copy"},
                                            "splits": {"test": "test.parquet"}}))  # fmt: skip
    assert load_recipe(path).source["format"] == "parquet"
    assert not any("error" in line for line in checked(path, None))
    result = answered(tmp_path, load_split(load_recipe(path), "test"), texts)
    assert result.score == pytest.approx(expected)


def test_each_hub_recipe_of_the_page_is_valid(tmp_path):
    assert set(HUB) == {"pope", "mme", "mmbench", "seed-bench"}
    for name, text in HUB.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        assert load_recipe(path).source["path"].startswith("lmms-lab/")
