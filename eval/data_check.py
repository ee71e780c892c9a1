"""``llava-keeplora-eval data check``: report a task's data, everything wrong with them, and some examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from llava_keeplora_eval.chat import question_text, training_answers
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.families import load_family_preparation
from llava_keeplora_eval.metrics import metric_record
from llava_keeplora_eval.models import load_preparation
from llava_keeplora_eval.preparation import Preparation, answer_problems, check_answers
from llava_keeplora_eval.references import check_references, metric_of
from llava_keeplora_recipes import (
    Recipe,
    TaskData,
    inspect_split,
    list_sequences,
    load_recipe,
    load_sequence,
)
from llava_keeplora_recipes.errors import UserError
from llava_keeplora_recipes.placeholders import MARKER
from llava_keeplora_recipes.records import Message
from llava_keeplora_recipes.repeats import repeats, shared_images
from llava_keeplora_recipes.strict_yaml import read_mapping
from llava_keeplora_recipes.texts import is_blank

#: The split that is learned and not scored: its answers may have another form, such as reasons before a
#: letter, and lack inputs of the metric.
TRAIN = "train"
#: How many examples of a split are printed as a model sees them.
EXAMPLES = 3

#: (split, row) → an example as lines of text, with the part that a model learns between ⟦ and ⟧.
Show = Callable[[TaskData, int], list[str]]


@dataclass(frozen=True)
class SplitReport:
    """Report of one split.

    Args:
        split: the split's name.
        expected: the recipe's number of examples; None if it doesn't give one.
        data: the examples that can be used; None if nothing can be read.
        errors: everything that keeps the split, or a part of it, from being used.
        warnings: notes on data that can be used but may be wrong.
        sizes: a sentence on how long the examples are for a model; None without one.
    """

    split: str
    expected: int | None
    data: TaskData | None
    errors: list[UserError]
    warnings: list[str]
    sizes: str | None = None

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        expected = "" if self.expected is None else f" of {self.expected} expected"
        lines = [f"{self.split}: {0 if self.data is None else len(self.data)} examples{expected}"]
        if self.data is not None and len(self.data):
            lines += [
                f"  {line}" for line in (_images(self.data), _questions(self.data), _answers(self.data))
            ]
            lines += [f"  {self.sizes}"] if self.sizes else []
        return [*lines, *(f"  warning: {w}" for w in self.warnings), *(f"  error: {e}" for e in self.errors)]


def check(
    name: str,
    data_root: str | Path | None = None,
    split: str | None = None,
    model: str | None = None,
    base: str | None = None,
    family: str | None = None,
) -> Iterator[str]:
    """Check every split of a task, or of every task of a sequence.

    Args:
        name: a recipe's or a sequence's name, or the path of its YAML.
        data_root: folder that holds the data of recipes that need files.
        split: the split to check; all when None.
        model: a CLIP or LLaVA checkpoint for which the examples are prepared as for training; without one,
            they are printed in LLaVA-1.5's format.
        base: the folder of an adapter's base; the one that the adapter names when None.
        family: the family that opens the model, a plug-in's name; by the checkpoint's type when None.

    Yields:
        The report, line by line, as it is made.

    Raises:
        EvalError: at the end, if anything is wrong; or there is no such task, sequence or model.
    """
    preparation = _preparation(model, base, family)
    show = default_format if preparation is None else preparation.show
    problems = 0
    for recipe in recipes_of(name):
        yield f"{recipe.name} v{recipe.version} ({recipe.kind}, {recipe.metric})"
        error = metric_error(recipe)
        if error is not None:
            yield f"  error: {error}"
        reports = list(
            split_reports(recipe, list(recipe.splits) if split is None else [split], data_root, preparation)
        )
        for report in reports:
            yield from (f"  {line}" for line in report.lines())
            for example in examples(report.data, show):
                yield from (f"    {line}" for line in example)
        problems += (error is not None) + sum(len(report.errors) for report in reports)
    if problems:
        raise EvalError(
            f"{name} has {problems} problem{'s' * (problems > 1)}, listed above",
            "correct them and check again",
        )


def _preparation(model: str | None, base: str | None, family: str | None) -> Preparation | None:
    if model is None:
        for option, value in (("--family", family), ("--base", base)):
            if value is not None:
                raise EvalError(
                    f"{option} is '{value}', and no model is given", "name one with --model, or leave it out"
                )
        return None
    return load_preparation(model, base) if family is None else load_family_preparation(family, model, base)


def recipes_of(name: str) -> list[Recipe]:
    """Load the recipe, or the recipes of the sequence, that a name or path stands for."""
    path = Path(name).expanduser()
    in_file = path.suffix in (".yaml", ".yml") and path.is_file() and "tasks" in read_mapping(path)
    if in_file or name in list_sequences():
        return [load_recipe(task) for task in load_sequence(name).tasks]
    return [load_recipe(name)]


def metric_error(recipe: Recipe) -> UserError | None:
    """Return the error of a recipe's metric that cannot be loaded; None if it can."""
    try:
        metric_of(recipe)
    except EvalError as error:
        return error
    return None


def split_reports(
    recipe: Recipe,
    splits: list[str],
    data_root: str | Path | None = None,
    preparation: Preparation | None = None,
) -> Iterator[SplitReport]:
    """Read the splits of a task one after another, and yield a report of each."""
    seen: list[TaskData] = []
    reported: set[str] = set()  # Errors of class prompts, which are the same for every split.
    for split in splits:
        data, data_errors = inspect_split(recipe, split, data_root)
        errors: list[UserError] = list(data_errors)
        sizes = None
        expected = recipe.expected_sizes.get(split)
        warnings = [] if data is None else list(_warnings(data, expected, seen))
        if data is not None:
            seen.append(data)
            if not metric_error(recipe):
                _check_references(data, warnings, errors)
            if preparation is not None:
                report = preparation.report(data, learns=split == TRAIN)
                sizes, errors = (
                    report.sizes,
                    errors + [error for error in report.errors if str(error) not in reported],
                )
                reported |= set(map(str, report.errors))
                warnings += [report.note] if report.note else []
            elif split == TRAIN:
                errors += answer_problems(data)
        yield SplitReport(split, expected, data, errors, warnings, sizes)


def _check_references(data: TaskData, warnings: list[str], errors: list[UserError]) -> None:
    learned_only = data.split == TRAIN
    if learned_only and metric_record(data.recipe.metric).required:
        return
    try:
        warnings += filter(None, [check_references(data)])
    except EvalError as error:
        if learned_only:
            warnings.append(str(error).removesuffix("."))
        else:
            errors.append(error)


def _warnings(data: TaskData, expected: int | None, seen: list[TaskData]) -> Iterator[str]:
    if expected not in (None, len(data)):
        yield f"{len(data)} examples and not {expected}: scores are not comparable with those of others"
    if empty := _empty(data):
        yield f"{empty} examples have an empty answer"
    yield from repeats(data)
    yield from filter(
        None, [data.left_out_note, data.marker_note, *(shared_images(data, other) for other in seen)]
    )


def _images(data: TaskData) -> str:
    counts = data.image_counts
    parts = [f"images: {sum(counts)} shown, {len(set(data.digests))} different"]
    if none := counts.count(0):
        parts.append(f"{none} examples without one")
    if several := sum(n > 1 for n in counts):
        parts.append(f"{several} examples with several")
    if videos := sum(map(len, data.videos)):
        parts.append(
            f"{sum(end - start for spans in data.videos for start, end in spans)} of them frames of "
            f"{videos} videos"
        )
    if redrawn := len(data.decoding_notes):
        parts.append(f"{redrawn} turned upright or laid over the background")
    if data.dropped:
        parts.append(f"{len(data.dropped)} examples left out because one cannot be read")
    return ", ".join(parts)


def _questions(data: TaskData) -> str:
    questions = _asked(data)
    asked = f"questions: {len(set(questions))} different, longest {max(map(len, questions))} characters"
    turns = [len(history) // 2 for history in data.histories]
    systems = sum(len(history) % 2 for history in data.histories)
    if any(turns):
        asked += f", {sum(map(bool, turns))} examples with earlier turns, {max(turns)} at the most"
    return asked + f", {systems} examples with a system message" * bool(systems)


def _answers(data: TaskData) -> str:
    counts = Counter(a for answers in data.answers for a in answers)
    text, count = counts.most_common(1)[0] if counts else ("", 0)
    longest = max(map(len, counts), default=0)
    return (
        f"answers: {len(counts)} different, {_empty(data)} examples with an empty one, longest {longest} "
        "characters, "
        f"most frequent {shorten(text, 40, placeholder=' ...')!r} ({count} of {counts.total()})"
    )


def _empty(data: TaskData) -> int:
    return sum(not answers or any(map(is_blank, answers)) for answers in data.answers)


def _asked(data: TaskData) -> list[str]:
    """Return the question that a generative model is asked on every example."""
    return [question_text(data.recipe, question) for question in data.questions]


def examples(data: TaskData | None, show: Show) -> Iterator[list[str]]:
    """Yield the first, the middle and the last example of a split as a model gets them, as lines of text."""
    count = 0 if data is None else len(data)
    rows = {round(i * (count - 1) / (EXAMPLES - 1)) for i in range(EXAMPLES)} if count else ()
    for index in sorted(rows):
        try:
            lines = show(data, index)
        except EvalError as error:
            lines = [f"not shown: {error}"]
        yield [f"[{data.ids[index]}]", *lines]


def default_format(data: TaskData, row: int) -> list[str]:
    """Return an example in LLaVA-1.5's format without its system prompt, as lines of text.

    Of several captions, each of which is learned, the first is used. Every answer of a conversation is marked
    as learned, as it is in training.
    """
    check_answers(data, row, data.answers[row])
    answer = training_answers(data.recipe, data.answers[row])[0]
    history = [*data.histories[row], Message("user", _asked(data)[row]), Message("assistant", answer)]
    marked = any(MARKER in message.text for message in history)
    before = "" if marked else f"{MARKER}\n" * data.image_counts[row]
    parts = []
    for message in history:
        if message.role == "user":
            parts.append(f"USER: {before}{message.text}")
            before = ""
        else:
            parts.append(f"ASSISTANT: ⟦{message.text}⟧" if message.role == "assistant" else message.text)
    return " ".join(parts).split("\n")
