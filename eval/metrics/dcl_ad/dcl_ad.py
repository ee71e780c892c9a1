"""The rule ``dcl_ad`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class DclAd(base.AnswerMetric):
    rule = "dcl_ad"
