"""The rule ``exact_match`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class ExactMatch(base.AnswerMetric):
    rule = "exact_match"
