"""Class prompts as a model of two encoders gets them: token ids, their lengths, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from llava_keeplora_eval.encoders import CLIP, Encoders, find_encoders
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.preparation import Report, runs_of

if TYPE_CHECKING:
    from torch import Tensor

    from llava_keeplora_recipes import Recipe, TaskData

#: Characters of a text that an error shows.
SHOWN = 80

#: Tokens that stand where a text begins or ends, by the tokenizers' names.
FRAME = ("bos_token", "eos_token", "cls_token", "sep_token")


class PromptPreparation:
    """Class prompts of a model of two encoders; see `preparation.Preparation`.

    Args:
        processor: its processor, or its tokenizer.
        limit: the most tokens of a prompt, where the tokenizer doesn't know it.
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
            config: of transformers.
            encoders: the record of the model's type; the one that its configuration names when None.
        """
        encoders = encoders or find_encoders(config)
        return cls(processor, encoders.max_tokens(config), encoders)

    @property
    def padding(self) -> dict[str, Any]:
        """The arguments by which the tokenizer pads as the model wants it."""
        return _padding(self.tokenizer, self.limit, self.encoders)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the text encoder takes of texts, each (texts, tokens); see `tokenize_prompts`."""
        return tokenize_prompts(self.tokenizer, texts, self.limit, self.encoders)

    def ask(self, data: TaskData) -> dict[str, Tensor]:
        """The task's class prompts.

        Raises:
            EvalError: the task is no classification, or a prompt is too long.
        """
        check_kind(data.recipe)
        return self.tokens(data.recipe.prompts)

    #: What is learned are the same prompts.
    learn = ask

    def short_answers(self, questions: Any) -> str:
        """Nothing: a class is named whole or not at all."""
        return ""

    def report(self, data: TaskData, learns: bool) -> Report:
        """What `ask` refuses, and how many prompts there are and how long."""
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
        """The prompt of an example's class as the model gets it, its padding left out, and its ids."""
        prompt = data.recipe.prompts[data.labels[row]]
        text = self.tokenizer.decode(_unpadded(self.tokenizer, [prompt])[0], skip_special_tokens=False)
        return [f"⟦{text}⟧", f"ids: ⟦{runs_of(self.tokens([prompt])['input_ids'][0].tolist())}⟧"]


def check_kind(recipe: Recipe) -> None:
    """Refuse a task that a model of two encoders cannot answer.

    Raises:
        EvalError: it is no classification.
    """
    if recipe.kind != "classification":
        raise EvalError(
            f"task '{recipe.name}' is {recipe.kind}, and CLIP does classification only",
            "leave the task out, or take a LLaVA model",
        )


def tokenize_prompts(
    processor, prompts: Sequence[str], limit: int | None = None, encoders: Encoders = CLIP
) -> dict[str, Tensor]:
    """Tokenise prompts, padded as the model wants it, and refuse those that it would see cut short.

    Args:
        processor: of a model of two encoders, or its tokenizer.
        prompts: the texts.
        limit: the most tokens that the text model takes, when the tokenizer doesn't know it.
        encoders: the record of the model's type.

    Returns:
        ``input_ids``, and what else of the record's `text_inputs` the tokenizer gives, each (prompts,
        tokens). SigLIP's tokenizers give no attention mask: its text encoder attends to padding.

    Raises:
        EvalError: no prompts, or one that is too long or holds the token of a text's beginning or end.
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
    """Refuse a prompt that holds a token of a text's beginning or end; CLIP's feature is the first end's.

    Raises:
        EvalError: naming the prompt and the token.
    """
    frame = [token for name in FRAME if (token := getattr(tokenizer, name, None))]
    for prompt in prompts:
        if special := next((token for token in frame if token in prompt), None):
            raise EvalError(
                f"the prompt {_quoted(prompt)} holds {special}, which is a special token of the model",
                "take it out of the prompt or the class name",
            )


def _quoted(text: str) -> str:
    """A text in quotes, its beginning and its length where it is long."""
    return f"'{text}'" if len(text) <= SHOWN else f"'{text[:SHOWN]}...' ({len(text)} characters)"
