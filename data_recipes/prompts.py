"""What a model is asked: the source's question in the recipe's words."""

from __future__ import annotations

from collections.abc import Sequence

from .placeholders import place_images
from .recipe import Recipe
from .texts import is_blank

#: In a `test_prompt` that depends on the answer: the prompt for every other answer.
OTHER = "other"


def format_question(
    recipe: Recipe, split: str, question: str | None, answers: Sequence[str], images: int, what: str
) -> str | None:
    """The text to ask for one example; None in classification, where the recipe itself asks.

    Captioning takes the source's instruction, or the recipe's prompt for lack of one. A question of vqa
    goes into the recipe's prompt, in the split `test` into its `test_prompt` where it has one. A
    `test_prompt` may depend on the first reference answer, because official runners do: MLLM-DCL's finance
    task asks for yes or no exactly where the answer is `Yes` or `No`, and for a letter otherwise
    (github.com/bjzhb666/MLLM-CL, ETrain/Eval/LLaVA/CoIN/model_fin.py). Such a prompt tells the model what
    kind of answer is right, so its scores compare only with those of models that were told as well.

    Args:
        recipe, split: of the example.
        question: the source's, with or without markers for its pictures.
        answers: the accepted ones.
        images: how many pictures the example has.
        what: the example, for the error's sentence.

    Raises:
        RecipeError: the text marks another number of pictures; see `place_images`.
    """
    if recipe.kind == "classification":
        return None
    # before the prompt is put around it, so that pictures at its head stay at the head
    question = place_images(question, images, what) if question else None
    question = None if question is None or is_blank(question) else question
    text = _in_prompt(recipe, split, question, answers)
    return place_images(text, images, what) if text else None


def _in_prompt(recipe: Recipe, split: str, question: str | None, answers: Sequence[str]) -> str | None:
    if recipe.kind == "captioning":
        return question or recipe.prompt
    prompt: str | dict[str, str] | None = recipe.prompt
    if split == "test" and recipe.test_prompt is not None:
        prompt = recipe.test_prompt
    if isinstance(prompt, dict):
        prompt = prompt.get(answers[0], prompt[OTHER])
    # replace, not format: a question or a prompt may hold other braces
    return prompt.replace("{q}", question) if prompt and question else question
