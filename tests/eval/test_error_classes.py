"""Classes of wrong answers: each by hand, and their sum is the number of wrong answers."""

import pytest

from llava_keeplora_eval.answer_forms import words_only
from llava_keeplora_eval.error_classes import error_class, top_confusions
from llava_keeplora_eval.metrics import METRICS
from llava_keeplora_eval.synonyms import GROUPS
from llava_keeplora_eval.vqa_text import ARTICLES, NUMBERS

#: (answer, accepted texts, the class of the error).
WRONG = [
    ("", ["dog"], "empty"),
    (" \n", ["dog"], "empty"),
    ("A dog.", ["dog"], "format"),
    ("the answer is dog", ["dog"], "format"),
    ("two", ["2"], "format"),
    ("2", ["two"], "format"),
    ("There are 2 of them", ["2"], "format"),
    ("Yes, it is", ["yes"], "format"),
    ("(B)", ["B"], "format"),
    ("3", ["2"], "off by one"),
    ("one", ["2"], "off by one"),
    ("I see 3 dogs", ["two", "2"], "off by one"),
    ("0", ["1"], "off by one"),
    ("4", ["2"], "other"),
    ("2.5", ["1.5"], "other"),
    ("51%", ["50%"], "other"),
    ("3 or 4", ["2"], "other"),
    ("dogs", ["dog"], "near"),
    ("berry", ["berries"], "near"),
    ("bus", ["buses"], "near"),
    ("dog", ["brown dog"], "near"),
    ("hot dog", ["dog"], "near"),
    ("walking dog", ["dog walking"], "near"),
    ("black dog", ["brown dog"], "other"),
    ("sofa", ["couch"], "near"),
    ("A brown sofa.", ["brown couches"], "near"),
    ("garbage can", ["trash can"], "near"),
    ("motorbikes", ["2 dogs", "motorcycle"], "near"),
    ("brown sofa", ["black couch"], "other"),
    ("ship", ["boat"], "other"),
    ("hat", ["mouse"], "other"),
    ("no", ["yes"], "other"),
    ("C", ["B"], "other"),
    ("glass", ["gla"], "other"),
]
#: Accepted texts of other examples.
KNOWN = {"hot dog", "black dog", "walking dog", "dogs", "no", "3", "4", "ship", "boat"}


@pytest.mark.parametrize(("text", "answers", "expected"), WRONG)
def test_an_error_is_of_the_first_class_that_it_fits(text, answers, expected):
    assert error_class(text, answers, answers, KNOWN, lenient=False) == expected


def test_a_term_has_one_group_of_synonyms_and_no_group_an_article_or_a_number():
    terms = [words_only(term) for group in GROUPS for term in group]
    assert sorted(terms) == sorted({*terms})
    assert all(
        term == words_only(term) and {*term.split()}.isdisjoint({*ARTICLES, *NUMBERS}) for term in terms
    )
    pairs = [(a, b) for group in GROUPS for a in group for b in group if a != b]
    assert {error_class(a, [b], [b], (), lenient=False) for a, b in pairs} == {"near", "format"}


def test_what_the_lenient_reader_of_a_metric_accepts_is_format():
    assert error_class("dogs", ["dog"], ["dog"], KNOWN, lenient=True) == "format"
    assert error_class("", ["dog"], ["dog"], KNOWN, lenient=True) == "empty"


def test_a_text_that_is_listed_but_not_compared_is_near():
    # The first text alone is compared; the others are what other people wrote.
    first = next(record for record in METRICS.values() if getattr(record, "compares", "") == "first")
    inputs = {f"{name}s": ["words"] for name in first.inputs}
    result = first.compute(["canine"], [["dog", "canine"]], **inputs)
    assert result["errors"] == {"near": 1}


def test_the_classes_add_up_to_the_wrong_answers():
    texts, answers = [text for text, *_ in WRONG], [accepted for _, accepted, _ in WRONG]
    result = METRICS["exact_match"].compute([*texts, "dog", "Dog"], [*answers, ["dog"], ["dog"]])
    assert result["correct"] == 2 and sum(result["errors"].values()) == len(WRONG)
    assert list(result["errors"]) == ["empty", "format", "off by one", "near", "other"]
    assert result["errors"]["empty"] == 2 and result["errors"]["off by one"] == 4
    soft = METRICS["vqa_accuracy"].compute(
        ["dog", "dog", "cat"], [["dog"] + ["cat"] * 9] * 2 + [["dog"] * 10]
    )
    # One vote of ten is part of a point, and no error.
    assert soft["errors"] == {"other": 1}
    assert METRICS["exact_match"].compute(["dog"], [["dog"]])["errors"] == {}


def test_confusions_are_the_most_frequent_pairs_in_a_fixed_order():
    pairs = (
        [("cat", "dog")] * 2 + [("dog", "cat")] * 2 + [("cat", "a  fox")] * 3 + [("cat", c) for c in "xyzw"]
    )
    assert top_confusions(pairs) == [
        ["cat", "a fox", 3],
        ["cat", "dog", 2],
        ["dog", "cat", 2],
        ["cat", "w", 1],
        ["cat", "x", 1],
    ]
