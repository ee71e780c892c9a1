"""BLEU, ROUGE-L, CIDEr and METEOR of a set of captions, by pycocoevalcap, the code behind published numbers.

BLEU and METEOR are computed on the set as a whole; ROUGE-L and CIDEr are means over its captions. CIDEr
weights n-grams by how few of the evaluated examples have them in their references, so it depends on the
evaluated set. An n-gram of every example has weight 0, so CIDEr is 0 for a single example and if all examples
have the same references.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence

from llava_keeplora_eval import java, ptb
from llava_keeplora_eval.errors import EvalError

#: Orders of the n-grams that CIDEr uses.
ORDERS = range(1, 5)
#: The scores of which UCIT takes the mean.
UCIT = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")


def tokenize(texts: Sequence[str]) -> tuple[list[str], str]:
    """Tokenise texts as pycocoevalcap does: PTB tokens in lower case, without punctuation.

    One Java process tokenises all texts.

    Args:
        texts: any texts; line breaks in them count as spaces.

    Returns:
        The tokens of each text, separated by spaces, and which tokenizer it was: ``stanford`` where there is
        Java, else ``python`` (see ``ptb``).
    """
    lines = [" ".join(text.split()) for text in texts]
    nonempty = [i for i, line in enumerate(lines) if line]
    jar = java.find_jar(java.TOKENIZER)
    if jar is None:
        return [ptb.without_punctuation(ptb.tokenize(line)) for line in lines], "python"
    # Empty texts are left out, because the tokenizer skips empty lines.
    tokens = java.tokenize(jar, [lines[i] for i in nonempty]) if nonempty else []
    result = [""] * len(lines)
    for i, line_tokens in zip(nonempty, tokens, strict=True):
        result[i] = ptb.without_punctuation(line_tokens.split(" "))
    return result, "stanford"


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], with_meteor: bool = False
) -> dict:
    """Compute all scores of a set of captions; an empty caption scores 0 and stays in every mean.

    Args:
        captions: one text per example.
        references: the reference captions of each example.
        with_meteor: whether to compute METEOR; its Java program takes some ten seconds to start, which is too
            long for a score after every task of a run.

    Returns:
        ``bleu_1`` to ``bleu_4``, ``rouge_l`` and, with ``with_meteor``, ``meteor`` from 0 to 1, ``cider``
        from 0 to 10, and ``tokenizer``; also ``cider_note`` if CIDEr is 0 whatever the captions are.

    Raises:
        EvalError: pycocoevalcap is missing, Java is missing for METEOR, or an example has no reference.
    """
    require(with_meteor)
    said, gold, tokenizer = _tokenized(captions, references)
    scores = _by_pycocoevalcap(said, gold)
    if with_meteor:
        scores["meteor"] = java.meteor(java.find_jar(java.METEOR), said, gold)
    if len(weightless(gold)) == len(gold):
        scores["cider_note"] = (
            f"0 for any caption, because all references of the {len(gold)} scored say the same"
        )
    return scores | {"tokenizer": tokenizer}


def rouge_l(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return ROUGE-L of each caption, 0 to 1; their mean is the set's. See `caption_scores`."""
    from pycocoevalcap.rouge.rouge import Rouge

    said, gold, _ = _tokenized(captions, references)
    return [float(score) for score in Rouge().compute_score(*_numbered(gold, said))[1]]


def _tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]], str]:
    """Return the tokens of the captions and of the references that have any, and which tokenizer it was.

    Raises:
        EvalError: an example has no reference with a word in it.
    """
    flat = [*captions, *(text for texts in references for text in texts)]
    tokens, tokenizer = tokenize(flat)
    remaining = iter(tokens[len(captions) :])
    gold = [[words for words in (next(remaining) for _ in texts) if words] for texts in references]
    if [] in gold:
        raise EvalError(
            f"example {gold.index([]) + 1} of {len(gold)} has no reference caption with a word in it, and "
            "captions are scored against references",
            "check the recipe's answer column",
        )
    return tokens[: len(captions)], gold, tokenizer


def weightless(references: Sequence[Sequence[str]]) -> list[int]:
    """Find the examples whose n-grams all have weight 0 in CIDEr, because every example has them.

    Args:
        references: for each example its tokenised captions, tokens separated by spaces.

    Returns:
        The positions of the examples, ascending; a single example is always among them.
    """

    def grams_of(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[at : at + n]) for n in ORDERS for at in range(len(words) - n + 1)}

    grams = [set().union(*(grams_of(text.split()) for text in texts)) for texts in references]
    frequency = Counter(gram for example in grams for gram in example)
    return [i for i, example in enumerate(grams) if all(frequency[gram] == len(grams) for gram in example)]


def _by_pycocoevalcap(captions: list[str], references: list[list[str]]) -> dict:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gold, said = _numbered(references, captions)
    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints its counts
        bleu = Bleu(4).compute_score(gold, said)[0]
    return {
        **{f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)},
        "rouge_l": float(Rouge().compute_score(gold, said)[0]),
        "cider": float(Cider().compute_score(gold, said)[0]),
    }


def _numbered(
    references: list[list[str]], captions: list[str]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return both as pycocoevalcap takes them."""
    return dict(enumerate(references)), {i: [caption] for i, caption in enumerate(captions)}


def ucit_mean(scores: dict) -> float:
    """Return UCIT's score of a captioning task, the mean of seven scores, of which CIDEr can be above 1.

    KeepLoRA's scripts cut every prediction to 300 characters first, MCITlib's and HiDe's don't; neither does
    this function.

    Source: eval_caption.py of https://github.com/Ghy0501/MCITlib.
    """
    return sum(scores[name] for name in UCIT) / len(UCIT)


def require(with_meteor: bool = False) -> None:
    """Check that the programs that score captions are installed.

    Args:
        with_meteor: whether METEOR is to be computed.

    Raises:
        EvalError: pycocoevalcap, or Java for METEOR, is not installed.
    """
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        raise EvalError(
            "captions are scored by pycocoevalcap, which is not installed", "pip install pycocoevalcap"
        ) from None
    if with_meteor and java.find_jar(java.METEOR) is None:
        raise EvalError(
            "METEOR is a Java program, and no 'java' is on the PATH",
            "install a Java runtime, or score with 'caption_rouge_l' or 'caption_cider'",
        )
