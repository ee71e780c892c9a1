"""Every rule for answers against worked examples, its quirks, and independent formulas."""

import itertools
import random

import pytest

from llava_keeplora_eval import EvalError, load_metric
from llava_keeplora_eval.metrics import METRICS, AnswerMetric, general

#: Rules of benchmarks of general ability: their references must be labels, and they have tests of their own.
GENERAL = {record.name for record in general.METRICS}
RULES = [name for name, record in METRICS.items() if isinstance(record, AnswerMetric) and name not in GENERAL]
GIVEN = {
    "question": "What is it?",
    "image": "images/map_1.png",
    "answer_type": "Doc-oriented VQA",
    "size": [640, 480],
}
TEN = ["yes"] * 6 + ["no"] * 2 + ["maybe"] * 2


def scored(name, prediction, answers, **given):
    inputs = {f"{key}s": [(GIVEN | given)[key]] for key in METRICS[name].inputs}
    return METRICS[name].compute([prediction], [answers], **inputs)


WORKED = [
    ("accuracy", "red bird", ["red bird"], 1),
    ("accuracy", " red bird\n", ["red bird "], 1),
    ("accuracy", "Red bird", ["red bird"], 0),
    ("exact_match", "Red  Bird", ["dog", "red bird"], 1),
    ("exact_match", "red bird.", ["red bird"], 0),
    ("option_letter", "b", ["B"], 1),
    ("option_letter", "B.", ["B"], 0),
    ("option_letter", "BB", ["BB"], 0),
    ("numeric", "3.0", ["3"], 1),
    ("numeric", "1,000", ["1000"], 1),
    ("numeric", "three", ["3"], 0),
    ("numeric", "4", ["3"], 0),
    ("numeric", "3", ["three"], 1),  # what is accepted may be a word
    ("yes_no", "YES", ["yes"], 1),
    ("yes_no", "yes.", ["yes"], 0),
    ("yes_no", "no", ["yes"], 0),
    # ten answers, leave one out: 6 x min(1, 5/3) + 4 x min(1, 6/3) = 10 of 10
    ("vqa_accuracy", "yes", TEN, 1),
    # 2 x 1/3 + 8 x 2/3 = 6 of 10
    ("vqa_accuracy", "no", TEN, 0.6),
    ("vqa_accuracy", "The NO.", TEN, 0.6),
    ("vqa_accuracy", "never", TEN, 0),
    # 3 x 2/3 + 7 x 1 = 9 of 10
    ("vqa_accuracy", "2", ["two"] * 3 + ["3"] * 7, 0.9),
    # all ten agree: compared to the letter
    ("vqa_accuracy", "yes", ["yes"] * 10, 1),
    ("vqa_accuracy", "Yes", ["yes"] * 10, 0),
    ("vqa_accuracy", "yes.", ["yes"] * 10, 0),
    # one answer: normalised
    ("vqa_accuracy", "The Dogs.", ["dogs"], 1),
    ("vqa_accuracy", "cat", ["dogs"], 0),
    ("vqa_accuracy", "a cat", ["dogs", "cat"], 1),
    # nothing is left of either, and nothing equals nothing: 3 x 1/3 of 4
    ("vqa_accuracy", "the", ["a", "b", "c", "d"], 0.25),
    ("vqa_accuracy", "A", ["a"] * 7 + ["b"] * 3, 1),
    ("vqa_accuracy", "A", ["A"], 1),
    ("vqa_accuracy", "a.", ["A"], 1),
    (
        "vqa_accuracy",
        "the",
        ["A"],
        0,
    ),  # below four answers there is no script, and an option isn't an article
    ("vqa_accuracy", ".", ["."], 1),
    ("vqa_accuracy", ".", ["a", "b"], 0),
    ("coin_textvqa", "a", ["a"] * 10, 1),
    ("coin_textvqa", "The", ["a"] * 10, 1),
    ("coin_textvqa", ".", ["?"] * 10, 1),
    ("coin_textvqa", "the", ["A"], 0),
    ("dcl_rs", "cat", ["."], 1),  # nothing is a part of everything
    ("dcl_rs", "a cat", ["..."], 1),
    ("acl_vp", "b", ["."], 1),
    ("ucit_exact_match", "RED bird", ["red bird"], 1),
    ("ucit_exact_match", "red bird.", ["red bird"], 0),
    ("ucit_exact_match", "a red bird", ["red bird"], 0),
    ("ucit_exact_match", "dog", ["cat", "dog"], 0),  # there is one answer officially
    ("dcl_rs", "I see a Residential Area here", ["residential area"], 1),
    ("dcl_rs", "residentialarea", ["residential area"], 0),
    ("dcl_rs", "yes", ["Yes"], 1),
    ("dcl_rs", "yesterday", ["yes"], 1),  # single word in single word: any part
    ("dcl_rs", "It is no. Really", ["no"], 1),
    ("dcl_rs", "say nothing", ["no"], 1),  # " no" begins "nothing"
    ("dcl_rs", "piano music", ["no"], 1),  # and "no " ends "piano"
    ("dcl_rs", "an unknown thing", ["no"], 0),
    ("dcl_rs", "a cat, maybe", ["cat"], 1),
    ("dcl_rs", "12 of them", ["1.2"], 1),  # the answer loses its periods, the prediction doesn't
    ("dcl_rs", "1.2 of them", ["1.2"], 0),
    ("dcl_rs", "Unanswerable, yes", ["yes"], 0),
    ("dcl_rs", "unanswerable, yes", ["yes"], 1),  # only with a capital
    ("dcl_ad", "the car turns left", ["left"], 1),
    ("dcl_med", "This is unknown", ["no"], 1),
    ("dcl_med", "LIVER tissue", ["liver"], 1),
    ("dcl_med", "Unanswerable liver", ["liver"], 0),
    ("dcl_fin", "B.", ["B"], 1),
    ("dcl_fin", "Y e s.", ["Yes"], 1),
    ("dcl_fin", "a b", ["a b"], 0),  # the prediction loses its spaces, the answer doesn't
    ("dcl_fin", "B, because", ["B"], 0),
    ("acl_vp", "(A) a c\nat.", ["(A)a.Cat"], 1),
    ("acl_vp", "b", ["(B)"], 0),
    ("coin_scienceqa", "B", ["B"], 1),
    ("coin_scienceqa", "B. a dog", ["B"], 1),
    ("coin_scienceqa", "B.", ["B"], 0),  # the space behind the period is missing
    ("coin_scienceqa", "b", ["B"], 0),
    ("coin_scienceqa", "F", ["F"], 0),  # no more than five options
    ("coin_scienceqa", "The answer is B.", ["B"], 1),
    ("coin_scienceqa", "The answer is B", ["B"], 0),  # a character must follow
    ("coin_scienceqa", "The answer is B. The answer is B.", ["B"], 0),  # one match only
    ("coin_scienceqa", "the answer is B.", ["B"], 0),
    ("coin_textvqa", "Yes.", ["yes"] * 10, 1),  # normalised though all agree
    ("coin_textvqa", "no", TEN, 0.6),
    ("coin_textvqa", "the stop", ["stop"], 1),
    ("coin_imagenet", "a tabby cat", ["tabby"], 1),
    ("coin_imagenet", "cat", ["tabby cat"], 1),
    ("coin_imagenet", "Tabby", ["tabby"], 0),
    ("coin_gqa", "Table.", ["table"], 1),
    ("coin_gqa", "table...", ["table"], 1),
    ("coin_gqa", "table", ["Table"], 0),  # answers are lower case
    ("coin_gqa", "the table", ["table"], 0),
    ("coin_vizwiz", "Blue", ["blue", "navy"], 1),
    ("coin_vizwiz", "navy", ["blue", "navy"], 0),  # one answer, not VQA accuracy
    ("coin_vqav2", "YES", ["yes"], 1),
    ("coin_ocrvqa", "Jane Doe", ["jane doe"], 1),
    ("coin_ocrvqa", "Unanswerable", ["unanswerable"], 0),
    ("coin_grounding", "[0.10,0.10,0.50,0.50]", ["[0.1,0.1,0.5,0.5]"], 1),
    ("coin_grounding", "[0.50,0.50,0.90,0.90]", ["[0.1,0.1,0.5,0.5]"], 0),
    ("coin_grounding", "[0.1,0.1,0.5,0.5]", ["[0.1,0.1,0.5,0.5]"], 0),  # the last 0.5 is read as 0.
    ("coin_grounding", "[0.10,0.10,0.50]", ["[0.1,0.1,0.5,0.5]"], 0),
    ("coin_grounding", "left", ["[0.1,0.1,0.5,0.5]"], 0),
    # 0.4 x 0.2 of 0.4 x 0.4 is exactly half, which is not more than half
    ("coin_grounding", "[0.00,0.00,0.50,0.250]", ["[0,0,0.5,0.5]"], 0),
    ("coin_grounding", "[0.00,0.00,0.50,0.260]", ["[0,0,0.5,0.5]"], 1),
]


@pytest.mark.parametrize(("name", "prediction", "answers", "expected"), WORKED)
def test_a_rule_by_hand(name, prediction, answers, expected):
    assert scored(name, prediction, answers)[name] == pytest.approx(expected)


def test_every_rule_has_a_worked_example_or_a_test_of_its_own():
    assert set(RULES) == {row[0] for row in WORKED} | {"dcl_sci", "acl_ocr"}


@pytest.mark.parametrize(
    ("image", "question", "prediction", "gold", "expected"),
    [
        ("Sci/images/AI2D_12.png", "Which?", "Leaf", "leaf", 1),
        ("AI2D_12.png", "Which?", "a leaf", "leaf", 0),
        ("TQA_1.png", "Which states", "a,b", "b,a", 0),  # only MapQA counts states
        ("VQA_1.png", "?", "leaf", "leaf", 1),
        ("SciVerse_1.png", "?", "leaf.", "leaf", 0),
        ("SciVerse.png", "?", "a leaf", "leaf", 1),  # the prefix ends at "_", and this is another
        ("map_1.png", "What?", "It is 3-5%", "3-5%", 1),
        ("map_1.png", "Which states?", "Ohio,Utah", "Ohio,Texas", 0.5),
        ("map_1.png", "Which states?", "Ohio,Texas,Utah,Iowa", "ohio,texas", 1),  # further ones are free
        ("map_1.png", "Which states?", "Ohio, Texas", "ohio,texas", 0.5),  # " texas" isn't "texas"
        ("map_1.png", "Which states?", "Ohio, Texas", "ohio, texas", 1),
        ("map_1.png", "which states?", "Ohio,Texas", "ohio,texas", 1),  # no capital: looked for as a part
    ],
)
def test_dcl_sci_by_hand(image, question, prediction, gold, expected):
    assert scored("dcl_sci", prediction, [gold], image=image, question=question)["dcl_sci"] == expected


def test_acl_ocr_keeps_case_and_drops_spaces_for_formulas_only():
    formula = "Handwritten Mathematical Expression Recognition"
    assert scored("acl_ocr", "It says STOP\nNOW", ["go", "stopnow"])["acl_ocr"] == 1
    assert scored("acl_ocr", "it says stop now", ["stopnow"])["acl_ocr"] == 0
    assert scored("acl_ocr", "= x ^ 2", ["x^2"], answer_type=formula)["acl_ocr"] == 1
    assert scored("acl_ocr", "= X ^ 2", ["x^2"], answer_type=formula)["acl_ocr"] == 0


def leave_one_out(text, answers):
    """The definition, spelt out: the mean over all subsets that leave one person out."""
    subsets = list(itertools.combinations(answers, len(answers) - 1))
    return sum(min(1, sum(answer == text for answer in subset) / 3) for subset in subsets) / len(subsets)


def test_vqa_accuracy_agrees_with_the_definition_for_every_split_of_ten_answers():
    for right in range(11):
        answers = ["left"] * right + ["right"] * (10 - right)
        for name in ("vqa_accuracy", "coin_textvqa"):
            assert scored(name, "left", answers)[name] == pytest.approx(leave_one_out("left", answers)), right


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("prediction", ["", "  ", "\n"])
def test_an_empty_answer_is_wrong_by_every_rule_whatever_is_accepted(name, prediction):
    gold = "[0.1,0.1,0.5,0.5]" if name == "coin_grounding" else ""
    result = scored(name, prediction, [gold])
    assert (result[name], result["lenient"], result["compliance"]) == (0, 0, 0)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"coin_grounding"}))
def test_an_accepted_text_that_is_empty_matches_nothing(name):
    assert scored(name, "dog", [""])[name] == scored(name, "a dog", [""])[name] == 0
    assert scored(name, "dog", [])[name] == 0


TYPICAL = {"option_letter": "B", "coin_scienceqa": "B", "numeric": "3", "yes_no": "no", "dcl_fin": "yes"}


@pytest.mark.parametrize("name", RULES)
def test_the_accepted_answer_itself_is_right_and_complies(name):
    gold = TYPICAL.get(name, "[0.10,0.10,0.50,0.50]" if name == "coin_grounding" else "table")
    result = scored(name, gold, [gold])
    assert result[name] == result["lenient"] == result["compliance"] == 1


@pytest.mark.parametrize(
    ("name", "prediction", "gold"),
    [
        ("exact_match", "It is a red bird.", "red bird"),
        ("vqa_accuracy", "It is a red bird.", "red bird"),
        ("option_letter", "The answer is (B).", "B"),
        ("numeric", "There are three of them.", "3"),
        ("yes_no", "No, there is none.", "no"),
        ("ucit_exact_match", "C. a dog", "C"),
        ("dcl_sci", "The answer is a leaf.", "leaf"),
        ("dcl_fin", "Yes, it rises.", "Yes"),
        ("coin_scienceqa", "(B)", "B"),
        ("coin_textvqa", "The sign says stop.", "stop"),
        ("coin_gqa", "It is the table.", "table"),
        ("coin_vizwiz", "It is blue.", "blue"),
        ("coin_grounding", "The box is [0.1, 0.1, 0.5, 0.5].", "[0.1,0.1,0.5,0.5]"),
        ("coin_ocrvqa", "By Jane Doe.", "Jane Doe"),
    ],
)
def test_a_sentence_around_the_answer_loses_score_and_compliance_but_not_the_lenient_score(
    name, prediction, gold
):
    result = scored(name, prediction, [gold], image="AI2D_1.png")
    assert (result[name], result["lenient"], result["compliance"]) == (0, 1, 0)


def test_another_spelling_of_a_class_is_right_for_a_lenient_reader_and_complies():
    result = scored("accuracy", "Red_Bird.", ["red bird"])
    assert (result["accuracy"], result["lenient"], result["compliance"]) == (0, 1, 1)


def test_lenient_is_never_below_strict_and_every_share_lies_between_0_and_1():
    words = [
        "a",
        "B",
        "no",
        "yes",
        "3",
        "three",
        "cat",
        "cats",
        "red",
        ".",
        "Unanswerable",
        "answer is",
        ",",
        "0.5",
        "(C)",
    ]
    chance = random.Random(0)

    def text():
        return " ".join(chance.choices(words, k=chance.randint(0, 4)))

    for name in sorted(set(RULES) - {"coin_grounding"}):
        for _ in range(200):
            result = scored(name, text(), [text() for _ in range(chance.choice([1, 2, 10]))])
            assert 0 <= result[name] <= result["lenient"] <= 1, name
            assert result["compliance"] in (0, 1)


def test_shares_are_means_over_all_examples_and_soft_rules_count_nothing():
    result = METRICS["exact_match"].compute(["dog", "a cat", "", "x"], [["dog"], ["cat"], ["y"], ["y"]])
    assert result == {"exact_match": 0.25, "lenient": 0.5, "compliance": 0.75, "correct": 1} | {
        "errors": {"empty": 1, "format": 1, "other": 1}
    }
    assert "correct" not in METRICS["vqa_accuracy"].compute(["dog"], [["dog"]])


def test_the_classes_that_accuracy_knows_are_those_of_the_references():
    result = METRICS["accuracy"].compute(
        ["Red_bird", "dog", "tree", ""], [["cat"], ["red bird"], ["cat"], ["dog"]]
    )
    assert result == {"accuracy": 0, "lenient": 0, "compliance": 0.5, "correct": 0} | {
        "errors": {"empty": 1, "other": 3}
    }


READ = [
    ("option_letter", "B", ["(B)", "B.", "b)", "B. a dog", "(b) a dog", "b: dog", " B ", "\uff22"]),
    ("yes_no", "yes", ["True", "TRUE", "Yes.", "yes!", " Yes\n", "\uff39es"]),
    ("yes_no", "no", ["False", "no."]),
    ("numeric", "3", ["three", "Three", "3.", " 3 ", "3.0", "\uff13"]),
    ("numeric", "50", ["50%", "50 %", "50.0%"]),
    ("numeric", "-1000", ["-1,000", "\u22121000"]),
    ("accuracy", "caf\u00e9", ["cafe\u0301", " cafe\u0301"]),
    ("exact_match", "caf\u00e9", ["cafe\u0301", "CAFE\u0301", " caf\u00e9 "]),
]


@pytest.mark.parametrize(("name", "prediction", "gold"), [(n, p, g) for n, p, golds in READ for g in golds])
def test_what_an_accepted_text_says_beyond_doubt_is_read_and_the_text_itself_is_right(name, prediction, gold):
    assert scored(name, prediction, [gold])[name] == scored(name, gold, [gold])[name] == 1
    assert scored(name, prediction, [gold])["lenient"] == 1


@pytest.mark.parametrize(
    ("name", "gold"),
    [("option_letter", g) for g in ("2", "BB", "a dog", "A dog", "A or B", "I am")]
    + [("yes_no", g) for g in ("1", "y", "yes and no", "maybe", "not true")]
    + [("numeric", g) for g in ("none", "a dozen", "3 dogs", "1/2", "$5", "1 000", "%", "nan", "1e3", "3-5")],
)
def test_an_accepted_text_that_says_nothing_for_certain_matches_nothing(name, gold):
    assert [scored(name, p, [gold])[name] for p in (gold, "A", "B", "yes", "no", "0", "1", "3")] == [0] * 8


def test_numbers_are_equal_to_their_last_digit():
    assert scored("numeric", "1" + "0" * 400, ["2" + "0" * 400])["numeric"] == 0
    assert scored("numeric", "9" * 5000 + ".0", ["9" * 5000])["numeric"] == 1


def test_boxes_are_compared_in_pixels_where_rounding_decides():
    box, gold = "[0.79, 0.550, 0.97, 0.62].", "[0.8,0.51,0.98,0.61]"
    results = {
        side: scored("coin_grounding", box, [gold], size=[side, 8])["coin_grounding"]
        for side in range(50, 700)
    }
    assert set(results.values()) == {0, 1}


@pytest.mark.parametrize("size", ["640x480", [640], [640, "480"], {"w": 640}])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(EvalError, match="size.*width and height"):
        scored("coin_grounding", "[0.10,0.10,0.50,0.50]", ["[0.1,0.1,0.5,0.5]"], size=size)


def test_a_box_that_is_none_is_refused():
    with pytest.raises(EvalError) as error:
        scored("coin_grounding", "[0.1,0.1,0.5,0.5]", ["on the left"])
    assert str(error.value) == (
        "the accepted answer 'on the left' is no box of four numbers, and this metric compares boxes; "
        "check the recipe's answer column, or choose another metric."
    )


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_a_metric_that_loads_and_computes_the_same(name):
    gold = TYPICAL.get(name, "[0.10,0.10,0.50,0.50]" if name == "coin_grounding" else "table")
    inputs = {f"{key}s": [GIVEN[key]] for key in METRICS[name].inputs}
    metric = load_metric(name)
    assert metric.compute(predictions=[gold], references=[[gold]], **inputs) == scored(name, gold, [gold])
    assert metric.description == METRICS[name].function.__doc__
