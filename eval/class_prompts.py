"""Class prompts as inputs of a model of two encoders: token ids, their lengths, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from llava_keeplora_eval.encoders import CLIP, Encoders, find_encoders
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.preparation import Report, runs_of
from llava_keeplora_recipes import Recipe, TaskData

if TYPE_CHECKING:
    from torch import Tensor

#: Most characters of a prompt that an error quotes.
MAX_QUOTED = 80

#: Names of the tokenizers' tokens for the beginning and end of a text.
FRAME = ("bos_token", "eos_token", "cls_token", "sep_token")


class PromptPreparation:
    """Class prompts of a model of two encoders; see `preparation.Preparation`.

    Args:
        processor: the model's processor, or its tokenizer.
        limit: the most tokens of a prompt, if the tokenizer doesn't know it.
        encoders: the record of the model's type.
    """

    def __init__(self, processor, limit: int | None = None, encoders: Encoders = CLIP):
        self.tokenizer, self.limit = getattr(processor, "tokenizer", processor), limit
        self.encoders = encoders

    @classmethod
    def of(cls, processor, config, encoders: Encoders | None = None) -> Self:
        """Return the preparation of a model by its configuration.

        Args:
            processor: the model's processor, or its tokenizer.
            config: the model's configuration, of transformers.
            encoders: the record of the model's type; if None, that of the configuration's type.
        """
        encoders = encoders or find_encoders(config)
        return cls(processor, encoders.max_tokens(config), encoders)

    @property
    def padding(self) -> dict[str, Any]:
        """Arguments of the tokenizer for the model's padding."""
        return _padding(self.tokenizer, self.limit, self.encoders)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return the text encoder's inputs for texts, each (texts, tokens); see `tokenize_prompts`."""
        return tokenize_prompts(self.tokenizer, texts, self.limit, self.encoders)

    def ask(self, data: TaskData) -> dict[str, Tensor]:
        """Return the inputs for the task's class prompts; see `tokens`.

        Raises:
            EvalError: the task is no classification, or a prompt is too long.
        """
        check_kind(data.recipe)
        return self.tokens(data.recipe.prompts)

    #: Training uses the same prompts.
    learn = ask

    def short_answers(self, questions: Any) -> str:
        """Return an empty note: the length of answers is not limited, as a class's name is not generated."""
        return ""

    def report(self, data: TaskData, learns: bool) -> Report:
        """Report the refusal by `ask`, or the number of prompts and their greatest length."""
        try:
            self.ask(data)
        except EvalError as error:
            return Report("class prompts: none that the model takes", [error])
        lengths = list(map(len, _unpadded(self.tokenizer, data.recipe.prompts)))
        limit = _most_tokens(self.tokenizer, self.limit)
        padded = f", each padded to {limit}" if self.encoders.padding == "max_length" else ""
        sizes = f"class prompts: {len(lengths)}, longest {max(lengths)} of {limit} tokens{padded}"
        return Report(sizes, [])

    def show(self, data: TaskData, row: int) -> list[str]:
        """Return the prompt of an example's class as the model gets it, without padding, and its ids."""
        prompt = data.recipe.prompts[data.labels[row]]
        text = self.tokenizer.decode(_unpadded(self.tokenizer, [prompt])[0], skip_special_tokens=False)
        return [f"⟦{text}⟧", f"ids: ⟦{runs_of(self.tokens([prompt])['input_ids'][0].tolist())}⟧"]


def check_kind(recipe: Recipe) -> None:
    """Check that a model of two encoders can answer a task.

    Raises:
        EvalError: the task is no classification.
    """
    if recipe.kind != "classification":
        raise EvalError(
            f"task '{recipe.name}' is {recipe.kind}, and CLIP does classification only",
            "leave the task out, or take a LLaVA model",
        )


def tokenize_prompts(
    processor, prompts: Sequence[str], limit: int | None = None, encoders: Encoders = CLIP
) -> dict[str, Tensor]:
    """Tokenise prompts with the model's padding, and refuse those that would be truncated.

    Args:
        processor: the processor of a model of two encoders, or its tokenizer.
        prompts: the texts.
        limit: the most tokens of a prompt, if the tokenizer doesn't know it.
        encoders: the record of the model's type.

    Returns:
        ``input_ids``, and those of the record's other `text_inputs` that the tokenizer returns, each
        (prompts, tokens). SigLIP's tokenizers return no attention mask: its text encoder attends to padding.

    Raises:
        EvalError: no prompts, or one that is too long or contains the token of a text's beginning or end.
    """
    if not prompts:
        raise EvalError(
            "there are no prompts to tokenise", "give the recipe at least one class with a prompt"
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    _refuse_frame_tokens(tokenizer, prompts)
    longest = _most_tokens(tokenizer, limit)
    # Truncation would be silent, and two class names that differ at the end would become one.
    lengths = list(map(len, _unpadded(tokenizer, prompts)))
    if count := sum(length > longest for length in lengths):
        worst = max(range(len(lengths)), key=lengths.__getitem__)
        more = f" (and {count - 1} more of {len(prompts)} prompts are too long)" if count > 1 else ""
        raise EvalError(
            f"the prompt {_quoted(prompts[worst])} has {lengths[worst]} tokens and the model takes "
            f"{longest}{more}",
            "shorten the recipe's prompt or the class name",
        )
    padding = _padding(tokenizer, limit, encoders)
    tokens = tokenizer(list(prompts), truncation=False, return_tensors="pt", verbose=False, **padding)
    return {key: tokens[key] for key in encoders.text_inputs if key in tokens}


def _most_tokens(tokenizer, limit: int | None) -> int:
    return min(tokenizer.model_max_length, tokenizer.model_max_length if limit is None else limit)


def _padding(tokenizer, limit: int | None, encoders: Encoders) -> dict[str, Any]:
    if encoders.padding == "longest":
        return {"padding": True}
    return {"padding": encoders.padding, "max_length": _most_tokens(tokenizer, limit)}


def _unpadded(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(prompts), padding=False, truncation=False, verbose=False)["input_ids"]


def _refuse_frame_tokens(tokenizer, prompts: Sequence[str]) -> None:
    """Refuse prompts with a token of a text's beginning or end: CLIP takes its feature at the first end.

    Raises:
        EvalError: a prompt has such a token.
    """
    frame = [token for name in FRAME if (token := getattr(tokenizer, name, None))]
    for prompt in prompts:
        if special := next((token for token in frame if token in prompt), None):
            raise EvalError(
                f"the prompt {_quoted(prompt)} holds {special}, which is a special token of the model",
                "take it out of the prompt or the class name",
            )


def _quoted(text: str) -> str:
    """Return a text in quotes; of one with more than `MAX_QUOTED` characters, its beginning and length."""
    return f"'{text}'" if len(text) <= MAX_QUOTED else f"'{text[:MAX_QUOTED]}...' ({len(text)} characters)"
