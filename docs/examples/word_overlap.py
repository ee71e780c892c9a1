"""A metric of one's own: the share of an accepted text's words that the prediction names."""

from llava_keeplora_eval.metrics import AnswerMetric


def overlap(text, answers):
    """Return the largest share, over the accepted texts, of words that are in the prediction."""
    said = set(text.lower().split())
    words = [set(answer.lower().split()) for answer in answers]
    return max(len(said & expected) / len(expected) for expected in words)


word_overlap = AnswerMetric(
    "word_overlap", 1, overlap, "the accepted text's words are in the prediction", soft=True
)
