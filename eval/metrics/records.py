"""Records of metrics: a function with its name, version, inputs and source.

There are two kinds. An ``AnswerMetric`` has a function of one answer, ``(text, answers) -> score``; a task's
score is the mean. A ``CorpusMetric`` has a function of all answers, ``(predictions, references) -> (score,
details)``, for scores that are no means over examples, such as CIDEr.

For every metric of answers, an empty answer is wrong, and an empty accepted text matches nothing. A text is
empty if it has nothing but white space and zero-width characters; a text that an official script normalises
to nothing ("A", "the", ".") is scored as the script does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from typing import Any, Literal

from llava_keeplora_eval.answer_forms import finds, short_form, words_only
from llava_keeplora_eval.error_classes import count_classes, error_class
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics.units import Answered, Grouping, UnitScores
from llava_keeplora_recipes.readers import KINDS
from llava_keeplora_recipes.texts import is_blank

Answers = Sequence[str]

#: Kind of tasks → a metric for it.
FOR_EXAMPLE = {"classification": "accuracy", "vqa": "exact_match", "captioning": "caption_cider"}

#: Most classes of which all pairs are compared; of more, only those with the same words are.
ALL_PAIRS = 300


class ScoreRangeError(EvalError):
    """A metric gave a score that is none: a fault of the metric, whatever the accepted texts are."""


def finds_any(text: str, answers: Answers, **inputs: Any) -> float:
    """Return whether an accepted text is found in the prediction, as a lenient reader reads it."""
    return any(finds(text, answer) for answer in answers)


@dataclass(frozen=True)
class MetricRecord:
    """Record of a metric, the base of ``AnswerMetric`` and ``CorpusMetric``.

    Args:
        name: the name that recipes use, and the key of the result.
        version: a number that is raised whenever the rule changes, and recorded with every score.
        function: the rule.
        summary: the rule in one line, as the end of "it scores whether ...".
        inputs: names of the function's inputs besides the accepted texts: ``question``, or a key of the
            example's ``meta``. ``compute`` takes them in the plural (``questions``), one value per example.
        needs: packages that must be installed.
        citation: the paper or script that the rule comes from.
        to_percent: factor that brings scores to the 0-100 scale.
    """

    name: str
    version: int
    function: Callable[..., Any]
    summary: str
    inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    citation: str = ""
    to_percent: float = 100.0
    kinds: tuple[str, ...] = KINDS

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the inputs that ``compute`` needs for every example."""
        return self.inputs

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of the inputs that ``compute`` uses where the examples have them."""
        return ()

    @property
    def description(self) -> str:
        """The rule in full, the function's docstring."""
        return self.function.__doc__ or self.summary

    def check_installed(self) -> None:
        """Check before a long run that the metric can be computed on this machine.

        Raises:
            EvalError: a package that it needs is not installed.
        """
        for package in self.needs:
            if find_spec(package) is None:
                raise EvalError(
                    f"the metric '{self.name}' needs the package {package}, which is not installed",
                    f"pip install {package}",
                )

    def check_kind(self, kind: str, task: str) -> None:
        """Refuse a task whose references the metric does not score.

        Args:
            kind: the kind of the task.
            task: its name, for the error's sentence.

        Raises:
            EvalError: it is none of ``kinds``.
        """
        if kind not in self.kinds:
            raise EvalError(
                f"the metric '{self.name}' scores tasks of the kind {' or '.join(self.kinds)}, and '{task}' "
                f"is of the kind {kind}",
                f"choose a metric for {kind}, for instance {FOR_EXAMPLE.get(kind, 'one of your own')}",
            )

    def compute(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> dict:
        """Score a task's predictions.

        Args:
            predictions: one text per example; an empty one is wrong.
            references: the accepted texts of each example.
            inputs: those of ``required`` and ``optional``, by the plural of their names.

        Returns:
            The score under the metric's name, and the metric's other results.

        Raises:
            EvalError: there are no predictions, or different numbers of predictions, references and inputs;
                or a reference has not the form that the metric compares.
        """
        self._check_given(predictions, references, inputs)
        return self._compute(predictions, references, **inputs)

    def _check_given(
        self,
        predictions: Sequence[str],
        references: Sequence[Answers],
        inputs: Mapping[str, Sequence[Any]],
    ) -> None:
        if not len(predictions):
            raise EvalError(
                f"the metric '{self.name}' has no predictions to score", "check the split and the data"
            )
        lengths = {"references": len(references)} | {key: len(values) for key, values in inputs.items()}
        for key, length in lengths.items():
            if length != len(predictions):
                raise EvalError(
                    f"the metric '{self.name}' has {len(predictions)} predictions and {length} {key}",
                    "give one of each per example",
                )
        needed = {f"{name}s" for name in self.required}
        known = needed | {f"{name}s" for name in self.optional}
        if wrong := (set(inputs) - known) | (needed - set(inputs)):
            verb = "takes no" if wrong <= set(inputs) else "needs the"
            raise EvalError(
                f"the metric '{self.name}' {verb} {', '.join(sorted(wrong))} of the examples",
                "give exactly "
                + ", ".join(["predictions", "references", *(f"{name}s" for name in self.required)]),
            )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> dict:
        raise NotImplementedError

    def example_scores(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> list[float] | None:
        """Return the score of every single answer in percent; None if answers have none.

        Their mean is the task's score where each answer is a unit, see ``unit_scores``.
        """
        return None

    def units(self, count: int, **inputs: Sequence[Any]) -> list[list[int]]:
        """Return the examples that are scored together, without their predictions.

        Args:
            count: the number of examples.
            inputs: as for ``compute``.

        Returns:
            The positions of the examples of each unit; one unit per example unless the metric groups them.

        Raises:
            EvalError: see ``Grouping.members``.
        """
        return [[i] for i in range(count)]

    def unit_scores(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> UnitScores | None:
        """Score each unit; see ``compute`` for the arguments.

        Returns:
            The units' scores, of which the metric's score is the weighted mean; None if it is no such mean,
            as that of a ``CorpusMetric``, which has to be computed anew for any other set of examples.
        """
        return None

    def unmeetable(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> list[int]:
        """Find the examples that get 0 even for their accepted texts.

        Returns:
            Their positions, ascending; empty if the metric does not determine them.
        """
        return []

    def alike(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """Find pairs of classes of which one's name is a right answer for the other, strictly or leniently.

        Returns:
            The pairs; empty if the metric does not determine them.
        """
        return []

    @property
    def reason(self) -> str:
        """The reason why an example of ``unmeetable`` gets 0, as a clause."""
        return f"it scores whether {self.summary}"

    def refuses(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> bool:
        """Return whether ``compute`` refuses one of these references whatever is predicted.

        Raises:
            EvalError: it does, with its reason.
        """
        return False

    def _call(self, function: Callable[..., Any], what: str, *values: Any, **inputs: Any) -> Any:
        """Call a function of the metric, and turn its exceptions into a one-sentence EvalError."""
        try:
            return function(*values, **inputs)
        except EvalError:
            raise
        except Exception as error:  # A plug-in may raise anything.
            raise EvalError(
                f"the metric '{self.name}' failed on {what} ({type(error).__name__}: {error})",
                "correct the metric (`--debug` shows where it failed), or choose another",
            ) from error

    def _number(self, score: Any, what: str, highest: float) -> float:
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= highest:
            limit = f"from 0 to {highest:g}" if math.isfinite(highest) else "of at least 0"
            raise ScoreRangeError(
                f"the metric '{self.name}' gave {score!r} for {what}, and a score is a number {limit}",
                "correct the metric, or choose another",
            )
        return number


@dataclass(frozen=True)
class AnswerMetric(MetricRecord):
    """A metric whose function scores one answer; a task's score is the mean over its examples.

    The function takes the predicted text (without white space around it, never empty), the accepted texts
    that it compares (at least one of them not empty) and, by name, the ``inputs``; it returns a score from 0
    to 1, or a bool.

    Args:
        lenient: the function of a lenient reader; the lenient score is the larger of both, so that it is
            never below the strict one.
        complies: function ``(text, answers, known)`` that returns whether a text has the requested form; see
            ``answer_forms``.
        soft: whether scores can be between 0 and 1, so that there is no number of correct answers.
        compares: the accepted texts that are compared: any of them, the first (for official files with one
            answer), or all of them as votes.
        grouping: how answers are scored together; None if every example is scored by itself. The score is
            then the mean over units, and there is no number of correct answers.
        by: names of inputs that examples may have, such as a category, by which ``details`` are split.
        details: function of ``Answered`` that returns a dict of further numbers and notes.
    """

    lenient: Callable[..., float] = finds_any
    complies: Callable[..., bool] = short_form
    soft: bool = False
    compares: Literal["any", "first", "votes"] = "any"
    grouping: Grouping | None = None
    by: tuple[str, ...] = ()
    details: Callable[[Answered], dict[str, Any]] | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """See ``MetricRecord.required``."""
        grouped = self.grouping.inputs if self.grouping else ()
        return tuple(dict.fromkeys((*self.inputs, *grouped)))

    @property
    def optional(self) -> tuple[str, ...]:
        """See ``MetricRecord.optional``."""
        return tuple(name for name in self.by if name not in self.required)

    def accepted(self, answers: Answers) -> Answers:
        """Return the accepted texts that are compared; empty if all of them are blank."""
        answers = answers[:1] if self.compares == "first" else answers
        nonblank = [answer for answer in answers if not is_blank(answer)]
        return answers if nonblank and self.compares == "votes" else nonblank

    def score(self, text: str, answers: Answers, **inputs: Any) -> float:
        """Return the score of one answer, 0 to 1.

        Args:
            text: the prediction.
            answers: all accepted texts of its example.
            inputs: see ``MetricRecord.inputs``.
        """
        return self._score(
            self.function, text.strip(), self.accepted(answers), self.accepted(answers), inputs
        )

    def _score(
        self,
        rule: Callable[..., float],
        text: str,
        accepted: Answers,
        answers: Answers,
        inputs: dict[str, Any],
    ) -> float:
        if is_blank(text) or not accepted:
            return 0.0
        what = f"the prediction {text[:40]!r}"
        return self._number(self._call(rule, what, text, answers, **inputs), what, highest=1)

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> dict:
        """Return the score, ``lenient``, ``compliance``, ``errors`` and ``details``; see ``AnswerMetric``.

        The errors are the answers with the score 0, counted by class; see ``error_classes``. The number of
        ``correct`` answers comes with metrics that are neither soft nor grouped.
        """
        known = {words_only(answer) for answers in references for answer in answers} - {""}
        strict, lenient, complying, errors = [], [], 0, []
        for i, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
            text, accepted, given = prediction.strip(), self.accepted(answers), self._of_example(inputs, i)
            strict.append(self._score(self.function, text, accepted, accepted, given))
            lenient.append(max(strict[-1], self._score(self.lenient, text, accepted, answers, given)))
            complying += bool(text) and self.complies(text, answers, known)
            if not strict[-1]:
                errors.append(error_class(text, answers, accepted, known, lenient[-1] > 0))
        units = self._in_units(strict, inputs)
        result: dict[str, Any] = {
            self.name: units.mean,
            "lenient": self._in_units(lenient, inputs).mean,
            "compliance": complying / len(predictions),
            "errors": count_classes(errors),
        }
        if not self.soft and self.grouping is None:
            result["correct"] = int(sum(strict))
        if self.details is not None:
            answered = Answered([text.strip() for text in predictions], references, inputs, strict, units)
            result["details"] = self._call(self.details, f"{len(predictions)} predictions", answered)
        return result

    def units(self, count: int, **inputs: Sequence[Any]) -> list[list[int]]:
        """See ``MetricRecord.units``."""
        return self.grouping.members(inputs, self.name) if self.grouping else super().units(count, **inputs)

    def unit_scores(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> UnitScores:
        """See ``MetricRecord.unit_scores``."""
        self._check_given(predictions, references, inputs)
        return self._in_units(self._scores(predictions, references, inputs), inputs)

    def _scores(
        self,
        predictions: Sequence[str],
        references: Sequence[Answers],
        inputs: Mapping[str, Sequence[Any]],
    ) -> list[float]:
        """Return the score of every answer, 0 to 1."""
        pairs = enumerate(zip(predictions, references, strict=True))
        return [self.score(text, answers, **self._of_example(inputs, i)) for i, (text, answers) in pairs]

    def _in_units(self, scores: list[float], inputs: Mapping[str, Sequence[Any]]) -> UnitScores:
        members = self.units(len(scores), **inputs)
        if self.grouping is None:
            return UnitScores(members, scores, [1 / len(scores)] * len(scores))
        combined = [self.grouping.combine([scores[i] for i in unit]) for unit in members]
        return UnitScores(members, combined, self.grouping.weights(members, inputs))

    def _of_example(self, inputs: Mapping[str, Sequence[Any]], index: int) -> dict[str, Any]:
        """Return one example's inputs of the function, by name."""
        return {name: inputs[f"{name}s"][index] for name in self.inputs}

    def example_scores(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> list[float]:
        """See ``MetricRecord.example_scores``."""
        return [score * self.to_percent for score in self._scores(predictions, references, inputs)]

    def unmeetable(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> list[int]:
        """See ``MetricRecord.unmeetable``."""
        self.check_installed()
        self.units(len(references), **inputs)  # refuses units that lack examples before a long run

        def is_met(i: int) -> bool:
            given = self._of_example(inputs, i)
            try:
                return any(self.score(text, references[i], **given) for text in self.accepted(references[i]))
            except ScoreRangeError:
                raise
            except EvalError:  # not in the form that the metric compares, as words where it compares boxes
                return False

        return [i for i in range(len(references)) if not is_met(i)]

    def alike(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """See ``MetricRecord.alike``.

        A lenient score counts only if it accepts each name for the other, so "dog" and "hot dog" are no pair.
        """
        if self.required:
            return []

        def meets(rule: Callable[..., float], text: str, name: str) -> bool:
            accepted = self.accepted([name, name.replace("_", " ")])
            try:
                return self._score(rule, text, accepted, accepted, {}) > 0
            except ScoreRangeError:
                raise
            except EvalError:  # not in the form that the metric compares
                return False

        def merges(name: str, other: str) -> bool:
            strict = meets(self.function, name, other) or meets(self.function, other, name)
            return strict or (meets(self.lenient, name, other) and meets(self.lenient, other, name))

        groups = {"": list(classes)}
        if len(classes) > ALL_PAIRS:
            groups = {}
            for name in classes:
                groups.setdefault(words_only(name), []).append(name)
        return [pair for names in groups.values() for pair in combinations(names, 2) if merges(*pair)]

    def refuses(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> bool:
        """See ``MetricRecord.refuses``."""
        for i, answers in enumerate(references):
            self.score("?", answers, **self._of_example(inputs, i))
        return False
