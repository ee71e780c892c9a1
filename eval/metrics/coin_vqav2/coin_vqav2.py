"""The rule ``coin_vqav2`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class CoinVQAv2(base.AnswerMetric):
    rule = "coin_vqav2"
