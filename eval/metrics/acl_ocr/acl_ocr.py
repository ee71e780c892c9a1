"""The rule ``acl_ocr`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class AclOcr(base.AnswerMetric):
    rule = "acl_ocr"
