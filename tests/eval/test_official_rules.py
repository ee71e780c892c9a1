"""Random answers against each official script's rule, derived anew; `make test-slow` takes 30,000 of them.

The scripts themselves were run beside the metrics on as many cases; see docs/benchmarks.md.
"""

import random
import re

import pytest

from llava_keeplora_eval.metrics import METRICS, AnswerMetric, general

CASES = [pytest.param(150, id="few"), pytest.param(30_000, id="30000", marks=pytest.mark.slow)]
CONTRACTIONS = {
    "dont": "don't",
    "couldn'tve": "couldn't've",
    "somebody'd": "somebodyd",
    "twas": "'twas",
    "youre": "you're",
}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "ten": "10"}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
WORDS = [
    *["a", "an", "the", "A", "The", "yes", "no", "Yes", "No", "1", "2", "3", "10", "1,000", "1,,2", "3.5", ".5", "5.", "none", "zero", "one", "two", "ten", "eleven", "let's", "she's", "dog's", "dog", "cat", "red", "Red-Brown", "t-shirt", "a/b", "w/", "?", "!", ".", "...", ",", ";", ":", "'", '"', "(", ")", "(B)", "B.", "B", "b", "C", "F", "[x]", "{y}", "=", "+", "\\", "_", "-", ">", "<", "@", "`", "stop", "STOP", "Unanswerable", "unanswerable", "answer", "is", "The", "Ohio", "ohio,utah", "Utah,", "left", "residential", "nothing", "piano", "ß", "İ", "é", "²", "³"],
    *CONTRACTIONS,
]  # fmt: skip
SPACES = [" "] * 8 + ["", "", "\n", "\t", "  ", ", ", "."]


def phrase(chance, longest=4):
    """A few words, never nothing but white space."""
    while True:
        parts = [chance.choice(WORDS) + chance.choice(SPACES) for _ in range(chance.randint(1, longest))]
        if "".join(parts).strip():
            return "".join(parts)


def near(chance, gold):
    """What a model may answer: stripped, often something like the reference."""
    more = phrase(chance, 2)
    texts = [gold, gold, gold.upper(), gold.lower(), gold + ".", "the " + gold, f"{gold} {more}", f"{more} {gold}",
             gold.replace(" ", ""), gold[: len(gold) // 2], more, more, phrase(chance)]  # fmt: skip
    return chance.choice(texts).strip() or more.strip()


# The rules, each from its script's text and not from the metric's.


def words_of(text):
    """vqaEval.py: marks, at most 32 periods, number words, articles, contractions."""
    digits_around_comma = any(re.match(r"\d,\d", text[i : i + 3]) for i in range(len(text)))
    spaced = {mark for mark in MARKS if f"{mark} " in text or f" {mark}" in text}
    text = "".join(("" if c in spaced or digits_around_comma else " ") if c in MARKS else c for c in text)
    kept, gone = "", 0
    for here, after in zip(text, text[1:] + "x"):
        drop = here == "." and not re.match(r"\d", after) and gone < 32
        gone += drop
        kept += "" if drop else here
    words = [NUMBERS.get(word, word) for word in kept.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def votes(text, answers):
    """The mean over persons left out of min(1, how many of the others say so / 3)."""
    people = range(len(answers))
    return sum(min(1, sum(answers[j] == text for j in people if j != i) / 3) for i in people) / len(answers)


def flat(text):
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa(text, answers):
    text, answers = flat(text), [flat(answer) for answer in answers]
    if len(set(answers)) > 1:
        text, answers = words_of(text), [words_of(answer) for answer in answers]
    return votes(text, answers)


def textvqa(text, answers):
    def normal(t):
        return words_of(flat(re.sub("[,?]", "", t.lower()).replace("'s", " 's").strip()))

    return votes(normal(text), [normal(answer) for answer in answers])


def answerable(rule):
    return lambda text, answers: 0 if "Unanswerable" in text else rule(text.lower(), answers[0].lower())


def words_in(text, gold):
    if " " in gold:
        return text.find(gold) >= 0
    gold = "".join(gold.split(".")) if "." in gold else gold
    ends = [gold + end for end in " .,"] + [" " + gold]
    return any(text.find(end) >= 0 for end in ends) if " " in text else text.find(gold) >= 0


def letter_of(text):
    if text in ["A", "B", "C", "D", "E"]:
        return text
    if text[1:3] == ". " and text[0] in "ABCDE":
        return text[0]
    found = re.findall("The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def bare(text, marks):
    return "".join(c for c in text.lower().strip() if c not in marks)


OFFICIAL = {
    "vqa_accuracy": vqa,
    "coin_textvqa": textvqa,
    "ucit_exact_match": lambda text, answers: text.upper() == answers[0].upper(),
    "coin_vizwiz": lambda text, answers: text.upper() == answers[0].upper(),
    "coin_vqav2": lambda text, answers: text.upper() == answers[0].upper(),
    "dcl_rs": answerable(words_in),
    "dcl_ad": answerable(words_in),
    "dcl_med": answerable(lambda text, gold: text.find(gold) >= 0),
    "dcl_fin": answerable(lambda text, gold: "".join(c for c in text if c not in " .") == gold),
    "coin_ocrvqa": answerable(lambda text, gold: text == gold),
    "acl_vp": lambda text, answers: bare(text, " \n.").find(bare(answers[0], " \n.")) >= 0,
    "coin_scienceqa": lambda text, answers: letter_of(text) == answers[0],
    "coin_imagenet": lambda text, answers: text.find(answers[0]) >= 0 or answers[0].find(text) >= 0,
    "coin_gqa": lambda text, answers: re.sub(r"\.+\Z", "", text).lower() == answers[0],
}


def references(name, chance):
    if name in ("vqa_accuracy", "coin_textvqa"):
        pool = [phrase(chance, 2) for _ in range(chance.randint(1, 4))]
        return [chance.choice(pool) for _ in range(10)]
    if name == "coin_scienceqa":
        return [chance.choice("ABCDE")]
    return [phrase(chance, 3).lower().strip() if name == "coin_gqa" else phrase(chance, 3)]


@pytest.mark.parametrize("count", CASES)
@pytest.mark.parametrize("name", OFFICIAL)
def test_random_answers_score_as_by_the_official_rule(name, count):
    chance = random.Random(name)
    scores = set()
    for _ in range(count):
        answers = references(name, chance)
        text = near(chance, chance.choice(answers))
        if name == "coin_scienceqa" and chance.random() < 0.6:
            text = chance.choice(["The answer is {}.", "{}. a dog", "{}.", "So: The answer is {}!"]).format(
                text
            )
        expected = float(OFFICIAL[name](text, answers))
        scores.add(expected)
        assert METRICS[name].compute([text], [answers])[name] == pytest.approx(expected, abs=1e-12), (
            text,
            answers,
        )
    assert len(scores) > 1


@pytest.mark.parametrize("count", CASES)
def test_random_ocr_answers(count):
    chance = random.Random(1)
    formula = "Handwritten Mathematical Expression Recognition"
    for _ in range(count):
        kind, answers = (
            chance.choice([formula, "Doc-oriented VQA"]),
            [phrase(chance, 2) for _ in range(chance.randint(1, 3))],
        )
        text = near(chance, chance.choice(answers))

        def form(t):
            return "".join(t.strip().split("\n")).replace(" ", "") if kind == formula else bare(t, "\n")

        expected = max(form(text).find(form(answer)) >= 0 for answer in answers)
        assert METRICS["acl_ocr"].compute([text], [answers], answer_types=[kind])["acl_ocr"] == expected, (
            text,
            answers,
            kind,
        )


@pytest.mark.parametrize("count", CASES)
def test_random_science_answers(count):
    chance = random.Random(2)
    states = ["ohio", "Utah", " texas", "New York"]
    for _ in range(count):
        image, question = (
            chance.choice(["x/AI2D_1.png", "TQA_2.png", "map_1.png"]),
            chance.choice(["Which states?", "What?"]),
        )
        gold = ",".join(chance.choices(states, k=3)) if chance.random() < 0.5 else phrase(chance, 2)
        text = ",".join(chance.choices(states, k=3)).strip() if chance.random() < 0.5 else near(chance, gold)
        low, wanted = text.lower(), gold.lower()
        if "Unanswerable" in text:
            expected = 0
        elif image != "map_1.png":
            expected = low == wanted
        elif question == "Which states?":
            expected = len([s for s in wanted.split(",") if s in low.split(",")]) / (wanted.count(",") + 1)
        else:
            expected = low.find(wanted) >= 0
        given = {"questions": [question], "images": [image]}
        assert METRICS["dcl_sci"].compute([text], [[gold]], **given)["dcl_sci"] == pytest.approx(
            float(expected)
        ), (text, gold, image)


@pytest.mark.parametrize("count", CASES)
def test_random_boxes(count):
    """eval_grounding.py, in pixels of the longer side; both boxes have an inside."""
    chance = random.Random(3)
    rights = 0
    for _ in range(count):
        x, y, w, h = (chance.uniform(0.05, 0.5) for _ in range(4))
        gold = [round(v, 2) for v in (x, y, x + w, y + h)]
        box = [f"{v + chance.gauss(0, 0.05):.{chance.choice([1, 2, 3])}f}" for v in gold]
        text = chance.choice(["[{}]", "{}", "[{}].", "({})"]).format(",".join(box))
        size = [chance.randint(50, 700), chance.randint(50, 700)]
        read = text.replace("[", "").replace("]", "")[1:-1].split(",")
        try:
            a, b = [float(v) * max(size) for v in read], [v * max(size) for v in gold]
            shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
            expected = union > 0 and shared / union > 0.5
        except ValueError:
            expected = False
        rights += expected
        result = METRICS["coin_grounding"].compute([text], [[str(gold)]], sizes=[size])["coin_grounding"]
        assert result == expected, (text, gold, size)
    assert 0 < rights < count


def test_every_rule_with_an_official_script_is_compared():
    own = {"accuracy", "exact_match", "option_letter", "numeric", "yes_no"}
    rules = {name for name, record in METRICS.items() if isinstance(record, AnswerMetric)}
    elsewhere = {record.name for record in general.METRICS}  # test_metrics_general.py
    assert rules - own - elsewhere == set(OFFICIAL) | {"acl_ocr", "dcl_sci", "coin_grounding"}
