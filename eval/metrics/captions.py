"""Metrics of captions: ROUGE-L, CIDEr, METEOR and UCIT's mean, each with the other scores as details."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_keeplora_eval import caption_scores, ptb
from llava_keeplora_eval.metrics.corpus import CorpusMetric
from llava_keeplora_eval.metrics.records import Answers
from llava_keeplora_eval.metrics.units import UnitScores


@dataclass(frozen=True)
class CaptionMetric(CorpusMetric):
    """A metric of captions, which are compared word by word.

    Args:
        by_rarity: whether n-grams that all examples have in their references get weight 0, as in CIDEr.
    """

    by_rarity: bool = False
    kinds: tuple[str, ...] = ("captioning",)

    @property
    def description(self) -> str:
        """The rule in one line; ``caption_scores`` describes the scores."""
        return self.summary

    def check_installed(self) -> None:
        """Check that pycocoevalcap, and Java for METEOR, are installed.

        Raises:
            EvalError: one of them is missing.
        """
        caption_scores.require("java" in self.needs)

    def unmeetable(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> list[int]:
        """Find the examples without a word in their references, or with `by_rarity` those of weight 0."""
        tokens = _tokens(references)
        return caption_scores.weightless(tokens) if self.by_rarity else _without_words(tokens)

    @property
    def reason(self) -> str:
        """Why an example of ``unmeetable`` gets 0."""
        if self.by_rarity:
            return (
                "CIDEr weighs words by how few examples have them, so a single example or what all "
                "have scores 0"
            )
        return "captions are compared word by word, and there is no word"

    def refuses(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> bool:
        """Return whether an example has no reference with a word in it."""
        return bool(_without_words(_tokens(references)))


@dataclass(frozen=True)
class MeanOfCaptions(CaptionMetric):
    """A metric of captions whose score is the mean over single captions.

    Args:
        by_caption: function of the captions and the references that returns each caption's score, 0 to 1.
    """

    by_caption: Callable[[Sequence[str], Sequence[Answers]], list[float]] = caption_scores.rouge_l

    def unit_scores(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> UnitScores:
        """See ``MetricRecord.unit_scores``; each caption is a unit."""
        self._check_given(predictions, references, inputs)
        what = f"{len(predictions)} predictions"
        scores = self._call(self.by_caption, what, predictions, references)
        return UnitScores(self.units(len(scores)), scores, [1 / len(scores)] * len(scores))

    def example_scores(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> list[float]:
        """See ``MetricRecord.example_scores``."""
        scores = self.unit_scores(predictions, references, **inputs).scores
        return [score * self.to_percent for score in scores]


def _tokens(references: Sequence[Answers]) -> list[list[str]]:
    return [[ptb.without_punctuation(ptb.tokenize(text)) for text in texts] for texts in references]


def _without_words(tokens: list[list[str]]) -> list[int]:
    return [i for i, texts in enumerate(tokens) if not any(texts)]


def caption_rouge_l(captions: Sequence[str], references: Sequence[Answers]) -> tuple[float, dict]:
    """Return ROUGE-L, 0 to 1, and all scores but METEOR."""
    scores = caption_scores.caption_scores(captions, references)
    return scores["rouge_l"], scores


def caption_cider(captions: Sequence[str], references: Sequence[Answers]) -> tuple[float, dict]:
    """Return CIDEr, 0 to 10, and all scores but METEOR."""
    scores = caption_scores.caption_scores(captions, references)
    return scores["cider"], scores


def caption_meteor(captions: Sequence[str], references: Sequence[Answers]) -> tuple[float, dict]:
    """Return METEOR, 0 to 1, and all scores."""
    scores = caption_scores.caption_scores(captions, references, with_meteor=True)
    return scores["meteor"], scores


def ucit_caption_mean(captions: Sequence[str], references: Sequence[Answers]) -> tuple[float, dict]:
    """Return the mean of seven scores, see ``caption_scores.ucit_mean``, and all of them."""
    scores = caption_scores.caption_scores(captions, references, with_meteor=True)
    return caption_scores.ucit_mean(scores), scores


_COCO = ("pycocoevalcap",)
_SOURCE = (
    "Chen et al. 2015, Microsoft COCO Captions (arXiv:1504.00325); https://github.com/salaniz/pycocoevalcap"
)

METRICS = (
    MeanOfCaptions(
        "caption_rouge_l",
        1,
        caption_rouge_l,
        "ROUGE-L of captions, with BLEU and CIDEr as details",
        needs=_COCO,
        citation=_SOURCE,
    ),
    CaptionMetric(
        "caption_cider",
        1,
        caption_cider,
        "CIDEr of captions, with BLEU and ROUGE-L as details",
        needs=_COCO,
        citation=_SOURCE,
        by_rarity=True,
    ),
    CaptionMetric(
        "caption_meteor",
        1,
        caption_meteor,
        "METEOR of captions, with all other scores as details",
        needs=(*_COCO, "java"),
        citation=_SOURCE,
    ),
    CaptionMetric(
        "ucit_caption_mean",
        1,
        ucit_caption_mean,
        "UCIT captions: mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr",
        needs=(*_COCO, "java"),
        citation="eval_caption.py of https://github.com/Ghy0501/MCITlib",
    ),
)
