"""Penn Treebank tokenizer in Python, for machines without Java.

It follows the conventions of the tokenizer of Stanford CoreNLP 3.4.1 with pycocoevalcap's options, and was
written from these conventions and that tokenizer's output.

If Java is installed, a test compares both. Known differences: telephone numbers in groups ("123 456 7890"),
which are one token there; SGML entities other than the five of XML; fewer abbreviations that keep their
period; file names and addresses of unusual form; signs of currencies younger than the tokenizer, which it
drops; and a single letter with a period at the end of a caption ("vitamin C."), which keeps the period there
if the next caption in the file begins with an unusual word.

Source: Marcus et al., Building a large annotated corpus of English: the Penn Treebank, Computational
Linguistics 19(2), 1993; https://nlp.stanford.edu/software/tokenizer.html; the dropped tokens from
pycocoevalcap's ptbtokenizer.py.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# The official list has brackets in capitals, while tokens are lower case, so "-lrb-" is never dropped.
DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_MONEY = {"£": "#", "€": "$", "¤": "$", "¢": "cents"}
_REWRITTEN = _BRACKETS | _MONEY | {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_QUOTES = "\"'`‘’‛“”‹›«»\u0091\u0092\u0093\u0094"

# Abbreviations that keep their period: always, with a capital, before a number.
_SHORTENED = [
    "mr",
    "mrs",
    "ms",
    "dr",
    "drs",
    "prof",
    "profs",
    "rev",
    "hon",
    "gen",
    "col",
    "lt",
    "sgt",
    "capt",
    "cpl",
    "pvt",
    "maj",
    "adm",
    "gov",
    "sen",
    "rep",
    "pres",
    "st",
    "ste",
    "mt",
    "ave",
    "blvd",
    "rd",
    "jr",
    "sr",
    "esq",
    "bros",
    "inc",
    "co",
    "cos",
    "corp",
    "ltd",
    "plc",
    "dept",
    "univ",
    "assn",
    "intl",
    "vs",
    "etc",
    "al",
    "seq",
    "cf",
    "est",
    "ext",
    "sq",
    "ft",
    "tel",
    "natl",
    "jan",
    "feb",
    "mar",
    "apr",
    "jun",
    "jul",
    "aug",
    "sep",
    "sept",
    "oct",
    "nov",
    "dec",
    "mon",
    "tue",
    "tues",
    "wed",
    "thu",
    "thurs",
    "fri",
    "ala",
    "ariz",
    "calif",
    "colo",
    "conn",
    "dak",
    "fla",
    "ga",
    "ind",
    "kan",
    "ky",
    "md",
    "mich",
    "minn",
    "mo",
    "mont",
    "neb",
    "nev",
    "okla",
    "penn",
    "tenn",
    "va",
    "vt",
    "wis",
    "wyo",
]
_CAPITAL = ["Ark", "Del", "Ill", "La", "Mass", "Miss", "Ore", "Pa", "Tex", "Wash"]
_NUMBERED = ["no", "nos", "fig", "figs", "pp", "art"]
# Words of which an apostrophe is a part, in addition to those that _KINDS describes.
_WITH_APOSTROPHE = [
    "ma'am",
    "c'mon",
    "e'er",
    "ev'ry",
    "li'l",
    "s'mores",
    "nor'easter",
    "nat'l",
    "dunkin'",
    "somethin'",
    "ol'",
    "'em",
    "'til",
    "'till",
    "'cause",
]
# Two tokens written as one word, by the length of the first.
_TWO = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3}

_A = "['’\u0092]"  # an apostrophe
_L = "(?:[^\\W\\d_²³¹⁰-₉]|[\u0300-\u036f])"  # a letter, or an accent by itself
_W = "(?:[^\\W_²³¹⁰-₉]|[\u0300-\u036f])"  # a letter or a digit
_H = "[-_\u058a\u2010\u2011]"  # a hyphen inside a word
_END = f"(?!{_L})"
_FORMER = rf"(?i:[dlo]{_A}(?={_W}{{2}}))?"  # as in o'clock, d'art, l'eau
_SPLIT = rf"(?i:[msd]|re|ve|ll){_END}"  # what splits off behind an apostrophe
_PATH = r"[^\s\"<>]*[\w/&=%~+#]"  # of an address: it doesn't end in a mark
_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+)*"  # of words with slashes


def _any(words: Iterable[str]) -> str:
    return "|".join(word.replace("'", _A) for word in words)


# Kinds of tokens. At each place the longest match wins, and of equally long ones the first.
_KINDS = [
    re.compile(pattern)
    for pattern in (
        # addresses, names with a sign, tags
        rf"(?i:https?://{_PATH}|(?:[\w-]+\.)+(?:com|net|org|edu){_END}(?:/{_PATH})?)",
        r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*|[@#][A-Za-z_]\w*|</?[A-Za-z!?][^\s>]*>",
        # words: plain, with hyphens, with marks before a hyphen, without the space behind a mark, with
        # slashes
        f"{_L}+",
        rf"{_FORMER}{_W}+(?:{_H}{_FORMER}{_W}+)*",
        rf"{_W}(?:[.,]*{_W})*[.,]*(?:-{_W}+)+",
        rf"{_L}{_W}*(?:[.!?]{_L}{_W}*)+",
        rf"{_PART}(?:/{_PART}){{1,2}}",
        # words with an apostrophe: O'Brien but not I'm, Hawai'i, rock 'n' roll, '90s
        rf"(?![IY])[A-Z]{_A}{_L}{{2,}}|(?i:{_L}+[aeiouy]{_A}(?!{_SPLIT})[aeiou]{_L}*)",
        rf"(?i:{_any(_WITH_APOSTROPHE)}){_END}",
        rf"(?i:y{_A}(?={_L})|{_A}n{_A}|{_A}n{_END}|{_A}t(?=(?:is|was){_END})|n{_A}t{_END})",
        rf"{_A}[2-9]0s|{_A}\d\d(?=\s)",
        r"[A-Z]+(?:[&+][A-Z]+)+|[Cc]\+\+|[CcFf]#",
        # numbers, dates, fractions, money
        r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)",
        r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"(?:\d{1,4}[- ])?\d{1,4}[/⁄]\d{1,4}",
        r"[A-Z]*\$",
        # abbreviations keep their period, and so does any word before another mark
        r"[A-Za-z](?:\.[A-Za-z])+(?:\.|(?=\s))",
        r"[A-Za-z]\.(?!\n|\s+(?:An?|The|This|That|There|These|They|He|She|It|We|You|In|At)\s)",
        rf"(?i:(?:ph|ed)\.d|{_any(_SHORTENED)})\.|(?:{_any(_CAPITAL)})\.|(?i:{_any(_NUMBERED)})\.(?= ?\d)",
        rf"{_W}+(?:-{_W}+)*\.(?=[,;:])",
        # faces, and marks that come in runs
        r">?[:;=][-o*']?[()\[\]|DdPpO](?![A-Za-z0-9])",
        r"\.{3,5}|(?:\. ){2,4}\.|…|<<|>>",
        r"-+|[?!]+|\*+|_+|@+|#+|''|``",
    )
]
# Most words of a caption: ASCII letters followed by a space, for which the kinds need not be tried.
_SIMPLE_WORD = re.compile(rf"(?!(?:{'|'.join(_TWO)})\s)[A-Za-z]+(?=\s)", re.IGNORECASE)
# Clitics, which split off a word: "'s", "n't". The word before "n't" doesn't end in an n.
_CLITIC = re.compile(_A + _SPLIT)
_NEGATION = re.compile(rf"(?i:([a-z]*[a-mo-z])(n{_A}t)){_END}")
_ENTITY = re.compile(r"&(?:amp|quot|apos|nbsp);", re.IGNORECASE)


def tokenize(text: str) -> list[str]:
    """Return the tokens of a line of text, in lower case."""
    text = _ENTITY.sub(lambda match: html.unescape(match[0].lower()), text)
    text = text.replace("&lt;", " < ").replace("&gt;", " > ").replace("\u00ad", "")
    return [token.lower() for token in _tokens(text + "\n")]


def without_punctuation(tokens: Iterable[str]) -> str:
    """Join the tokens that count for caption scores with spaces; punctuation is dropped."""
    return " ".join(token for token in tokens if token and token not in DROPPED)


def _tokens(text: str) -> Iterable[str]:
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        if match := _SIMPLE_WORD.match(text, at):
            pieces, at = [match[0]], match.end()
        elif match := _NEGATION.match(text, at):
            pieces, at = [match[1], "n't"], match.end()
        elif match := _CLITIC.match(text, at):
            pieces, at = ["'" + match[0][1:]], match.end()
        else:
            match = max((kind.match(text, at) for kind in _KINDS), key=_length)
            piece = match[0] if match else text[at]
            pieces, at = _treebank_form(piece), at + len(piece)
        yield from pieces


def _length(match: re.Match | None) -> int:
    return match.end() if match else -1


@lru_cache(maxsize=65536)
def _treebank_form(piece: str) -> list[str]:
    """Return the tokens, at most two, that the treebank writes for a piece of text."""
    if (cut := _TWO.get(piece.lower())) is not None:
        return [piece[:cut], piece[cut:]]
    if piece[0].isalnum() and len(piece) > 1:
        return [piece.replace(" ", "\u00a0")]  # a token has no space
    if piece in _REWRITTEN:
        return [_REWRITTEN[piece]]
    if re.fullmatch(r"\.{3,5}|(?:\. ){2,4}\.|…", piece):
        return ["..."]
    if re.fullmatch("-{3,4}|[–—―\u0096\u0097]", piece):
        return ["--"]
    if re.fullmatch(f"[{_QUOTES}]+", piece):
        return ["''"]
    if piece[0] in ":;=>" and piece[-1] in "()":  # a face
        return [piece[:-1] + _BRACKETS[piece[-1]]]
    # Letters, digits, and the marks and symbols of the Basic Multilingual Plane; no emoji.
    printed = piece[0].isalnum() or unicodedata.category(piece[0])[0] in "PS"
    return [piece] if printed and ord(piece[0]) < 0x10000 else []
