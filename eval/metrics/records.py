"""What the package knows of a metric: a function and its record.

Two records are enough. An ``AnswerMetric`` has a function of one answer, ``(text, answers) -> score``; the
task's score is the mean. A ``CorpusMetric`` has a function of all of them, ``(predictions, references) ->
(score, details)``, for scores that are no mean over examples, as CIDEr is none.

The rules that hold for every metric of answers: an empty answer is wrong, and an accepted text that is empty
matches nothing. Empty is what holds nothing but white space and zero-width characters; a text of which
nothing is left once an official script has normalised it ("A", "the", ".") is scored as the script scores it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from typing import Any, Literal

from llava_keeplora_eval.answer_forms import finds, plain, short_form
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_recipes.texts import is_blank

Answers = Sequence[str]

#: With more classes only those of the same words are compared with each other.
ALL_PAIRS = 300


def finds_any(text: str, answers: Answers, **inputs: Any) -> float:
    """Return whether an accepted text is found in the prediction, as a lenient reader reads it."""
    return any(finds(text, answer) for answer in answers)


@dataclass(frozen=True)
class MetricRecord:
    """A metric: what all records have; see ``AnswerMetric`` and ``CorpusMetric``.

    Args:
        name: the name that recipes use, and the key of the result.
        version: raised whenever the rule changes, and kept with every score.
        function: the rule.
        summary: the rule in a line, as in "it scores whether the prediction is the option's letter".
        inputs: what the function takes of an example besides its accepted texts, by name: ``question``, or a
            key of the example's ``meta``. ``compute`` takes them in the plural (``questions``), one value per
            example.
        needs: packages that must be installed besides this one.
        citation: the paper or script that the rule comes from.
        to_percent: what scores are multiplied by to be on the 0-100 scale.
    """

    name: str
    version: int
    function: Callable[..., Any]
    summary: str
    inputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    citation: str = ""
    to_percent: float = 100.0

    @property
    def description(self) -> str:
        """The rule in full."""
        return self.function.__doc__ or self.summary

    def check_installed(self) -> None:
        """Refuse a metric that cannot be computed here, so that a long run can ask before it starts.

        Raises:
            EvalError: a package that it needs is not installed.
        """
        for package in self.needs:
            if find_spec(package) is None:
                raise EvalError(
                    f"the metric '{self.name}' needs the package {package}, which is not installed",
                    f"pip install {package}",
                )

    def compute(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> dict:
        """Score a task's predictions.

        Args:
            predictions: one text per example; an empty one is wrong.
            references: the accepted texts of each example.
            inputs: see ``MetricRecord.inputs``.

        Returns:
            The score under the metric's name, and what else the metric tells.

        Raises:
            EvalError: there are no predictions, or other numbers of predictions, references and inputs; or a
                reference is not what the metric compares.
        """
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
        if wrong := set(inputs) ^ {f"{name}s" for name in self.inputs}:
            verb = "takes no" if wrong <= set(inputs) else "needs the"
            raise EvalError(
                f"the metric '{self.name}' {verb} {', '.join(sorted(wrong))} of the examples",
                "give exactly "
                + ", ".join(["predictions", "references", *(f"{name}s" for name in self.inputs)]),
            )
        return self._compute(predictions, references, **inputs)

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> dict:
        raise NotImplementedError

    def unmeetable(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> list[int]:
        """Find the examples that get 0 even if their accepted text is answered to the letter.

        Returns:
            Their positions, ascending; none where the metric cannot tell.
        """
        return []

    def alike(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """Find pairs of classes of which one's name is a right answer for the other, strictly or leniently.

        Returns:
            The pairs; none where the metric cannot tell.
        """
        return []

    @property
    def reason(self) -> str:
        """Why an example of ``unmeetable`` gets 0, as a clause."""
        return f"it scores whether {self.summary}"

    def refuses(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> bool:
        """Return whether ``compute`` refuses one of these references whatever is predicted.

        Raises:
            EvalError: it does, and says why.
        """
        return False

    def _call(self, function: Callable[..., Any], what: str, *values: Any, **inputs: Any) -> Any:
        """Call a function of the metric; what it raises is told in a sentence."""
        try:
            return function(*values, **inputs)
        except EvalError:
            raise
        except Exception as error:  # a metric of somebody else's may raise anything
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
            raise EvalError(
                f"the metric '{self.name}' gave {score!r} for {what}, and a score is a number {limit}",
                "correct the metric, or choose another",
            )
        return number


@dataclass(frozen=True)
class AnswerMetric(MetricRecord):
    """A metric whose function scores one answer; a task's score is the mean over its examples.

    The function takes the predicted text (without white space around it, never empty), the accepted texts
    that it compares (at least one of them not empty) and by name what ``inputs`` lists; it returns a score
    from 0 to 1, or a bool.

    Args:
        lenient: the score of a lenient reader; the higher of both counts, so that lenient is never below
            strict.
        complies: ``(text, answers, known)`` → whether a text has the asked form; see ``answer_forms``.
        soft: whether a score can lie between 0 and 1, so that nothing can be counted as correct.
        compares: which accepted texts are compared: any of them, the first, where an official file has one
            answer, or all of them as votes.
    """

    lenient: Callable[..., float] = finds_any
    complies: Callable[..., bool] = short_form
    soft: bool = False
    compares: Literal["any", "first", "votes"] = "any"

    def accepted(self, answers: Answers) -> Answers:
        """Return the accepted texts that are compared, none if nothing can match because they are empty."""
        answers = answers[:1] if self.compares == "first" else answers
        written = [answer for answer in answers if not is_blank(answer)]
        return answers if written and self.compares == "votes" else written

    def score(self, text: str, answers: Answers, **inputs: Any) -> float:
        """Return the score of one answer, 0 to 1.

        Args:
            text: the prediction.
            answers: all its accepted texts.
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
        """Return the mean score, ``lenient``, ``compliance`` and, unless the metric is soft, ``correct``."""
        known = {plain(answer) for answers in references for answer in answers} - {""}
        strict, lenient, complying = [], [], 0
        for i, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
            text, accepted, given = prediction.strip(), self.accepted(answers), _of_example(inputs, i)
            strict.append(self._score(self.function, text, accepted, accepted, given))
            lenient.append(max(strict[-1], self._score(self.lenient, text, accepted, answers, given)))
            complying += bool(text) and self.complies(text, answers, known)
        count = len(predictions)
        result = {
            self.name: sum(strict) / count,
            "lenient": sum(lenient) / count,
            "compliance": complying / count,
        }
        return result if self.soft else result | {"correct": int(sum(strict))}

    def unmeetable(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> list[int]:
        """See ``MetricRecord.unmeetable``."""
        self.check_installed()

        def is_met(i: int) -> bool:
            given = _of_example(inputs, i)
            try:
                return any(self.score(text, references[i], **given) for text in self.accepted(references[i]))
            except EvalError:  # not what the metric compares, as words where it compares boxes
                return False

        return [i for i in range(len(references)) if not is_met(i)]

    def alike(self, classes: Sequence[str]) -> list[tuple[str, str]]:
        """See ``MetricRecord.alike``.

        A lenient score that finds one name in the other, as "dog" in "hot dog", has to do so in both
        directions.
        """
        if self.inputs:
            return []

        def meets(rule: Callable[..., float], text: str, name: str) -> bool:
            accepted = self.accepted([name, name.replace("_", " ")])
            try:
                return self._score(rule, text, accepted, accepted, {}) > 0
            except EvalError:  # not what the metric compares
                return False

        def merges(one: str, other: str) -> bool:
            strict = meets(self.function, one, other) or meets(self.function, other, one)
            return strict or (meets(self.lenient, one, other) and meets(self.lenient, other, one))

        groups = {"": list(classes)}
        if len(classes) > ALL_PAIRS:
            groups = {}
            for name in classes:
                groups.setdefault(plain(name), []).append(name)
        return [pair for names in groups.values() for pair in combinations(names, 2) if merges(*pair)]

    def refuses(self, references: Sequence[Answers], **inputs: Sequence[Any]) -> bool:
        """See ``MetricRecord.refuses``."""
        self.compute(["?"] * len(references), references, **inputs)
        return False


@dataclass(frozen=True)
class CorpusMetric(MetricRecord):
    """A metric whose function scores all predictions together.

    The function takes the predictions, the references and by name (in the plural) what ``inputs`` lists; it
    returns the score, at least 0, and a dict of further numbers and notes, which may be empty.
    """

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Answers], **inputs: Sequence[Any]
    ) -> dict:
        what = f"{len(predictions)} predictions"
        result = self._call(self.function, what, predictions, references, **inputs)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise EvalError(
                f"the metric '{self.name}' gave {str(result)[:60]!r}, which is no score with a dict of "
                "details",
                "return (score, {}) from its function",
            )
        score, details = result
        return {self.name: self._number(score, what, highest=math.inf), "details": details}


def _of_example(inputs: dict[str, Sequence[Any]], index: int) -> dict[str, Any]:
    """Return one example's inputs, by the singular of their names."""
    return {key.removesuffix("s"): values[index] for key, values in inputs.items()}
