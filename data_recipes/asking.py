"""What a model is asked: the source's question in the recipe's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Recipe

#: In a `test_prompt` that depends on the answer: the prompt for every other answer.
OTHER = "other"


def asked(recipe: Recipe, split: str, question: str | None, answers: Sequence[str]) -> str | None:
    """The text to ask for one example; None in classification, where the recipe itself asks.

    Captioning takes the source's instruction, or the recipe's prompt for lack of one. A question of vqa
    goes into the recipe's prompt, in the split `test` into its `test_prompt` where it has one. A
    `test_prompt` may depend on the first reference answer, because official runners do: MLLM-DCL's finance
    task asks for yes or no exactly where the answer is `Yes` or `No`, and for a letter otherwise
    (github.com/bjzhb666/MLLM-CL, ETrain/Eval/LLaVA/CoIN/model_fin.py). Such a prompt tells the model what kind
    of answer is right, so its scores compare only with those of models that were told as well.
    """
    if recipe.kind == "classification":
        return None
    if recipe.kind == "captioning":
        return question or recipe.prompt
    prompt = recipe.prompt
    if split == "test" and recipe.test_prompt is not None:
        prompt = recipe.test_prompt
    if isinstance(prompt, dict):
        prompt = prompt.get(answers[0], prompt[OTHER])
    # replace, not format: a question or a prompt may hold other braces
    return prompt.replace("{q}", question) if prompt and question else question
