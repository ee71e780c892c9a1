"""Captions: ROUGE-L, CIDEr, METEOR and UCIT's mean of seven, each with all the others as details."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_keeplora_eval import caption_scores, ptb
from llava_keeplora_eval.metrics.records import Answers, CorpusMetric


@dataclass(frozen=True)
class CaptionMetric(CorpusMetric):
    """A score of captions, which are compared word by word.

    Args:
        by_rarity: whether a word that all examples have in their references weighs nothing.
    """

    by_rarity: bool = False

    @property
    def description(self) -> str:
        """The rule in a line; the scores are described in ``caption_scores``."""
        return self.summary

    def check_installed(self) -> None:
        """Refuse captions where pycocoevalcap, or Java for METEOR, is missing.

        Raises:
            EvalError: it is.
        """
        caption_scores.require("java" in self.needs)

    def unmeetable(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> list[int]:
        """Find the captions without a word, or by rarity without an n-gram that not every example has."""
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
    CaptionMetric(
        "caption_rouge_l",
        1,
        caption_rouge_l,
        "ROUGE-L of captions, with BLEU and CIDEr beside it",
        needs=_COCO,
        citation=_SOURCE,
    ),
    CaptionMetric(
        "caption_cider",
        1,
        caption_cider,
        "CIDEr of captions, with BLEU and ROUGE-L beside it",
        needs=_COCO,
        citation=_SOURCE,
        by_rarity=True,
    ),
    CaptionMetric(
        "caption_meteor",
        1,
        caption_meteor,
        "METEOR of captions, with all the others beside it",
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
