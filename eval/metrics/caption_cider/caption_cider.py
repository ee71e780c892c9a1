"""CIDEr of captions as an ``evaluate.Metric``; see ``llava_keeplora_eval.caption_scores``."""

from llava_keeplora_eval.metrics import base


class CaptionCider(base.CaptionMetric):
    rule = "caption_cider"

    def headline(self, scores):
        return scores["cider"]
