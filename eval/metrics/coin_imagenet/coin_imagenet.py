"""The rule ``coin_imagenet`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class CoinImageNet(base.AnswerMetric):
    rule = "coin_imagenet"
