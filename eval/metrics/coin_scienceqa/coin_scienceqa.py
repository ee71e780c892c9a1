"""The rule ``coin_scienceqa`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class CoinScienceQA(base.AnswerMetric):
    rule = "coin_scienceqa"
