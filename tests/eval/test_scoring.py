"""Scoring: every example in the denominator, nothing scored that is not what it says."""

import json
from types import SimpleNamespace

import pytest

from llava_keeplora_eval import EvalError, caption_scores, load_metric, metrics, predict_to_file, score
from llava_keeplora_eval.metrics import METRICS


class Answers:
    """Gives the texts it was made with, in order."""

    def __init__(self, texts):
        self.texts = iter(texts)

    def predict(self, examples):
        return [next(self.texts) for _ in examples]


def test_the_score_carries_what_is_needed_to_know_what_it_means(tmp_path, data, recorder):
    path = tmp_path / "predictions.jsonl"
    predict_to_file(recorder(), data, path)
    data.dropped = ["pet-99"]
    result = score(data, path)
    assert result.to_dict() == {
        "task": "pets",
        "version": 1,
        "fingerprint": "f00d",
        "split": "test",
        "metric": "accuracy",
        "metric_version": 1,
        "score": 100.0,
        "n": 10,
        "dropped": 1,
        "correct": 10,
        "lenient": 100.0,
        "compliance": 100.0,
        "details": None,
        "unmeetable": 0,
        "errors": {},
        "confusions": [],
    }
    assert str(result) == (
        "pets v1 (test): accuracy v1 100.00 %, lenient 100.00 %, compliance 100.00 % (10/10, 1 dropped)"
    )
    json.dumps(result.to_dict())


def test_empty_and_wrong_texts_stay_in_the_denominator(tmp_path, data):
    texts = ["cat", "", " ", "dog", "dog", "red bird", "cat", "DOG", "red", "cat\n"]
    path = tmp_path / "predictions.jsonl"
    predict_to_file(Answers(texts), data, path)
    result = score(data, path)
    # right: 0 cat, 4 dog, 5 red bird, 6 cat, 9 cat; the rule is letter by letter, so DOG is wrong.
    assert (result.correct, result.n, result.score) == (5, 10, 50.0)
    # DOG counts for a lenient reader; "", " " and "red" are no class.
    assert (result.lenient, result.compliance) == (60.0, 70.0)
    assert sum(result.errors.values()) == result.n - result.correct and result.errors["empty"] == 2
    assert result.errors_line.startswith("errors: 2 empty, ")
    assert sum(count for _, _, count in result.confusions) == 3


def test_an_empty_text_is_wrong_even_where_it_is_accepted():
    metric = load_metric("accuracy")
    result = metric.compute(predictions=["", "a", "b"], references=[[""], ["x", "a"], []])
    assert (result["accuracy"], result["lenient"], result["correct"]) == (
        pytest.approx(1 / 3),
        pytest.approx(1 / 3),
        1,
    )


def test_scoring_twice_gives_the_same_number_and_needs_no_network(tmp_path, data, recorder, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("scoring must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    path = tmp_path / "predictions.jsonl"
    predict_to_file(recorder(), data, path)
    assert score(data, path) == score(data, path)


def test_two_metrics_at_once_share_nothing():
    first, second = load_metric("accuracy"), load_metric("accuracy")
    first.add_batch(predictions=["a"], references=[["a"]])
    second.add_batch(predictions=["a", "b"], references=[["b"], ["c"]])
    assert first.experiment_id != second.experiment_id
    assert first.compute()["accuracy"] == 1
    assert second.compute()["accuracy"] == 0


@pytest.mark.parametrize("name", METRICS)
def test_a_record_says_what_its_evaluate_metric_does(name):
    metric, record = load_metric(name), METRICS[name]
    assert metric.record is record and record.name == name and record.version >= 1
    assert (metric.description, metric.citation) == (record.description, record.citation)
    assert record.summary and set(metric.features) == {"predictions", "references"}


def test_evaluate_loads_any_metric_by_the_path_of_one_file(monkeypatch):
    import socket

    import evaluate

    def refuse(*_):
        raise AssertionError("loading must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    metric = evaluate.load(f"{metrics.__path__[0]}/evaluate_metric.py", "exact_match", keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    given = {"predictions": ["Dog", "cat"], "references": [["dog"], ["bird"]]}
    assert metric.compute(**given) == METRICS["exact_match"].compute(**given)


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("exact_match", {"predictions": [], "references": []}, "no predictions to score"),
        ("caption_cider", {"predictions": [], "references": []}, "no predictions to score"),
        ("exact_match", {"predictions": ["a"], "references": []}, "1 predictions and 0 references"),
        ("dcl_sci", {"predictions": ["a"], "references": [["a"]], "images": ["x"]}, "needs the questions"),
        ("exact_match", {"predictions": ["a"], "references": [["a"]], "images": ["x"]}, "takes no images"),
    ],
)
def test_what_does_not_belong_together_is_refused(name, given, sentence):
    with pytest.raises(EvalError, match=sentence):
        METRICS[name].compute(**given)


class Questions:
    """Three questions with answers, a column of meta, and no image that anybody may read."""

    def __init__(self, metric, answers, kind="vqa", meta=None):
        self.recipe = SimpleNamespace(name="asks", version=1, kind=kind, metric=metric)
        self.split, self.fingerprint, self.dropped = "test", "f00d", []
        self.ids, self.answers = ["a", "b", "c"], answers
        self.questions = ["Which states?", "What is it?", "What is it?"]
        self.meta = meta or [{}] * 3

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return SimpleNamespace(id=self.ids[index])


def score_texts(tmp_path, data, texts):
    path = tmp_path / "predictions.jsonl"
    predict_to_file(Answers(texts), data, path)
    return score(data, path)


def test_soft_scores_are_counted_by_nobody(tmp_path):
    data = Questions("vqa_accuracy", [["yes"] * 8 + ["no"] * 2, ["two"], ["a dog"]])
    result = score_texts(tmp_path, data, ["no", "2", "It is a dog."])
    # 0.6, 1 and 0; a lenient reader finds the dog, whose sentence is not the asked form
    assert result.score == pytest.approx(100 * 1.6 / 3) and result.lenient == pytest.approx(100 * 2.6 / 3)
    assert result.compliance == pytest.approx(200 / 3) and result.correct is None
    assert str(result) == "asks v1 (test): vqa_accuracy v2 53.33 %, lenient 86.67 %, compliance 66.67 % (n=3)"


def test_a_metric_gets_the_question_and_the_meta_that_it_asks_for(tmp_path):
    answers = [["ohio,utah"], ["leaf"], ["leaf"]]
    images = [{"image": "map_1.png"}, {"image": "AI2D_1.png"}, {"image": "map_2.png"}]
    result = score_texts(tmp_path, Questions("dcl_sci", answers, meta=images), ["ohio", "a leaf", "a leaf"])
    assert result.score == pytest.approx(100 * 1.5 / 3)


@pytest.mark.parametrize("meta", [None, [{"image": "map_1.png"}, {}, {"answer": "x"}]])
def test_a_metric_without_what_it_asks_for_is_refused(tmp_path, meta):
    lacking = "3 ids (a, b, c)" if meta is None else "2 ids (b, c)"
    with pytest.raises(EvalError) as error:
        score_texts(tmp_path, Questions("dcl_sci", [["x"]] * 3, meta=meta), ["x"] * 3)
    assert str(error.value) == (
        f"the metric 'dcl_sci' needs the image of every example, and {lacking} of asks (test) have none; "
        "list the field under 'meta' in the recipe's source, or choose another metric."
    )


def test_captions_have_details_in_percent_and_no_lenient_score(tmp_path, monkeypatch):
    numbers = {f"bleu_{n}": 0.1 * n for n in range(1, 5)} | {"rouge_l": 0.25, "cider": 1.5}
    monkeypatch.setattr(caption_scores, "_by_pycocoevalcap", lambda captions, references: numbers)
    monkeypatch.setattr(caption_scores, "require", lambda with_meteor=False: None)
    monkeypatch.setattr(caption_scores.java, "find_jar", lambda pattern: None)
    data = Questions("caption_cider", [["a dog", "one dog"], ["a cat"], ["a bird"]], kind="captioning")
    result = score_texts(tmp_path, data, ["a dog", "", "a bird"])
    assert (result.score, result.lenient, result.compliance, result.correct) == (150.0, None, None, None)
    assert result.details == {
        **{f"bleu_{n}": pytest.approx(10 * n) for n in range(1, 5)},
        "rouge_l": 25.0,
        "cider": 150.0,
        "tokenizer": "python",
    }
    assert str(result).endswith("(n=3, bleu_1 10.00, bleu_2 20.00, bleu_3 30.00, bleu_4 40.00, rouge_l 25.00, "
                                "cider 150.00, tokenizer python)")  # fmt: skip
    json.dumps(result.to_dict())


def test_missing_ids_are_refused_with_their_count_and_the_first_ones(tmp_path, data, recorder):
    path = tmp_path / "predictions.jsonl"
    predict_to_file(recorder(), data, path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(EvalError) as error:
        score(data, path)
    assert str(error.value) == (
        f"{path} lacks 5 ids (pet-5, pet-6, pet-7, ...) of the 10 of pets (test); "
        "run the same `predict` command again to fill them in."
    )


def test_duplicate_ids_are_refused(tmp_path, data, recorder):
    path = tmp_path / "predictions.jsonl"
    predict_to_file(recorder(), data, path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines + lines[:2]))
    with pytest.raises(EvalError, match=r"more than one prediction for 2 ids \(pet-0, pet-1\)"):
        score(data, path)


def test_a_missing_file_an_unknown_metric_and_no_examples_are_refused(tmp_path, fake_data, fake_recipe):
    with pytest.raises(EvalError) as error:
        score(fake_data(), tmp_path / "none.jsonl")
    assert str(error.value) == (
        f"there is no predictions file {tmp_path / 'none.jsonl'}; run `llava-keeplora-eval predict` first."
    )
    with pytest.raises(EvalError) as error:
        score(fake_data(recipe=fake_recipe(metric="acuracy")), tmp_path / "none.jsonl")
    assert str(error.value).startswith("there is no metric 'acuracy'; did you mean 'accuracy'")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(EvalError) as error:
        score(fake_data(count=0), tmp_path / "empty.jsonl")
    assert str(error.value) == "pets (test) has no examples to score; check the split and the data."
