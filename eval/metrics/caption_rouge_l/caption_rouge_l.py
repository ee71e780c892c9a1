"""ROUGE-L of captions as an ``evaluate.Metric``; see ``llava_keeplora_eval.caption_scores``."""

from llava_keeplora_eval.metrics import base


class CaptionRougeL(base.CaptionMetric):
    rule = "caption_rouge_l"

    def headline(self, scores):
        return scores["rouge_l"]
