"""The rule ``coin_vizwiz`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class CoinVizWiz(base.AnswerMetric):
    rule = "coin_vizwiz"
