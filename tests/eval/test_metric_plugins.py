"""A metric from a user's own file, module or package: found, scored, recorded, and refused in a sentence."""

import hashlib
import json
import re

import pytest

from llava_keeplora_eval import EvalError, load_metric
from llava_keeplora_eval.cli import main
from llava_keeplora_eval.metrics import METRICS, AnswerMetric, metric_record, metric_source
from llava_keeplora_recipes import load_recipe

FUNCTION = '''
def starts_with(text, answers):
    """The prediction starts with an accepted text."""
    return any(text.startswith(answer) for answer in answers)
'''
RECORDS = """
from llava_keeplora_eval.metrics import AnswerMetric, CorpusMetric


def share(predictions, references):
    right = sum(text in answers for text, answers in zip(predictions, references))
    return right / len(predictions), {"right": right / len(predictions), "note": "of all"}


def broken(text, answers):
    raise KeyError("no such thing")


whole = CorpusMetric("whole", 3, share, "how many are right")
length = AnswerMetric("length", 2, lambda text, answers: len(text), "the length", needs=("a_package_of_nobody",))
points = AnswerMetric("points", 1, lambda text, answers: 100 * (text in answers), "points of 100")
fails = AnswerMetric("fails", 1, broken, "nothing")
number = 3
"""
RECIPE = """
name: shapes
version: 1
kind: vqa
metric: {metric}
licence: CC0-1.0
source: {{format: llava_json, path: .}}
splits: {{train: test.json, test: test.json}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with two files of metrics, a recipe and its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "starts.py").write_text(FUNCTION)
    (tmp_path / "own_metrics.py").write_text(RECORDS)
    rows = [
        {"id": str(i), "question_id": str(i), "text": "Which?", "answer": answer}
        for i, answer in enumerate(["circle", "square"])
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "shapes.yaml").write_text(RECIPE.format(metric="starts.py:starts_with"))
    (tmp_path / "answers.jsonl").write_text(
        '{"id": "0", "text": "circle, I think"}\n{"id": "1", "text": "a square"}\n'
    )
    return tmp_path


def scored(capsys, *words):
    code = main(["score", "--task", "shapes.yaml", "--predictions", "answers.jsonl", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_function_in_a_file_next_to_the_recipe_scores_and_its_hash_is_recorded(folder, capsys):
    code, out, err = scored(capsys, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["score"], result["metric"], result["metric_version"], result["lenient"]) == (
        50.0,
        "starts:starts_with",
        1,
        100.0,
    )
    content = hashlib.sha256((folder / "starts.py").read_bytes()).hexdigest()
    assert result["metric_source"] == hashlib.sha256(f"{content} starts.py\n".encode()).hexdigest()


@pytest.mark.parametrize(
    "name", ["own_metrics.py:whole", "own_metrics:whole", "{folder}/own_metrics.py:whole"]
)
def test_a_record_is_found_as_a_file_and_as_a_module_of_the_working_folder(folder, capsys, name):
    code, out, err = scored(capsys, "--metric", name.format(folder=folder), "--json")
    result = json.loads(out)
    assert (code, result["score"], result["metric"], result["metric_version"]) == (
        0,
        0.0,
        "own_metrics:whole",
        3,
    )
    assert result["details"] == {"right": 0.0, "note": "of all"}


def test_an_entry_point_of_an_installed_package_is_a_metric(folder, monkeypatch):
    import importlib.metadata

    (folder / "installed_metrics.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(str(folder))
    point = importlib.metadata.EntryPoint(
        "starts-with", "installed_metrics:starts_with", "llava_keeplora.metrics"
    )
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == point.group else []
    )
    assert metric_record("starts-with").function("circles", ["circle"])
    assert metric_source("starts-with") and "starts-with" not in list(METRICS)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("starts.py:end_with", "end_with|starts_with"),
        ("nowhere.py:metric", "no file .*nowhere.py"),
        ("a_module_of_nobody:metric", "'a_module_of_nobody' is not installed"),
        ("own_metrics.py:number", "neither an AnswerMetric or a CorpusMetric, nor a function"),
        (
            "own_metrics.py:length",
            "needs the package a_package_of_nobody, which is not installed; pip install",
        ),
        ("own_metrics.py:points", "'points' gave 100 for the prediction 'circle', and a score is .*0 to 1"),
        ("own_metrics.py:fails", "'fails' failed on the prediction .*KeyError"),
        ("exact_mach", "did you mean 'exact_match'"),
    ],
)
def test_what_is_wrong_with_a_metric_is_said_in_a_sentence(folder, capsys, name, sentence):
    code, out, err = scored(capsys, "--metric", name)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert re.search(sentence, err), err


def test_data_check_names_a_metric_that_is_not_there(folder, capsys):
    (folder / "starts.py").unlink()
    assert main(["data", "check", "shapes.yaml"]) == 2
    out = capsys.readouterr().out
    assert "error: the metric" in out and "is not installed" in out


def test_a_recipe_means_the_same_wherever_its_folder_lies(folder, tmp_path_factory):
    here, other = load_recipe("shapes.yaml"), tmp_path_factory.mktemp("other")
    for file in ("shapes.yaml", "starts.py"):
        (other / file).write_text((folder / file).read_text())
    there = load_recipe(other / "shapes.yaml")
    assert (
        here.metric == f"{folder / 'starts.py'}:starts_with"
        and there.metric == f"{other / 'starts.py'}:starts_with"
    )
    assert here.fingerprint == there.fingerprint and here.metric_name == "starts:starts_with"


def test_a_score_that_is_no_number_from_0_to_1_is_refused(folder):
    metric = AnswerMetric("far", 1, lambda text, answers: float("nan") if text == "x" else 7, "far")
    for text, shown in (("x", "nan"), ("y", "7")):
        with pytest.raises(EvalError, match=f"'far' gave {shown} for the prediction '{text}'.*from 0 to 1"):
            metric.compute([text], [["a"]])


def test_a_metric_from_a_file_is_an_evaluate_metric(folder):
    metric = load_metric("starts.py:starts_with")
    assert metric.compute(predictions=["circles"], references=[["circle"]])["starts_with"] == 1.0
    assert metric.description.startswith("The prediction starts with")
    assert not (folder / "starts.py:starts_with").exists()
