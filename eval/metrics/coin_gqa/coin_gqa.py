"""The rule ``coin_gqa`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class CoinGQA(base.AnswerMetric):
    rule = "coin_gqa"
