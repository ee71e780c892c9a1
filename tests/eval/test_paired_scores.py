"""Changes of scores between two models' answers, from the metrics' own rules."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from llava_keeplora_eval import EvalError, paired_scores
from llava_keeplora_eval.metrics import AnswerMetric, CorpusMetric, Grouping, metric_record
from llava_keeplora_eval.paired_scores import check_comparable, flips, paired_change, score_change


@dataclass
class Questions:
    """Forty questions with two accepted answers each, as a task's data."""

    recipe = SimpleNamespace(name="colours", kind="vqa", metric="exact_match", classes=None)
    split = "test"
    ids = [f"q{i}" for i in range(40)]
    questions = [f"colour of {i}?" for i in range(40)]
    answers = [["red", "crimson"] if i % 2 else ["blue"] for i in range(40)]

    def __len__(self) -> int:
        return 40


RIGHT = {f"q{i}": "Red" if i % 2 else "blue" for i in range(40)}


def test_the_change_is_that_of_the_metrics_scores():
    after = RIGHT | {"q1": "crimson", "q2": "green", "q4": "", "q5": "pink"}
    change = paired_change(Questions(), RIGHT, after, 0.95)
    assert (change.before, change.after, change.n) == (100, 92.5, 40)
    assert (change.better, change.worse) == (0, 3)
    assert score_change(Questions(), RIGHT, after) == change.points == -7.5


def test_flipped_examples_have_question_and_both_answers():
    after = RIGHT | {"q2": "green", "q5": "pink"}
    assert [(f.id, f.question, f.expected, f.before, f.after) for f in flips(Questions(), RIGHT, after)] == [
        ("q2", "colour of 2?", ["blue"], "blue", "green"),
        ("q5", "colour of 5?", ["red", "crimson"], "Red", "pink"),
    ]
    assert [f.id for f in flips(Questions(), RIGHT, after, most=1)] == ["q2"]


def test_example_scores_average_to_the_score_of_every_metric_of_answers():
    record = metric_record("exact_match")
    texts, answers = ["a", "b", "", "C"], [["a"], ["a"], ["a"], ["c", "d"]]
    assert record.example_scores(texts, answers) == [100, 0, 0, 100]
    assert record.compute(texts, answers)["exact_match"] == 0.5


def test_the_unit_of_a_grouped_metric_is_the_group(monkeypatch):
    metric = AnswerMetric(
        "pairs", 1, lambda text, answers: text in answers, "pairs", grouping=Grouping(("page",))
    )
    monkeypatch.setattr(paired_scores, "metric_of", lambda recipe: metric)
    monkeypatch.setattr(paired_scores, "metric_inputs", lambda *_: {"pages": [i // 2 for i in range(40)]})
    right = {f"q{i}": Questions.answers[i][0] for i in range(40)}
    change = paired_change(Questions(), right, right | {"q0": "x", "q1": "y", "q2": "z"}, 0.95)
    assert (change.before, change.after, change.n, change.worse) == (100, 90, 20, 2)


def test_an_added_pair_is_as_large_as_a_unit_can_count(monkeypatch):
    """A unit of the smaller stratum counts as much as three of the other."""
    grouping = Grouping(("page", "kind"), stratum="kind")
    metric = AnswerMetric("pairs", 1, lambda text, answers: text in answers, "pairs", grouping=grouping)
    monkeypatch.setattr(paired_scores, "metric_of", lambda recipe: metric)
    inputs = {"pages": list(range(40)), "kinds": ["rare" if i < 10 else "common" for i in range(40)]}
    monkeypatch.setattr(paired_scores, "metric_inputs", lambda *_: inputs)
    right = {f"q{i}": Questions.answers[i][0] for i in range(40)}
    change = paired_change(Questions(), right, right, 0.95)
    # The standard error of the mean of 40 zeros, one rise and one drop of 40 / (2 * 10) units.
    assert change.error == pytest.approx(100 * (2 * 2.0**2) ** 0.5 / 42, rel=0.05)


def test_rouge_l_of_captions_is_a_mean_over_them_with_an_interval_for_few(monkeypatch):
    metric = metric_record("caption_rouge_l")
    monkeypatch.setattr(paired_scores, "metric_of", lambda recipe: metric)
    said = ["a red dog", "", "two cats sit", "a dog"]
    wanted = [["a dog", "the red dog"], ["a cat"], ["two cats are sitting", "cats"], ["a dog"]]
    scores = metric.example_scores(said, wanted)
    assert np.mean(scores) == pytest.approx(100 * metric.compute(said, wanted)["caption_rouge_l"])
    assert scores[1] == 0 and scores[3] == 100

    class Captions(Questions):
        ids, questions, answers = ["c0", "c1", "c2", "c3"], [None] * 4, wanted

        def __len__(self) -> int:
            return 4

    before, after = dict(zip(Captions.ids, said)), dict.fromkeys(Captions.ids, "x")
    change = paired_change(Captions(), before, after, 0.95)
    assert change.n == 4 and change.worse == 3 and change.after == 0
    assert flips(Captions(), before, after)[0].id == "c3"


def test_a_missing_answer_is_refused():
    with pytest.raises(EvalError, match="1 of 40 examples of colours.*q7"):
        paired_change(Questions(), RIGHT, {k: v for k, v in RIGHT.items() if k != "q7"}, 0.95)


def test_a_metric_of_all_answers_is_computed_on_samples_and_one_that_starts_java_is_refused(monkeypatch):
    def share(predictions, references):
        """Return a score of all answers together, here a share."""
        return sum(p in r for p, r in zip(predictions, references)) / len(predictions), {}

    metric = CorpusMetric("share", 1, share, "answers are right")
    monkeypatch.setattr(paired_scores, "metric_of", lambda recipe: metric)
    right = {f"q{i}": Questions.answers[i][0] for i in range(40)}
    change = paired_change(Questions(), right, right | {"q1": "x", "q3": "y"}, 0.95)
    assert change.points == pytest.approx(-5) and change.worse is None
    # The standard error of a share with 2 drops in 40, and one drop and one rise added.
    drops = [-1.0] * 3 + [1.0] + [0.0] * 38
    assert change.error == pytest.approx(100 * np.std(drops) / 40**0.5, rel=0.15)
    # Equal answers of 40 examples do not say that a change is impossible.
    same = paired_change(Questions(), right, right, 0.95)
    assert same.points == 0 and -20 < same.low < -2 < 2 < same.high < 20
    monkeypatch.setattr(paired_scores, "metric_of", lambda recipe: replace(metric, needs=("java",)))
    with pytest.raises(EvalError, match="starts Java"):
        check_comparable(Questions())
