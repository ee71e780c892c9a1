"""What a model is asked: the recipe's words around the source's question."""

import pytest

from llava_keeplora_recipes import RecipeError, load_recipe, load_split


@pytest.fixture
def asked(tmp_path, make):
    """The questions of both splits, for two records with these answers and these keys in the recipe."""

    def read(answers=("Yes", "B"), kind="vqa", text="Rise?", **changes):
        rows = [{"question_id": i, "text": text, "answer": a} for i, a in enumerate(answers)]
        make.json(tmp_path / "q" / "q.json", rows)
        facts = make.facts(
            kind=kind,
            classes=None,
            source={"format": "llava_json", "path": "q"},
            **{"prompt": None} | changes,
        )
        recipe = load_recipe(
            make.yaml(tmp_path / "q.yaml", **facts | {"splits": {"train": "q.json", "test": "q.json"}})
        )
        return load_split(recipe, "train").questions, load_split(recipe, "test").questions

    return read


def test_a_prompt_goes_around_the_question_in_every_split(asked):
    assert asked(prompt="{q}\nBe {brief}.") == (["Rise?\nBe {brief}."] * 2,) * 2


def test_a_test_prompt_takes_its_place_in_the_test_split_alone(asked):
    assert asked(test_prompt="{q} Briefly.") == (["Rise?"] * 2, ["Rise? Briefly."] * 2)
    assert asked(prompt="Q: {q}", test_prompt="{q} Briefly.") == (["Q: Rise?"] * 2, ["Rise? Briefly."] * 2)


def test_a_test_prompt_may_depend_on_the_answer(asked):
    prompt = {"Yes": "{q} Yes or no?", "No": "{q} Yes or no?", "other": "{q} Which letter?"}
    _, test = asked(answers=["Yes", "No", "yes", "B"], test_prompt=prompt)
    assert test == ["Rise? Yes or no?"] * 2 + ["Rise? Which letter?"] * 2


def test_a_caption_is_asked_for_by_the_record_or_else_by_the_recipe(asked):
    assert asked(kind="captioning", text="Describe it.", prompt="Say it.")[0] == ["Describe it."] * 2
    assert asked(kind="captioning", text="", prompt="Say it.")[0] == ["Say it."] * 2


def test_an_example_with_nothing_to_ask_is_refused(asked):
    for kind in ("captioning", "vqa"):
        with pytest.raises(
            RecipeError,
            match="^'0' in pets/train has nothing to ask .and 1 more.*; write a question in every",
        ):
            asked(kind=kind, text="")


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({"Yes": "{q}"}, "q.yaml has a 'test_prompt' by answer without 'other'; add 'other:' with the prompt for every other answer."),
        ({"other": "Go."}, "q.yaml has the test_prompt 'Go.', which has no place for the question; write {q} where the question goes"),
        ({True: "{q}", "other": "{q}"}, "q.yaml has the answer True under 'test_prompt', which YAML does not read as text; put quotes"),
        (3, "q.yaml has 3 under 'test_prompt', which is not text or a mapping; "),
    ],
)  # fmt: skip
def test_a_test_prompt_that_cannot_work_is_refused(asked, prompt, sentence):
    with pytest.raises(RecipeError) as caught:
        asked(test_prompt=prompt)
    assert str(caught.value).startswith(sentence)


def test_a_test_prompt_is_for_questions_alone(asked):
    with pytest.raises(
        RecipeError, match="^q.yaml has 'test_prompt', which a captioning recipe does not use; remove it"
    ):
        asked(kind="captioning", test_prompt="{q}")


def test_a_test_prompt_is_part_of_what_a_recipe_is(tmp_path, make):
    facts = make.facts(kind="vqa", prompt=None, classes=None, source={"format": "llava_json", "path": "q"})
    plain = load_recipe(make.yaml(tmp_path / "q.yaml", **facts)).fingerprint
    assert (
        load_recipe(make.yaml(tmp_path / "q.yaml", **facts, test_prompt="{q} Briefly.")).fingerprint != plain
    )
