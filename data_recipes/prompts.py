"""What a model is asked: the source's question in the recipe's words."""

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
    """Return the turns before an example's question, and the question, in the recipe's words.

    None is asked in classification, where the recipe itself asks. Captioning takes the source's instruction,
    or the recipe's prompt for lack of one. A question of vqa goes into the recipe's prompt, in the split
    `test` into its `test_prompt` where it has one; so does every earlier question of a conversation. A
    `test_prompt` may depend on the first reference answer, because official runners do: MLLM-DCL's finance
    task asks for yes or no exactly where the answer is `Yes` or `No`, and for a letter otherwise
    (github.com/bjzhb666/MLLM-CL, ETrain/Eval/LLaVA/CoIN/model_fin.py). Such a prompt tells the model what
    kind of answer is right, so its scores compare only with those of models that were told as well.

    Args:
        recipe, split: of the example.
        history: what stands before the question, as the source has it.
        question: the source's, with or without markers for its pictures.
        answers: the accepted ones.
        images: how many pictures the example has.
        what: the example, for the error's sentence.

    Raises:
        RecipeError: the texts mark another number of pictures; see `place_in_turns`.
    """
    if recipe.kind == "classification":
        return (), None
    asked = [m.text for m in history if m.role == "user"] + [question or ""]
    replies = [[m.text] for m in history if m.role == "assistant"] + [list(answers)]
    # before the prompt is put around them, so that pictures at the head stay at the head
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
    # replace, not format: a question or a prompt may hold other braces
    return prompt.replace("{q}", question) if prompt and question else question
