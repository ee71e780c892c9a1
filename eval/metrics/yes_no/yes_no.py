"""The rule ``yes_no`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class YesNo(base.AnswerMetric):
    rule = "yes_no"
