"""The rule ``ucit_exact_match`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class UcitExactMatch(base.AnswerMetric):
    rule = "ucit_exact_match"
