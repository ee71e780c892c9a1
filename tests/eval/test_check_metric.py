"""The checks that any metric has to pass: every metric of the package does, and metrics with a fault do not."""

import pytest

from llava_keeplora_eval import caption_scores
from llava_keeplora_eval.metrics import METRICS, AnswerMetric, CorpusMetric
from llava_keeplora_eval.testing import REFERENCES, check_metric

BOX = "[0.10,0.10,0.50,0.50]"
INPUTS = {
    "question": "What is it?",
    "image": "AI2D_1.png",
    "answer_type": "Doc-oriented VQA",
    "size": [640, 480],
    "option_set": {"A": "a dog", "B": "a cat"},
}
#: Inputs that tell units apart, for six examples.
GROUPS = {"category": list("xxxxyy"), "question_id": list("aabbaa"), "index": [1, 1000001, 2, 1000002, 3, 4]}
YES_NO = {"references": [["yes"], ["No"]] * 3, "predictions": ["Yes", "no.", "", " ", "so", "not yes"]}
LETTERS = {"references": [["A"], ["B"]] * 3, "predictions": ["A", "B", "", " ", "(A)", "a cat"]}
#: Metrics that compare nothing but letters, numbers, ...
OWN = {"coin_grounding": {"references": [[BOX]] * 6, "predictions": [BOX, "left", "", " ", "[1,2]", BOX]}}
OWN |= {"pope": YES_NO, "mme": YES_NO, "mmbench": LETTERS, "seed_bench": LETTERS}
installed = pytest.importorskip("pycocoevalcap", reason="captions are scored by pycocoevalcap")


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_of_the_package_keeps_the_promises(name, monkeypatch):
    record = METRICS[name]
    if "java" in record.needs:
        monkeypatch.setattr(caption_scores, "require", lambda with_meteor=False: None)
        monkeypatch.setattr(caption_scores.java, "find_jar", lambda pattern: None)
        monkeypatch.setattr(caption_scores.java, "meteor", meteor_without_java)
    inputs = {f"{key}s": GROUPS.get(key) or [INPUTS[key]] * 6 for key in record.required}
    check_metric(name, **OWN.get(name, {}), inputs=inputs)


def meteor_without_java(jar, captions, references):
    """Stand in for the Java program: the share of captions that are a reference."""
    return sum(caption in texts for caption, texts in zip(captions, references)) / len(captions)


def right(text, answers):
    """The prediction is an accepted text."""
    return text in answers


def test_a_function_is_checked_as_its_record_is():
    check_metric(right)


def test_a_metric_with_a_fault_is_found():
    seen = []

    def moody(text, answers):
        seen.append(text)
        return len(seen) <= 4

    faults = {
        "two results": AnswerMetric("moody", 1, moody, "moody"),
        "is above 1|from 0 to 1": AnswerMetric("high", 1, lambda text, answers: 3, "high"),
        "none of the references": AnswerMetric("never", 1, lambda text, answers: 0, "never"),
        "needs soft": AnswerMetric("part", 1, lambda text, answers: 0.5, "part"),
        "at least 1": AnswerMetric("old", 0, right, "old"),
        "one line": AnswerMetric("long", 1, right, "a\nb"),
        "empty prediction": CorpusMetric("kind", 1, lambda texts, references: (1.0, {}), "kind"),
        "depends on the order": CorpusMetric(
            "first", 1, lambda texts, references: (len(texts[0].strip()), {}), "first"
        ),
        "changes what it is given": CorpusMetric(
            "taker", 1, lambda texts, references: (0.0, {"n": references[0].append("")}), "taker"
        ),
    }
    for sentence, metric in faults.items():
        with pytest.raises(Exception, match=sentence) as error:
            check_metric(metric, references=[list(texts) for texts in REFERENCES])
        assert not isinstance(error.value, (TypeError, AttributeError)), sentence
