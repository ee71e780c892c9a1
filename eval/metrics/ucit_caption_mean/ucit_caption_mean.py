"""UCIT's mean of seven caption scores as an ``evaluate.Metric``; see ``llava_keeplora_eval.caption_scores``."""

from llava_keeplora_eval.caption_scores import ucit_mean
from llava_keeplora_eval.metrics import base


class UcitCaptionMean(base.CaptionMetric):
    rule = "ucit_caption_mean"
    with_meteor = True

    def headline(self, scores):
        return ucit_mean(scores)
