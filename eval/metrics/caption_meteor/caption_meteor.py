"""METEOR of captions as an ``evaluate.Metric``; see ``llava_keeplora_eval.caption_scores``."""

from llava_keeplora_eval.metrics import base


class CaptionMeteor(base.CaptionMetric):
    rule = "caption_meteor"
    with_meteor = True

    def headline(self, scores):
        return scores["meteor"]
