"""The rule ``dcl_rs`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class DclRs(base.AnswerMetric):
    rule = "dcl_rs"
