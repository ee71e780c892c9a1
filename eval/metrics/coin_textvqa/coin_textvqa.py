"""The rule ``coin_textvqa`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class CoinTextVQA(base.AnswerMetric):
    rule = "coin_textvqa"
