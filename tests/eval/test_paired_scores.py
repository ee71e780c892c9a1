"""Changes of scores between two models' answers, from the metrics' own rules."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from llava_keeplora_eval import EvalError, paired_scores
from llava_keeplora_eval.metrics import AnswerMetric, CorpusMetric, Grouping, metric_record
from llava_keeplora_eval.paired_scores import check_comparable, flips, paired_change


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
    # The standard error of a share of 2 in 40.
    assert change.error == pytest.approx(100 * (0.05 * 0.95 / 40) ** 0.5, rel=0.25)
    monkeypatch.setattr(paired_scores, "metric_of", lambda recipe: replace(metric, needs=("java",)))
    with pytest.raises(EvalError, match="starts Java"):
        check_comparable(Questions())
