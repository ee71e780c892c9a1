"""The rule ``option_letter`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class OptionLetter(base.AnswerMetric):
    rule = "option_letter"
