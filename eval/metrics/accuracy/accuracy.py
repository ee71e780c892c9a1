"""The rule ``accuracy`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class Accuracy(base.AnswerMetric):
    rule = "accuracy"
