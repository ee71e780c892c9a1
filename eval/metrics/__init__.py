"""The metrics that score predictions: an explicit list, each a local ``evaluate.Metric`` in its own folder."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_recipes.errors import nearest

if TYPE_CHECKING:
    import evaluate


@dataclass(frozen=True)
class MetricRecord:
    """What the package knows of a metric without loading it.

    Args:
        name: the name that recipes use; also the folder, the module and the key of the result.
        version: raised whenever the rule changes, and kept with every score.
        to_percent: what the results are multiplied by to be on the 0-100 scale.
        summary: the rule, in a line.
        inputs: what the rule needs of an example besides its accepted texts: ``question``, or a key of its ``meta``. The
            metric's ``compute`` takes them in the plural (``questions``), one value per example.
        needs: what must be installed besides this package.
    """

    name: str
    version: int
    to_percent: float
    summary: str
    inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


_CAPTIONS = ("pycocoevalcap",)

METRICS = {
    record.name: record
    for record in (
        MetricRecord("accuracy", 1, 100.0, "the prediction is one of the accepted texts, letter by letter"),
        MetricRecord("exact_match", 2, 100.0, "the prediction is one of the accepted texts, case aside"),
        MetricRecord("vqa_accuracy", 2, 100.0, "official VQA accuracy over ten answers; one answer: right or wrong"),
        MetricRecord("option_letter", 2, 100.0, "the prediction is the option's letter and nothing else"),
        MetricRecord("numeric", 2, 100.0, "the prediction is a number of the accepted value and nothing else"),
        MetricRecord("yes_no", 2, 100.0, "the prediction is the accepted one of yes and no and nothing else"),
        MetricRecord("caption_rouge_l", 1, 100.0, "ROUGE-L of captions, with BLEU and CIDEr beside it", needs=_CAPTIONS),
        MetricRecord("caption_cider", 1, 100.0, "CIDEr of captions, with BLEU and ROUGE-L beside it", needs=_CAPTIONS),
        MetricRecord("caption_meteor", 1, 100.0, "METEOR of captions, with all the others beside it", needs=(*_CAPTIONS, "java")),
        MetricRecord("ucit_exact_match", 1, 100.0, "UCIT: the prediction is the answer, case aside"),
        MetricRecord(
            "ucit_caption_mean",
            1,
            100.0,
            "UCIT captions: mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr",
            needs=(*_CAPTIONS, "java"),
        ),
        MetricRecord("dcl_rs", 2, 100.0, "MLLM-DCL remote sensing: the answer's words are in the prediction"),
        MetricRecord("dcl_ad", 2, 100.0, "MLLM-DCL driving: the answer's words are in the prediction"),
        MetricRecord("dcl_med", 1, 100.0, "MLLM-DCL medicine: the answer is a part of the prediction"),
        MetricRecord(
            "dcl_sci", 1, 100.0, "MLLM-DCL science: by data set, equal or a part or a share of states", ("question", "image")
        ),
        MetricRecord("dcl_fin", 1, 100.0, "MLLM-DCL finance: the prediction without spaces and periods is the answer"),
        MetricRecord("acl_ocr", 1, 100.0, "MLLM-ACL OCRBench: an answer is a part of the prediction", ("answer_type",)),
        MetricRecord("acl_vp", 2, 100.0, "MLLM-ACL CV-Bench: the answer is a part of the prediction, spaces aside"),
        MetricRecord("coin_scienceqa", 1, 100.0, "CoIN ScienceQA: the letter that the prediction is, begins with or names"),
        MetricRecord("coin_textvqa", 2, 100.0, "CoIN TextVQA: VQA accuracy over ten answers, always normalised"),
        MetricRecord("coin_imagenet", 1, 100.0, "CoIN ImageNet: one of prediction and class name is a part of the other"),
        MetricRecord("coin_gqa", 1, 100.0, "CoIN GQA: the prediction in lower case without last periods is the answer"),
        MetricRecord("coin_vizwiz", 1, 100.0, "CoIN VizWiz: the prediction is the one answer, case aside"),
        MetricRecord("coin_vqav2", 1, 100.0, "CoIN VQAv2: the prediction is the one answer, case aside"),
        MetricRecord("coin_grounding", 2, 100.0, "CoIN Grounding: the boxes overlap by more than half", ("size",)),
        MetricRecord("coin_ocrvqa", 1, 100.0, "CoIN OCR-VQA: the prediction is the answer, case aside"),
    )
}


def metric_record(name: str) -> MetricRecord:
    """The record of a metric by name.

    Raises:
        EvalError: there is no such metric.
    """
    if name not in METRICS:
        raise EvalError(f"there is no metric '{name}'", nearest(name, METRICS))
    return METRICS[name]


def check_metric(name: str) -> None:
    """Refuse a metric that could not be computed here, so that a long run can ask before it starts.

    Raises:
        EvalError: there is no such metric, or what it needs is not installed.
    """
    if needs := metric_record(name).needs:
        from llava_keeplora_eval import caption_scores

        caption_scores.require("java" in needs)


def load_metric(name: str) -> evaluate.Metric:
    """Load a metric of this package from its file: no network, no download count, nothing shared on disk.

    Args:
        name: one of ``METRICS``.

    Returns:
        An ``evaluate.Metric``; its ``compute(predictions=..., references=...)`` result has the key ``name``.

    Raises:
        EvalError: there is no such metric.
    """
    metric_record(name)
    import evaluate  # over a second to import, which `--help` and the matrix don't need

    # A local path never reaches the Hub. Memory instead of cache files, and an id of its own, because two
    # processes that score at once would otherwise meet in one file named after `default_experiment`.
    return evaluate.load(
        str(Path(__file__).parent / name), module_type="metric", experiment_id=uuid.uuid4().hex, keep_in_memory=True
    )
