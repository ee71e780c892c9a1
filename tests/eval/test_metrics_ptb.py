"""The tokenizer without Java: worked examples, and agreement with the one of Stanford where there is Java."""

import pytest

from llava_keeplora_eval import java, ptb

WORKED = [
    ("A dog runs.", "a dog runs"),
    ("It's a man's dog, isn't it?", "it 's a man 's dog is n't it"),
    ("They can't, won't and cannot go", "they ca n't wo n't and can not go"),
    ("don’t it’s we’ll", "do n't it 's we 'll"),
    ("I'd've said you're wrong, I'm sure", "i 'd 've said you 're wrong i 'm sure"),
    ("the dogs' bowl", "the dogs bowl"),
    ("She said \"hello\" and 'bye'", "she said hello and bye"),
    ("“curly” ‘quotes’ «here»", "curly quotes here"),
    ("a (small) dog [sic] {x}", "a -lrb- small -rrb- dog -lsb- sic -rsb- -lcb- x -rcb-"),
    ("a well-known t-shirt, half-eaten", "a well-known t-shirt half-eaten"),
    ("a long-haired man's dog", "a long-haired man 's dog"),
    ("one - two -- three --- four – five — six", "one two three four five six"),
    ("wait... what… . . . now", "wait what now"),
    ("Wow!! What?! No!", "wow !! what ?! no"),  # runs of marks are not in the list of dropped tokens
    ("3 dogs, 1,000 birds at 5:55 and 3.5 km", "3 dogs 1,000 birds at 5:55 and 3.5 km"),
    ("the 2nd p-40 and a 3d tv", "the 2nd p-40 and a 3d tv"),
    ("on 1/2/2014 half, 1/2 full", "on 1/2/2014 half 1/2 full"),
    ("black/white and/or grey", "black/white and/or grey"),
    ("the 1980's and the '80s", "the 1980 's and the '80s"),
    ("$5 and 50% for #1 & more", "$ 5 and 50 % for # 1 & more"),
    ("£5 or €6", "# 5 or $ 6"),
    ("at 5 p.m. in the U.S. on Main St. with Dr. Who", "at 5 p.m. in the u.s. on main st. with dr. who"),
    ("vitamin c. and plan b. The end, and a.", "vitamin c. and plan b the end and a"),
    ("p. 5 and no. 7, she said no. Mass. but no mass.", "p. 5 and no. 7 she said no mass. but no mass"),
    ("a dog.The cat!Then one", "a dog.the cat!then one"),  # a space is missing
    ("1 1/2 cups of m²", "1\u00a01/2 cups of m ²"),
    ("we're gonna c'mon, 'tis Hawai'i", "we 're gon na c'mon 't is hawai'i"),
    ("smile :) or :-(", "smile :-rrb- or :--lrb-"),
    ("rock 'n' roll, y'all, five o'clock at O'Brien", "rock 'n' roll y' all five o'clock at o'brien"),
    ("red,white;blue:green", "red white blue green"),
    ("see www.example.com now", "see www.example.com now"),
    ("colour of the theatre", "colour of the theatre"),  # British spelling stays
    ("ein Café in Zürich", "ein café in zürich"),
    ("20° ☃ 😀 end", "20 ° ☃ end"),  # emoji lie outside the plane that the tokenizer knows
    ("AT&amp;T", "at&t"),
    ("an <unk> word", "an <unk> word"),
    ("snake_case", "snake_case"),
    ("...", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "tokens"), WORKED)
def test_captions_are_split_as_in_the_treebank(text, tokens):
    assert ptb.without_punctuation(ptb.tokenize(text)) == tokens


def test_punctuation_counts_as_tokens_until_it_is_dropped():
    assert ptb.tokenize("Hi, (you).") == ["hi", ",", "-lrb-", "you", "-rrb-", "."]


def test_every_token_of_plain_words_is_the_word_itself():
    words = [chr(a) + chr(b) * 3 for a in range(97, 123) for b in range(97, 123)]
    assert ptb.tokenize(" ".join(words)) == words


ODD = [
    "'",
    "''''",
    "--",
    "&",
    "&amp;",
    "a'",
    "'a",
    "n't",
    "'s",
    "\\",
    "/",
    "<",
    "<a",
    "@",
    "#",
    "$",
    "\u200b",
    "٣",
    "中文",
    "&lt;",
    ":(",
    "<<",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_end_and_hold_no_space(text):
    assert all(token and " " not in token for token in ptb.tokenize(text))


@pytest.mark.skipif(java.find_jar(java.TOKENIZER) is None, reason="no Java, or no tokenizer jar")
def test_both_tokenizers_agree_on_all_worked_examples():
    texts = [text for text, _ in WORKED if text]
    texts += [f"A man with {text} on the table" for text in texts]
    # A caption behind each, because the last period of one can depend on the next.
    lines = [line for text in texts for line in (text, "The end.")]
    stanford = [
        ptb.without_punctuation(line.split(" "))
        for line in java.tokenize(java.find_jar(java.TOKENIZER), lines)[::2]
    ]
    assert [ptb.without_punctuation(ptb.tokenize(text)) for text in texts] == stanford
