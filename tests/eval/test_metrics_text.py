"""VQA's normalisation and what a lenient reader finds in an answer."""

import pytest

from llava_keeplora_eval import answer_forms, vqa_text


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A dog", "dog"),
        ("the\nred\tcar ", "red car"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table's mistake
        ("shes", "shes"),  # "she's" is in the table only as itself
        ("red/blue", "red blue"),  # no space beside the mark: it becomes one
        ("red/ blue", "red blue"),  # a space beside it: it goes
        ("red /blue/green", "red bluegreen"),  # a space beside one of its kind removes all of it
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("1,000 black-white", "1000 blackwhite"),  # a comma between digits makes every mark go
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("v1.", "v1"),
        ("it's", "it's"),
        ("10:30", "10:30"),
        ("a.b" * 40, "ab" * 32 + "a.b" * 8),  # 32 periods at most
    ],
)
def test_the_official_normalisation_by_hand(text, normal):
    assert vqa_text.vqa_normal(text) == normal


def test_evalai_removes_commas_first_and_cuts_off_the_possessive():
    assert vqa_text.evalai_normal("The dog's, maybe?") == "dog 's maybe"
    assert vqa_text.evalai_normal("red,blue") == "redblue"
    assert vqa_text.vqa_normal("red,blue") == "red blue"


def test_every_contraction_is_its_form_without_one_apostrophe():
    table = dict(vqa_text.CONTRACTIONS)
    assert table.pop("somebody'd") == "somebodyd"
    for spelt, form in table.items():
        assert len(spelt) == len(form) - 1 and spelt.replace("'", "") == form.replace("'", ""), spelt
    assert {"yall'd've", "y'alld've", "y'all'dve", "twas", "ow's'at", "oclock", "weve"} <= table.keys()
    # Other words must not be taken for contractions.
    assert not {"shed", "well", "were", "wed", "its", "lets", "ill", "shell", "hell", "id"} & table.keys()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B) a dog", "B"),
        ("C. An apple", "C"),
        ("The answer is B.", "B"),
        ("the correct option is (c)", "C"),
        ("Answer: D", "D"),
        ("It must be B, I think", "B"),
        ("The picture (A) is brighter", "A"),
        ("A dog", None),  # an article
        ("B or C", None),
        ("a cat", None),
        ("", None),
    ],
)
def test_the_option_that_an_answer_names(text, letter):
    assert answer_forms.find_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("3.50", 3.5),
        ("1,234 people", 1234),
        ("-2", -2),
        (".5", 0.5),
        ("There are three dogs.", 3),
        ("3 dogs, that is three", 3),
        ("between 3-4", None),
        ("two or 5", None),
        ("B2", None),
        ("no idea", None),
    ],
)
def test_the_one_number_in_an_answer(text, number):
    assert answer_forms.find_number(text) == number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("No, yes is wrong", "no"),
        ("I say yes", "yes"),
        ("say yes or no", None),
        ("maybe", None),
    ],
)
def test_the_yes_or_no_of_an_answer(text, found):
    assert answer_forms.find_yes_no(text) == found


@pytest.mark.parametrize(
    ("text", "accepted", "found"),
    [
        ("It is a red_bird!", "red bird", True),
        ("RED-BIRD", "red bird", True),
        ("catalog", "cat", False),  # whole words
        ("the cats", "cat", False),
        ("an unknown thing", "no", False),
        ("no dog", "no", True),
        ("it's", "its", True),
        ("two dogs", "2 dogs", True),
        ("a", "the", False),
        ("the", "the", True),  # nothing is left without the article, so it stays
        ("anything", "?", False),
        ("option B", "b", True),
        ("It shows 3 cats", "three", True),
        ("three", "3", True),
    ],
)
def test_what_a_lenient_reader_finds(text, accepted, found):
    assert answer_forms.finds(text, accepted) is found


@pytest.mark.parametrize(
    ("form", "text", "answers", "complies"),
    [
        ("letter_form", "B", ["B"], True),
        ("letter_form", "B.", ["B"], False),
        ("number_form", "1,000", ["3"], True),
        ("number_form", "three", ["3"], False),
        ("number_form", ".", ["3"], False),
        ("yes_no_form", "YES", ["no"], True),
        ("yes_no_form", "yes it is", ["no"], False),
        ("choice_form", "no", ["Yes"], True),
        ("choice_form", "B", ["Yes"], False),
        ("choice_form", "B", ["A"], True),
        ("short_form", "a red bird", ["dog"], True),
        ("short_form", "a red bird.", ["dog"], False),
        ("short_form", "bird\nand more", ["dog"], False),
        ("short_form", "this is what I think it is", ["dog"], False),
        ("short_form", "this is what I think it is", ["a phrase that has itself seven words"], True),
        ("short_form", "10:30 at 3.5 km", ["dog"], True),
        ("short_form", "St. Paul", ["St. Paul"], True),
        ("short_form", "dog", ["B"], False),  # an option was asked for
        ("box_form", "[0.1, 0.25, .5, 1]", [], True),
        ("box_form", "0.1, 0.2, 0.5, 1", [], False),
        ("known_form", "Red-bird", ["dog"], True),
        ("known_form", "bird", ["dog"], False),
    ],
)
def test_whether_an_answer_has_the_asked_form(form, text, answers, complies):
    assert getattr(answer_forms, form)(text, answers, {"red bird", "dog"}) is complies
