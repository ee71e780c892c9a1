"""The rule ``dcl_med`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class DclMed(base.AnswerMetric):
    rule = "dcl_med"
