"""What the metric modules share. They import this module and not its classes, because ``evaluate`` takes the first metric class
that it finds in a module's namespace for the module's own."""

from __future__ import annotations

import datasets

import evaluate
from llava_keeplora_eval.answer_rules import RULES, score_answers
from llava_keeplora_eval.caption_scores import caption_scores
from llava_keeplora_eval.metrics import METRICS

_INPUTS = """
Args:
    predictions: one text per example; an empty one is wrong.
    references: one list of accepted texts per example.
    {inputs}
Returns:
    {name}: the score.
    {returns}
"""


def _info(name: str, description: str, returns: str) -> evaluate.MetricInfo:
    inputs = " ".join(f"{key}s: one per example." for key in METRICS[name].inputs)
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=_INPUTS.format(name=name, inputs=inputs, returns=returns),
        features=datasets.Features(
            {
                "predictions": datasets.Value("string"),
                "references": datasets.Sequence(datasets.Value("string")),
            }
        ),
    )


class AnswerMetric(evaluate.Metric):
    """A rule of ``answer_rules`` as a metric; a subclass names it in ``rule``."""

    rule: str

    def _info(self):
        returns = "lenient, compliance: see ``answer_rules``. correct: how many are right, where scores are 0 or 1."
        return _info(self.rule, RULES[self.rule].strict.__doc__, returns)

    def _compute(self, predictions, references, **inputs):
        return score_answers(self.rule, predictions, references, **inputs)


class CaptionMetric(evaluate.Metric):
    """All caption scores as a metric; a subclass names itself in ``rule`` and picks its headline from them."""

    rule: str
    with_meteor = False

    def headline(self, scores: dict) -> float:
        raise NotImplementedError

    def _info(self):
        return _info(self.rule, METRICS[self.rule].summary, "details: all scores and the tokenizer that was used.")

    def _compute(self, predictions, references):
        scores = caption_scores(predictions, references, self.with_meteor)
        return {self.rule: self.headline(scores), "details": scores}
