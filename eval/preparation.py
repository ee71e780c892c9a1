"""What a model gets of a task: token ids, their lengths, and what is learned of them, without its weights.

`data check --model`, plan, train and predict all take it from here, so that what one of them refuses, the
others refuse in the same words.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, Protocol

from llava_keeplora_eval.chat import Asked, Chat, Encoding, question_text, training_answers
from llava_keeplora_eval.chat_text import given_videos
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_recipes import TaskData
from llava_keeplora_recipes.texts import is_blank

log = logging.getLogger(__name__)

#: Examples whose texts are encoded together.
ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Turn(Encoding):
    """An example's conversation as a generative model gets it; see `Encoding`.

    Args:
        row: the example's place in its split.
    """

    row: int


@dataclass(frozen=True)
class Report:
    """What `data check` says of a split and a model.

    Args:
        sizes: how long the examples are for the model, and how much it takes.
        errors: every example that it cannot learn or answer.
        note: which answers have less room than they may take, if any.
    """

    sizes: str
    errors: list[EvalError]
    note: str = ""


class Preparation(Protocol):
    """What a model's processor and configuration make of a split.

    `learn` and `ask` raise EvalError for the first example that cannot be learned or answered and count the
    others; `report` gives all of them.
    """

    def learn(self, data: TaskData) -> Any:
        """Return a split as the model learns it."""

    def ask(self, data: TaskData) -> Any:
        """Return a split as the model is asked."""

    def short_answers(self, questions: Any) -> str:
        """Say in a sentence which questions leave little room for an answer; empty where none does."""

    def report(self, data: TaskData, learns: bool) -> Report:
        """Return everything that is wrong with a split, and how long it is."""

    def show(self, data: TaskData, row: int) -> list[str]:
        """Return an example as the model sees it, in lines."""


def check_answers(data: TaskData, row: int, answers: Sequence[str]) -> None:
    """Refuse an example that a generative model cannot learn from.

    Raises:
        EvalError: it has no answer, or an empty one among those that are learned.
    """
    if not answers or any(map(is_blank, training_answers(data.recipe, answers))):
        what = "an empty answer" if answers else "no answer"
        raise EvalError(
            f"{_place(data, row)} has {what}, so there is nothing to learn from it",
            "complete or remove the record",
        )


def check_questions(preparation: Preparation, data: TaskData) -> Any:
    """Refuse a split that a model cannot answer, before it answers any of it.

    Log which answers have less room than they may take.

    Returns:
        What `Preparation.ask` gives.

    Raises:
        EvalError: see `Preparation`.
    """
    questions = preparation.ask(data)
    if note := preparation.short_answers(questions):
        log.warning("%s (%s): %s", data.recipe.name, data.split, note)
    return questions


def answer_problems(data: TaskData) -> list[EvalError]:
    """Every example that no generative model can learn from, whichever it is; see `check_answers`."""
    problems = []
    for row, answers in enumerate(data.answers):
        try:
            check_answers(data, row, answers)
        except EvalError as error:
            problems.append(error)
    return problems


class ChatPreparation:
    """Chats of a LLaVA model.

    Args:
        processor: a LLaVA processor.
        limit: the most tokens of an example, image tokens included.
        max_new_tokens: where an answer is cut off at the latest.
    """

    def __init__(self, processor, limit: int, max_new_tokens: int = 0):
        self.chat, self.limit, self.max_new_tokens = Chat(processor), limit, max_new_tokens

    def learn(self, data: TaskData) -> list[Turn]:
        """Every answer to learn: of several answers the most frequent one, of several captions each."""
        return _accepted(self._turns(data, True), data)

    def ask(self, data: TaskData) -> list[Turn]:
        """Every question, with room for at least one token of an answer."""
        return _accepted(self._turns(data, False), data)

    def report(self, data: TaskData, learns: bool) -> Report:
        """Everything that `learn`, or else `ask`, refuses, and how long the examples are."""
        items = list(self._turns(data, learns))
        turns = [item for item in items if isinstance(item, Turn)]
        errors = [item for item in items if isinstance(item, EvalError)]
        if not turns:
            return Report(f"tokens: no example that the model takes, {self.limit} at the most", errors)
        longest = max(turns, key=len)
        images = sum(i in self.chat.image_ids for i in longest.prompt)
        answers = f", longest answer {max(len(turn.reply) for turn in turns)}" if learns else ""
        note = "" if learns else self.short_answers(turns)
        return Report(
            f"tokens: longest {len(longest)} of {self.limit}, {images} of them of images{answers}"
            + self._videos(data),
            errors,
            note,
        )

    def _videos(self, data: TaskData) -> str:
        """Say how many videos of a split the model gets as videos, and how many as images."""
        given = [
            given_videos(self.chat.processor, count, videos)
            for count, videos in zip(data.image_counts, data.videos, strict=True)
        ]
        whole, total = sum(map(len, given)), sum(map(len, data.videos))
        parts = [f"{whole} videos as videos"] * bool(whole)
        parts += [f"{total - whole} videos as images"] * bool(total - whole)
        return "".join(f", {part}" for part in parts)

    def short_answers(self, questions: Sequence[Turn]) -> str:
        """Say how many questions leave less room than `max_new_tokens`; nothing where all leave enough."""
        short = [turn for turn in questions if len(turn) + self.max_new_tokens > self.limit]
        if not short:
            return ""
        return (
            f"{len(short)} of {len(questions)} questions leave fewer than {self.max_new_tokens} tokens for "
            "an answer, "
            f"{self.limit - max(map(len, short))} at the least: an answer ends where the model's "
            f"{self.limit} tokens do"
        )

    def show(self, data: TaskData, row: int) -> list[str]:
        """Return an example as the model gets it: its text, decoded from its ids, and the ids.

        The learned part is between ⟦ and ⟧. A run of image tokens is one in the text, and id × count among
        the ids.
        """
        # The first of several captions, although training uses all.
        answer = training_answers(data.recipe, data.answers[row])[0]
        encoding = self.chat.turn(
            question_text(data.recipe, data.questions[row]),
            data.image_sizes[row],
            answer,
            data.histories[row],
            data.videos[row],
            data.image_times[row],
        )
        ids = encoding.prompt + encoding.reply
        bounds = [place for span in encoding.learned_spans for place in span]
        # Decoded from the beginning each time: what a token reads as may depend on those before it.
        texts = [self._decode(self._images_once(ids[:end])) for end in bounds]
        pieces = [
            text[len(before) :] if text.startswith(before) else self._decode(ids[start:end])
            for before, text, start, end in zip(["", *texts], texts, [0, *bounds], bounds)
        ]
        marked = "".join(piece + "⟧⟦"[i % 2 == 0] for i, piece in enumerate(pieces))
        runs = " ".join(
            runs_of(ids[start:end]) if i % 2 == 0 else f"⟦{runs_of(ids[start:end])}⟧"
            for i, (start, end) in enumerate(zip([0, *bounds], bounds))
        )
        return [*marked.split("\n"), f"ids: {runs}"]

    def _images_once(self, ids: list[int]) -> list[int]:
        """Return ids with each run of image tokens as one."""
        return [i for i, run in groupby(ids) for i in ([i] if i in self.chat.image_ids else run)]

    def _decode(self, ids: list[int]) -> str:
        return self.chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _turns(self, data: TaskData, learns: bool) -> Iterator[Turn | EvalError]:
        """Of each example its turns, or why the model cannot take it."""
        examples = self._asked(data, learns)
        while rows := dict(islice(examples, ROWS)):
            wanted = [one for asked in rows.values() if isinstance(asked, list) for one in asked]
            encodings = iter(self.chat.encode(wanted))
            for row, asked in rows.items():
                if isinstance(asked, EvalError):
                    yield asked
                    continue
                made = list(islice(encodings, len(asked)))
                try:
                    with _named(data, row):
                        turns = [_turn(row, encoding) for encoding in made]
                    self._check_length(data, max(turns, key=len), learns)
                except EvalError as error:
                    yield error
                else:
                    yield from turns

    def _asked(self, data: TaskData, learns: bool) -> Iterator[tuple[int, list[Asked] | EvalError]]:
        """Yield each example's questions, one for each answer that is learned, or what is wrong with it."""
        shown = (data.image_sizes, data.histories, data.videos, data.image_times)
        columns = zip(data.questions, data.answers, *shown, strict=True)
        for row, (question, answers, sizes, history, videos, times) in enumerate(columns):
            learned: list[str | None] = [None]
            try:
                if learns:
                    check_answers(data, row, answers)
                    learned = [*training_answers(data.recipe, answers)]
            except EvalError as error:
                yield row, error
                continue
            asked = Asked(
                question=question_text(data.recipe, question),
                sizes=sizes,
                history=history,
                videos=videos,
                times=times,
            )
            yield row, [replace(asked, answer=answer) for answer in learned]

    def _check_length(self, data: TaskData, turn: Turn, learns: bool) -> None:
        needed = len(turn) + (not learns)
        if needed > self.limit:
            raise EvalError(
                f"{_place(data, turn.row)} has {needed} tokens, {len(turn.prompt)} of them before the answer "
                "and image tokens included, "
                f"and the model takes {self.limit}",
                "shorten or remove the record, or raise model.max_length where the model allows it",
            )


def runs_of(ids: Iterable[int]) -> str:
    """Ids in their order, equal neighbours as id × count."""
    runs = [(i, sum(1 for _ in run)) for i, run in groupby(ids)]
    return " ".join(f"{i} × {count}" if count > 1 else str(i) for i, count in runs)


def _turn(row: int, encoding: Encoding | EvalError) -> Turn:
    if isinstance(encoding, EvalError):
        raise encoding
    return Turn(row=row, **vars(encoding))


def _accepted(items: Iterable[Turn | EvalError], data: TaskData) -> list[Turn]:
    """Return the turns if none was refused.

    Raises:
        EvalError: the first refusal, with the number of others.
    """
    items = list(items)
    refused = [item for item in items if isinstance(item, EvalError)]
    if refused:
        more = f" (and {len(refused) - 1} more of {len(data)} examples)" if len(refused) > 1 else ""
        raise EvalError(refused[0].problem + more, refused[0].cure)
    return [item for item in items if not isinstance(item, EvalError)]


@contextmanager
def _named(data: TaskData, row: int) -> Iterator[None]:
    """Name the example in what is refused of its text."""
    try:
        yield
    except EvalError as error:
        raise EvalError(
            f"{_place(data, row)} cannot be shown to the model: {error.problem}", error.cure
        ) from None


def _place(data: TaskData, row: int) -> str:
    return f"record '{data.ids[row]}' of {data.recipe.name} ({data.recipe.splits[data.split]})"
