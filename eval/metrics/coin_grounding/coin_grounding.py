"""The rule ``coin_grounding`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class CoinGrounding(base.AnswerMetric):
    rule = "coin_grounding"
