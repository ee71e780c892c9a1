"""Scoring: every example in the denominator, nothing scored that is not what it says."""

import json

import pytest

from llava_keeplora_eval import EvalError, load_metric, predict_to_file, score
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
    }
    assert str(result) == "pets v1 (test): accuracy v1 100.00 % (10/10, 1 dropped)"
    json.dumps(result.to_dict())


def test_empty_and_wrong_texts_stay_in_the_denominator(tmp_path, data):
    texts = ["cat", "", " ", "dog", "dog", "red bird", "cat", "DOG", "red", "cat\n"]
    path = tmp_path / "predictions.jsonl"
    predict_to_file(Answers(texts), data, path)
    result = score(data, path)
    # right: 0 cat, 4 dog, 5 red bird, 6 cat, 9 cat; the rule is letter by letter, so DOG is wrong.
    assert (result.correct, result.n, result.score) == (5, 10, 50.0)


def test_an_empty_text_is_wrong_even_where_it_is_accepted():
    metric = load_metric("accuracy")
    result = metric.compute(predictions=["", "a", "b"], references=[[""], ["x", "a"], []])
    assert result == {"accuracy": pytest.approx(1 / 3), "correct": 1}


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
def test_every_listed_metric_loads_and_names_its_result_after_itself(name):
    assert name in load_metric(name).compute(predictions=["a"], references=[["a"]])


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
    assert str(error.value) == "there is no metric 'acuracy'; did you mean 'accuracy'."
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(EvalError) as error:
        score(fake_data(count=0), tmp_path / "empty.jsonl")
    assert str(error.value) == "pets (test) has no examples to score; check the split and the data."
