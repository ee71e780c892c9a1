"""POPE, MME, MMBench and SEED-Bench: official rules, derived anew, and hand-computed scores."""

import random
import string

import pytest

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics import METRICS, AnswerMetric
from llava_keeplora_eval.metrics.general import mmbench_option
from llava_keeplora_eval.metrics.units import Grouping

POPE, MME, MMBENCH, SEED = (METRICS[name] for name in ("pope", "mme", "mmbench", "seed_bench"))
WORDS = ["yes", "Yes", "YES", "no", "No", "NO", "not", "Not", "a", "dog", "A", "B", "C", "D", "answer", "is",
         "The", "correct", "option", "red", "there", "nothing", "Z", "(B)", "**C**", "b", "cat", "blue"]  # fmt: skip
MARKS = ["", "", "", ".", ",", ":", "!", "\n", ")", "*"]
OPTIONS = {"A": "dog", "B": "Red cat", "C": "blue", "D": "2"}


def answers_of(seed, count=400):
    chance = random.Random(seed)
    for _ in range(count):
        parts = [chance.choice(WORDS) + chance.choice(MARKS) for _ in range(chance.randint(1, 7))]
        yield chance.choice([" ", " ", "  "]).join(parts).strip()


def says_no(text):
    """evaluate.py, letter by letter: a word ends at a space, the text at its first period."""
    word, words = "", []
    for letter in text + ".":
        if letter in " .":
            words.append(word)
            word = ""
            if letter == ".":
                break
        elif letter != ",":
            word += letter
    return any(word in ("No", "no", "not") for word in words)


def test_pope_reads_every_answer_as_the_official_script_does():
    texts = list(answers_of(0))
    assert {says_no(text) for text in texts} == {True, False}
    for text in texts:
        assert POPE.score(text, ["no"]) == says_no(text)
        assert POPE.score(text, ["yes"]) == (not says_no(text))


def test_pope_counts_as_the_official_script_does_and_per_category():
    texts = ["Yes", "Yes, a dog", "No", "There is no dog.", "I do not see it", "maybe", "NO", "It is. no"]
    labels = ["yes", "no", "no", "no", "yes", "yes", "no", "no"]
    categories = ["random"] * 4 + ["popular"] * 4
    result = POPE.compute(texts, [[label] for label in labels], categorys=categories)
    # says yes: 1, 2, 6, 7, 8; right: 1, 3, 4, 6. TP 2 (1, 6), FP 3 (2, 7, 8), TN 2 (3, 4), FN 1 (5).
    assert result["pope"] == 4 / 8
    details = result["details"]
    assert details["precision"] == pytest.approx(2 / 5)
    assert details["recall"] == pytest.approx(2 / 3)
    assert details["f1"] == pytest.approx(2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3))
    assert details["yes_ratio"] == 5 / 8
    assert details["random accuracy"] == 3 / 4 and details["random precision"] == 1 / 2
    assert details["random recall"] == 1 and details["random yes_ratio"] == 2 / 4
    assert details["popular accuracy"] == 1 / 4 and details["popular yes_ratio"] == 3 / 4
    assert "random accuracy" not in POPE.compute(texts, [[label] for label in labels])["details"]


def test_pope_has_no_precision_where_nothing_says_yes_and_an_empty_answer_is_wrong():
    details = POPE.compute(["no", ""], [["no"], ["yes"]])["details"]
    assert details["precision"] is None and details["f1"] is None
    assert details["recall"] == 0 and details["yes_ratio"] == 0
    assert POPE.score("", ["no"]) == POPE.score("", ["yes"]) == 0


def test_a_label_that_is_neither_yes_nor_no_is_refused():
    with pytest.raises(EvalError, match="'maybe' is neither yes nor no"):
        POPE.compute(["yes"], [["maybe"]])
    assert POPE.unmeetable([["maybe"], ["No"]]) == [0]


def official_mme(lines):
    """calculation.py's scores from its lines (subtask, image, label, answer), two of an image in a row."""
    totals = {}
    for subtask in {line[0] for line in lines}:
        rows = [line for line in lines if line[0] == subtask]
        hits = []
        for _, _, label, text in rows:
            start = text.lower()[:4]
            said = "yes" if start.find("yes") >= 0 else "no" if start.find("no") >= 0 else "other"
            hits.append(said == label.lower())
        pairs = [hits[i] and hits[i + 1] for i in range(0, len(hits), 2)]
        totals[subtask] = 100 * sum(hits) / len(hits) + 100 * sum(pairs) / len(pairs)
    return totals


def mme_lines(seed):
    chance = random.Random(seed)
    texts = answers_of(seed, 2000)
    subtasks = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                "OCR", "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]  # fmt: skip
    return [
        (subtask, f"{image:04}.jpg", label, next(texts) if chance.random() < 0.3 else chance.choice(["Yes", "No."]))
        for subtask in subtasks
        for image in range(chance.randint(2, 5))
        for label in ("Yes", "No")
    ]  # fmt: skip


def test_mme_gives_the_official_sums_and_a_score_of_their_share():
    lines = mme_lines(3)
    totals = official_mme(lines)
    chance = random.Random(1)
    shuffled = chance.sample(lines, len(lines))  # pairs are found by image, not by order
    result = MME.compute(
        [text for *_, text in shuffled],
        [[label] for _, _, label, _ in shuffled],
        categorys=[line[0] for line in shuffled],
        question_ids=[line[1] for line in shuffled],
    )
    details = result["details"]
    for subtask, total in totals.items():
        assert 100 * (details[f"{subtask} acc"] + details[f"{subtask} acc_plus"]) == pytest.approx(total)
    cognition = [name for name in totals if "_" in name]
    assert 100 * details["cognition"] == pytest.approx(sum(totals[name] for name in cognition))
    assert 100 * details["perception"] == pytest.approx(sum(totals.values()) - 100 * details["cognition"])
    assert 2800 * result["mme"] == pytest.approx(sum(totals.values()))


def test_mme_by_hand_weighs_subtasks_alike_and_leaves_out_incomplete_sums():
    categories = ["count"] * 4 + ["my own"] * 2
    result = MME.compute(
        ["Yes", "no", "yes", "yes", "Not sure", "yes"],
        [["Yes"], ["No"]] * 3,
        categorys=categories,
        question_ids=["1", "1", "2", "2", "1", "1"],
    )
    # count: images (both right), (one right): acc 3/4, acc+ 1/2. my own: none right.
    assert result["details"]["count acc"] == 3 / 4 and result["details"]["count acc_plus"] == 1 / 2
    assert result["mme"] == pytest.approx(((3 / 4 + 1 / 2) / 2 + 0) / 2)
    assert result["details"]["perception"] is None and result["details"]["cognition"] is None
    units = MME.unit_scores(
        ["Yes", "no", "yes", "yes", "Not sure", "yes"],
        [["Yes"], ["No"]] * 3,
        categorys=categories,
        question_ids=["1", "1", "2", "2", "1", "1"],
    )
    assert units.members == [[0, 1], [2, 3], [4, 5]]
    assert units.scores == [1, 1 / 4, 0] and units.weights == [1 / 4, 1 / 4, 1 / 2]


def test_an_image_of_mme_without_both_questions_is_refused_before_a_run():
    given = {"categorys": ["count"] * 3, "question_ids": ["1", "1", "2"]}
    with pytest.raises(EvalError, match="images of 2 examples.*1 of 2.*another number"):
        MME.unmeetable([["Yes"], ["No"], ["Yes"]], **given)


def official_option(text, options):
    """matching_util.py, without its log: words, then "answer is", then the options' texts."""
    words = "".join(" " if letter in ".()[],:;!*#{}" else letter for letter in text).split()
    present = [letter for letter in string.ascii_uppercase if letter in options and words.count(letter)]
    if len(present) == 1:
        first = next(i for i, word in enumerate(words) if word == present[0])
        if len(words) - first < 5:
            return present[0]
    if not present and "Z" in words:
        return "Z"
    lower = text.lower()
    for start in range(len(text)):
        found = next((a for a in ("correct ", "") if lower.startswith(f"{a}answer", start)), None)
        rest = lower[start + len(f"{found}answer") :] if found is not None else ""
        middle = rest.lstrip()
        if len(middle) < len(rest) and middle.startswith("is"):
            after = middle[2:].lstrip()
            letter = after.lstrip("*")[:1].upper()
            if len(after) < len(middle[2:]) and letter in set("ABCD"):
                if letter in options:
                    return letter
                break
    if len(text) > 2 * sum(len(option) for option in options.values()):
        return None
    inside = [letter for letter, option in options.items() if option.lower() in lower]
    return inside[0] if len(inside) == 1 else None


def test_mmbench_extracts_the_option_that_the_official_rule_does():
    texts = list(answers_of(7, 1500))
    expected = [official_option(text, dict(OPTIONS)) for text in texts]
    assert set(expected) == {*OPTIONS, "Z", None}
    assert [mmbench_option(text, OPTIONS) for text in texts] == expected


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", "B"),
        ("(B).", "B"),
        ("B. Red cat", "B"),
        ("b", None),  # case counts for letters
        ("it's a RED CAT", "B"),  # and not for texts
        ("dog and blue", None),
        ("A dog is what this picture clearly shows", None),  # too early for a letter, too long for a text
        ("The correct answer is **C** because of one, two, three, four, five things", "C"),
        ("The answer is a dog", "A"),  # the official pattern has no word boundary
        ("A or B", None),
        ("I can't process this file.", "Z"),
    ],
)
def test_mmbench_options_by_hand(text, option):
    assert mmbench_option(text, OPTIONS) == option


def test_mmbench_needs_all_passes_of_a_question():
    rows = [(7, "A", "A"), (1_000_007, "B", "the answer: B"), (8, "B", "B"), (1_000_008, "A", "unsure")]
    result = MMBENCH.compute(
        [text for *_, text in rows],
        [[answer] for _, answer, _ in rows],
        indexs=[str(index) for index, *_ in rows],
        option_sets=[{"A": "dogs", "B": "cats"}] * 4,
        categorys=["naming", "naming", "ocr", "ocr"],
        l2_categorys=["fine"] * 4,
    )
    assert result["mmbench"] == 1 / 2
    assert "correct" not in result
    assert result["details"] == {
        "single_pass": 3 / 4,
        "needs_judge": 1 / 4,
        "l2_category fine": 1 / 2,
        "category naming": 1,
        "category ocr": 0,
    }


def test_mmbench_says_where_passes_are_missing_and_refuses_an_index_without_a_number():
    given = {"option_sets": [{"A": "dogs", "B": "cats"}]}
    details = MMBENCH.compute(["A"], [["A"]], indexs=["7"], **given)["details"]
    assert "1 of 1 questions" in details["incomplete"]
    with pytest.raises(EvalError, match="questions.*index 'seven'"):
        MMBENCH.compute(["A"], [["A"]], indexs=["seven"], **given)


def test_seed_bench_takes_the_letter_alone_and_reports_dimensions():
    texts, labels = ["A", "B.", "C", "d"], [["A"], ["B"], ["A"], ["D"]]
    result = SEED.compute(texts, labels, question_type_ids=[1, 1, 5, 5], data_types=["image"] * 4)
    assert result["seed_bench"] == 1 / 4 and result["correct"] == 1
    assert result["lenient"] == 3 / 4  # "B." and "d" name the option
    assert result["details"] == {"dimension 1": 1 / 2, "dimension 5": 0, "data_type image": 1 / 4}
    assert SEED.compute(texts, labels)["details"] == {}


def test_every_metric_of_answers_says_its_units():
    assert METRICS["exact_match"].units(3) == [[0], [1], [2]]
    units = METRICS["exact_match"].unit_scores(["a", "b", "c"], [["a"], ["x"], ["C"]])
    assert units.scores == [1, 0, 1] and units.mean == 2 / 3
    assert METRICS["caption_cider"].unit_scores(["a"], [["a"]]) is None
    assert MMBENCH.units(3, indexs=[1, 2, 1_000_001]) == [[0, 2], [1]]


def test_a_metric_of_ones_own_may_group_its_examples():
    metric = AnswerMetric(
        "pages", 1, lambda text, answers: text in answers, "all of a page", grouping=Grouping(("page",))
    )
    result = metric.compute(["a", "b", "c"], [["a"], ["b"], ["x"]], pages=[1, 1, 2])
    assert result["pages"] == 1 / 2 and "correct" not in result
    with pytest.raises(EvalError, match="needs the pages"):
        metric.compute(["a"], [["a"]])
