"""The rule ``dcl_fin`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class DclFin(base.AnswerMetric):
    rule = "dcl_fin"
