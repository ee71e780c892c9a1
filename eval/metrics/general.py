"""Metrics of benchmarks of general ability: POPE, MME, MMBench and SEED-Bench.

Each follows the official script, with one rule of this package on top: an empty answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from llava_keeplora_eval.answer_forms import letter_form, read_yes_no, yes_no_form
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics.records import AnswerMetric, Answers
from llava_keeplora_eval.metrics.units import Answered, Grouping, all_right
from llava_keeplora_recipes.texts import is_blank

YES, NO = "yes", "no"

#: MME's subtasks; a sum over them is published for each of the two groups.
PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

#: MMBench numbers the passes of a question by adding multiples of this to its index.
PASS = 1_000_000
#: Characters that MMBench's rule takes for spaces.
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
#: An option's letter counts only as one of so many last words.
_LAST = 4
_NAMED = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
#: Beginnings of refusals, which MMBench's rule takes for a wrong option.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
#: What MMBench's rule returns for an answer that declines; it is none of the options.
DECLINED = "Z"


def _label(answers: Answers) -> str:
    label = read_yes_no(answers[0].strip())
    if label is None:
        raise EvalError(f"the accepted text {answers[0][:40]!r} is neither yes nor no", "correct the record")
    return label


def pope_says(text: str) -> str:
    """Return yes or no, whichever an answer says by the rule of ``pope``."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return NO if {"No", "no", "not"} & set(words) else YES


def pope(text: str, answers: Answers) -> float:
    """Return whether the prediction says the accepted yes or no, by the rule of POPE's evaluate.py.

    It says no if "No", "no" or "not" is one of the words before its first period (commas aside, words split
    at spaces), otherwise yes; "NO" and "no!" say yes. The script takes an empty answer for yes as well; here
    it is wrong, and the details count it as the opposite of the label.
    """
    return pope_says(text) == _label(answers)


def pope_details(answered: Answered) -> dict[str, Any]:
    """Return precision, recall and F1 of yes, and the share of yes; for each category too, if there are any.

    A share of nothing, such as precision where no answer says yes, is None; the script divides by zero.
    """

    def rates(positions: Sequence[int], title: str) -> dict[str, float | None]:
        pairs = [(labels[i], said[i]) for i in positions if labels[i] is not None]
        hits = pairs.count((YES, YES))
        yes_said, yes_true = sum(s == YES for _, s in pairs), sum(label == YES for label, _ in pairs)
        return {
            f"{title}precision": hits / yes_said if yes_said else None,
            f"{title}recall": hits / yes_true if yes_true else None,
            f"{title}f1": 2 * hits / (yes_said + yes_true) if hits else None,
            f"{title}yes_ratio": yes_said / len(pairs) if pairs else None,
        }

    labels = [None if not a or is_blank(a[0]) else _label(a) for a in answered.references]
    said = [
        pope_says(text) if not is_blank(text) else NO if label == YES else YES
        for text, label in zip(answered.texts, labels, strict=True)
    ]
    details: dict[str, Any] = rates(range(len(labels)), "")
    for category, positions in answered.split_by("category").items():
        details |= {f"{category} accuracy": answered.unit_mean(positions)}
        details |= rates(positions, f"{category} ")
    return details


def mme_says(text: str) -> str:
    """Return yes, no or other by MME's rule: the first of "yes" and "no" within the first four characters."""
    start = text.lower()[:4]
    return YES if YES in start else NO if NO in start else "other"


def mme(text: str, answers: Answers) -> float:
    """Return whether the prediction says the accepted yes or no, by the rule of MME's calculation.py.

    It says yes if its first four characters in lower case have "yes" in them, else no if they have "no" in
    them, else neither, which is wrong. Both questions about an image are scored together: the image's score
    is the mean of accuracy (0, 1/2 or 1) and accuracy+ (1 if both are right). A subtask's score is the mean
    over its images, and the score the mean over subtasks, which is the official total divided by its
    largest value (2800 with all subtasks).
    """
    return mme_says(text) == _label(answers)


def mme_image(scores: Sequence[float]) -> float:
    """Return the mean of accuracy and accuracy+ of an image's answers."""
    return (sum(scores) / len(scores) + all_right(scores)) / 2


def mme_details(answered: Answered) -> dict[str, Any]:
    """Return the official sums (perception to 2000, cognition to 800) and each subtask's accuracies.

    A sum over subtasks that are not all there is None.
    """
    details: dict[str, Any] = {}
    totals: dict[str, float] = {}
    for subtask, positions in answered.split_by("category").items():
        answers = [answered.scores[i] for p in positions for i in answered.units.members[p]]
        plus = [all_right([answered.scores[i] for i in answered.units.members[p]]) for p in positions]
        details[f"{subtask} acc"] = sum(answers) / len(answers)
        details[f"{subtask} acc_plus"] = sum(plus) / len(plus)
        totals[subtask] = details[f"{subtask} acc"] + details[f"{subtask} acc_plus"]

    def total(subtasks: tuple[str, ...]) -> float | None:
        return sum(totals[name] for name in subtasks) if set(subtasks) <= totals.keys() else None

    return {"perception": total(PERCEPTION), "cognition": total(COGNITION), **details}


def mmbench_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the option that an answer chooses by MMBench's exact rule; None where it needs a judge.

    Args:
        text: the answer.
        options: letter → the option's text.

    Returns:
        A letter; ``DECLINED`` for an answer that declines; None if the rule finds none.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return DECLINED
    words = text.translate(_MARKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST:
        return letters[0]
    if not letters and DECLINED in words:
        return DECLINED
    named = _NAMED.search(text)
    if named and named[1].upper() in options:
        return named[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    meant = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return meant[0] if len(meant) == 1 else None


def mmbench(text: str, answers: Answers, *, option_set: Mapping[str, str]) -> float:
    """Return whether the prediction chooses the right option, by the exact rule of VLMEvalKit's MMBench.

    With ``.()[],:;!*#{}`` as spaces, an answer chooses the only option whose letter is one of its words, if
    that is among the last four words; else the letter after "answer is"; else, in an answer of at most twice
    the options' length, the only option whose text is in it, case aside. Officially a language model is asked
    about all other answers; here they are wrong, as under the toolkit's `exact_matching`, and `needs_judge`
    is their share. All passes of a question, of which each has the options in a rotated order, are scored
    together: the question is right if all of them are (CircularEval).
    """
    return mmbench_option(text, option_set) == answers[0].strip().upper()


def mmbench_question(index: Any) -> int:
    """Return the number of the question that a pass asks."""
    return int(str(index)) % PASS


def mmbench_details(answered: Answered) -> dict[str, Any]:
    """Return the share of single answers that are right, and of those without an option; then categories."""
    options = answered.inputs["option_sets"]
    pairs = list(zip(answered.texts, options, strict=True))
    details: dict[str, Any] = {
        "single_pass": sum(answered.scores) / len(answered.scores),
        "needs_judge": sum(mmbench_option(text, given) is None for text, given in pairs) / len(pairs),
    }
    short = sum(len(unit) != len(options[unit[0]]) for unit in answered.units.members)
    if short:
        details["incomplete"] = (
            f"{short} of {len(answered.units.members)} questions have another number of passes than options"
        )
    for name in ("l2_category", "category"):
        for value, positions in answered.split_by(name).items():
            details[f"{name} {value}"] = answered.unit_mean(positions)
    return details


def seed_bench(text: str, answers: Answers) -> float:
    """Return whether the prediction is the right option's letter and nothing else.

    This is how LLaVA-1.5 is scored on SEED-Bench (convert_seed_for_submission.py). The benchmark's own
    eval.py takes no written answer: it ranks the options by the likelihood of their texts, so that its scores
    and these do not compare.
    """
    return text == answers[0].strip()


def seed_bench_details(answered: Answered) -> dict[str, Any]:
    """Return the accuracy of each evaluation dimension, by its number, and of images and videos."""
    split = [("question_type_id", "dimension"), ("data_type", "data_type")]
    return {
        f"{title} {value}": answered.unit_mean(positions)
        for name, title in split
        for value, positions in answered.split_by(name).items()
    }


_Question = partial(AnswerMetric, kinds=("vqa",), compares="first")

METRICS = (
    _Question(
        "pope",
        1,
        pope,
        "POPE: no if a no or not is a word of the first sentence, otherwise yes",
        citation="Li et al. 2023 (arXiv:2305.10355); evaluate.py of https://github.com/AoiDragon/POPE",
        complies=yes_no_form,
        by=("category",),
        details=pope_details,
    ),
    _Question(
        "mme",
        1,
        mme,
        "MME: yes or no in the first four characters; accuracy and accuracy+ of images",
        citation="Fu et al. 2023 (arXiv:2306.13394); calculation.py in tools/eval_tool.zip, branch "
        "Evaluation of https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models",
        complies=yes_no_form,
        soft=True,
        grouping=Grouping(("category", "question_id"), mme_image, noun="images", size=2, stratum="category"),
        details=mme_details,
    ),
    _Question(
        "mmbench",
        1,
        mmbench,
        "MMBench: the right option by the exact rule in all passes of a question",
        inputs=("option_set",),
        citation="Liu et al. 2023 (arXiv:2307.06281); vlmeval/utils/matching_util.py of "
        "https://github.com/open-compass/VLMEvalKit",
        complies=letter_form,
        grouping=Grouping(("index",), all_right, noun="questions", key=mmbench_question),
        by=("category", "l2_category"),
        details=mmbench_details,
    ),
    _Question(
        "seed_bench",
        1,
        seed_bench,
        "SEED-Bench: the prediction is the right option's letter, by dimension",
        citation="Li et al. 2023 (arXiv:2307.16125); convert_seed_for_submission.py of "
        "https://github.com/haotian-liu/LLaVA",
        complies=letter_form,
        by=("question_type_id", "data_type"),
        details=seed_bench_details,
    ),
)
