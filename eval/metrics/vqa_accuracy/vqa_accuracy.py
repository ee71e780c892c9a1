"""The rule ``vqa_accuracy`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class VqaAccuracy(base.AnswerMetric):
    rule = "vqa_accuracy"
