"""Share of predictions that are one of the accepted texts, as an ``evaluate.Metric``."""

import datasets

import evaluate

_DESCRIPTION = """
The share of examples whose prediction is, letter by letter, one of the accepted texts, after white space
around both is removed. An empty prediction is wrong, whatever is accepted. Every example counts.
"""

_INPUTS = """
Args:
    predictions: one text per example.
    references: one list of accepted texts per example.
Returns:
    accuracy: the share of right predictions, 0 to 1.
    correct: how many are right.
"""


class Accuracy(evaluate.Metric):
    """Exact match against a list of accepted texts; see the description above for the rule."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references):
        correct = sum(
            bool(text.strip()) and text.strip() in {answer.strip() for answer in answers}
            for text, answers in zip(predictions, references)
        )
        return {"accuracy": correct / len(predictions), "correct": correct}
