"""The rule ``acl_vp`` of ``llava_keeplora_eval.answer_rules`` as an ``evaluate.Metric``."""

from llava_keeplora_eval.metrics import base


class AclVp(base.AnswerMetric):
    rule = "acl_vp"
