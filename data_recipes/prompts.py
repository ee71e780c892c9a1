"""Questions to a model: the source's question in the recipe's prompt."""

from __future__ import annotations

from collections.abc import Sequence

from .placeholders import place_in_turns
from .recipe import Recipe
from .records import History, replace_questions
from .texts import is_blank

#: In a `test_prompt` that depends on the answer: the prompt for every other answer.
OTHER = "other"


def format_question(
    recipe: Recipe, split: str, question: str | None, answers: Sequence[str], images: int, what: str
) -> str | None:
    """Return the text to ask for one example without earlier turns; see `format_turns`."""
    return format_turns(recipe, split, (), question, answers, images, what)[1]


def format_turns(
    recipe: Recipe,
    split: str,
    history: History,
    question: str | None,
    answers: Sequence[str],
    images: int,
    what: str,
) -> tuple[History, str | None]:
    """Return the turns before an example's question, and the question, in the recipe's prompts.

    For classification the question is None, as the recipe has one for all examples. For captioning it is the
    source's instruction, else the recipe's prompt. For vqa the question is put into the recipe's prompt, in
    the split `test` into its `test_prompt` if it has one; so is every earlier question of a conversation. A
    `test_prompt` may depend on the first reference answer, as in official runners: MLLM-DCL's finance task
    asks for yes or no exactly if the answer is `Yes` or `No`, and for a letter otherwise
    (github.com/bjzhb666/MLLM-CL, ETrain/Eval/LLaVA/CoIN/model_fin.py). Such a prompt gives away the form of
    the right answer, so its scores compare only with those of models that had the same prompt.

    Args:
        recipe, split: recipe and split of the example.
        history: the source's turns before the question.
        question: the source's question, with or without markers for its images.
        answers: the accepted answers.
        images: how many images the example has.
        what: the example, for errors.

    Raises:
        RecipeError: the numbers of markers and images differ; see `place_in_turns`.
    """
    if recipe.kind == "classification":
        return (), None
    asked = [m.text for m in history if m.role == "user"] + [question or ""]
    replies = [[m.text] for m in history if m.role == "assistant"] + [list(answers)]
    # Before they are put into the prompt, so that images at the beginning stay at the beginning.
    asked = place_in_turns(asked, images, what)
    asked = [
        _in_prompt(recipe, split, None if is_blank(text) else text, reply) or ""
        for text, reply in zip(asked, replies, strict=True)
    ]
    *earlier, last = place_in_turns(asked, images, what)
    return replace_questions(history, earlier), last or None


def _in_prompt(recipe: Recipe, split: str, question: str | None, answers: Sequence[str]) -> str | None:
    if recipe.kind == "captioning":
        return question or recipe.prompt
    prompt: str | dict[str, str] | None = recipe.prompt
    if split == "test" and recipe.test_prompt is not None:
        prompt = recipe.test_prompt
    if isinstance(prompt, dict):
        prompt = prompt.get(answers[0], prompt[OTHER])
    # `replace` rather than `format`, because a question or a prompt may have other braces.
    return prompt.replace("{q}", question) if prompt and question else question
