"""The rule ``coin_ocrvqa`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class CoinOcrVQA(base.AnswerMetric):
    rule = "coin_ocrvqa"
