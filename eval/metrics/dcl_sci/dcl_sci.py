"""The rule ``dcl_sci`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class DclSci(base.AnswerMetric):
    rule = "dcl_sci"
