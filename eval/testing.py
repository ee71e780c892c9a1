"""Check of the contract of metrics, which third parties can run on theirs: `check_metric`."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics import AnswerMetric, MetricRecord, as_record, load_metric, metric_record
from llava_keeplora_recipes.readers import KINDS

#: References that most metrics accept, and various predictions: right, wrong, longer, empty.
REFERENCES = (["a dog"], ["two cats", "cats"], ["B"], ["3"], ["yes"], ["a red bird on a tree"])
PREDICTIONS = ("a dog", "Two cats.", "", "It is 3", " ", "a bird")


def check_metric(
    metric: str | MetricRecord | Callable[..., float],
    references: Sequence[Sequence[str]] = REFERENCES,
    predictions: Sequence[str] = PREDICTIONS,
    inputs: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Check that a metric keeps the contract.

    The rules: its record is complete; the same inputs give the same score, in any order, and are not changed;
    a score is a finite number in its range, and the result is plain JSON; an empty prediction is wrong and
    stays in the denominator; an accepted text gets points, unless `unmeetable` names its example; and inputs
    that do not fit together are refused with an `EvalError`.

    Args:
        metric: the metric's name as in a recipe, its record, or a function of `(text, answers)`.
        references: accepted texts of at least two examples.
        predictions: one text per example.
        inputs: the metric's other inputs, by the plural of their names, one value per example.

    Raises:
        AssertionError: the metric breaks a rule, which the message names.
    """
    record = metric_record(metric) if isinstance(metric, str) else as_record(metric)
    inputs = dict(inputs or {})
    _check_record(record)
    _check_result(record, references, predictions, inputs)
    _check_order(record, references, predictions, inputs)
    _check_empty(record, references, inputs)
    _check_to_the_letter(record, references, inputs)
    _check_refusals(record, references, predictions, inputs)
    if isinstance(metric, str):
        given = {"predictions": list(predictions), "references": [list(texts) for texts in references]}
        assert load_metric(metric).compute(**given, **inputs) == record.compute(**given, **inputs), (
            f"the evaluate.Metric of '{record.name}' gives another result than its record"
        )


def _check_record(record: MetricRecord) -> None:
    what = f"the metric '{record.name}'"
    assert isinstance(record.name, str) and record.name.isidentifier(), (
        f"{what} needs a name of letters and digits"
    )
    assert isinstance(record.version, int) and record.version >= 1, (
        f"the version of {what} must be at least 1"
    )
    assert record.summary.strip() and "\n" not in record.summary, f"the summary of {what} must be one line"
    assert all(name.isidentifier() for name in (*record.required, *record.optional)), (
        f"the inputs of {what} must be a tuple of names"
    )
    assert record.kinds and set(record.kinds) <= set(KINDS), f"the kinds of {what} must be some of {KINDS}"
    assert len(set(record.inputs)) == len(record.inputs), f"{what} lists an input twice"
    assert record.description.strip() and callable(record.function), (
        f"{what} needs a function with a docstring"
    )
    record.check_installed()


def _check_result(record: MetricRecord, references: Any, predictions: Any, inputs: dict[str, Any]) -> None:
    before = copy.deepcopy((references, predictions, inputs))
    results = [record.compute(predictions, references, **inputs) for _ in range(2)]
    assert results[0] == results[1], f"'{record.name}' gives two results for the same predictions"
    assert before == (references, predictions, inputs), f"'{record.name}' changes what it is given"
    assert json.loads(json.dumps(results[0])) == results[0], (
        f"the result of '{record.name}' is not plain JSON"
    )
    shares = [record.name, *(key for key in ("lenient", "compliance") if key in results[0])]
    for key in shares:
        assert isinstance(results[0][key], float), f"'{record.name}' gives {results[0][key]!r} as its {key}"
        assert math.isfinite(results[0][key]) and results[0][key] >= 0, (
            f"the {key} of '{record.name}' is out of range"
        )
    if isinstance(record, AnswerMetric):
        assert all(results[0][key] <= 1 for key in shares), f"a share of '{record.name}' is above 1"
        assert results[0]["lenient"] >= results[0][record.name], (
            f"'{record.name}' is stricter when read leniently"
        )
        _check_units(record, references, predictions, inputs, results[0][record.name])


def _check_units(
    record: AnswerMetric, references: Any, predictions: Any, inputs: dict[str, Any], score: float
) -> None:
    """Check that the score is the weighted mean of its units, each of which scores alike when it is alone."""
    units = record.unit_scores(predictions, references, **inputs)
    assert sorted(i for unit in units.members for i in unit) == list(range(len(references))), (
        f"the units of '{record.name}' do not have every example once"
    )
    assert math.isclose(sum(units.weights), 1, abs_tol=1e-9), (
        f"the weights of the units of '{record.name}' don't sum to 1"
    )
    alone = [
        record.compute(
            [predictions[i] for i in unit],
            [references[i] for i in unit],
            **{key: [values[i] for i in unit] for key, values in inputs.items()},
        )[record.name]
        for unit in units.members
    ]
    mean = sum(weight * single for weight, single in zip(units.weights, alone, strict=True))
    assert math.isclose(mean, score, abs_tol=1e-9) and math.isclose(units.mean, score, abs_tol=1e-9), (
        f"'{record.name}' scores an answer otherwise among others than alone"
    )
    assert record.soft or set(alone) <= {0.0, 1.0}, (
        f"'{record.name}' gives parts of a point: it needs soft=True"
    )


def _check_order(record: MetricRecord, references: Any, predictions: Any, inputs: dict[str, Any]) -> None:
    forward = record.compute(predictions, references, **inputs)[record.name]
    reverse = {key: values[::-1] for key, values in inputs.items()}
    backward = record.compute(predictions[::-1], references[::-1], **reverse)[record.name]
    assert math.isclose(forward, backward, rel_tol=1e-9, abs_tol=1e-12), (
        f"'{record.name}' depends on the order"
    )


def _check_empty(record: MetricRecord, references: Any, inputs: dict[str, Any]) -> None:
    for text in ("", " \n"):
        result = record.compute([text] * len(references), references, **inputs)
        assert result[record.name] == 0, f"'{record.name}' gives points to an empty prediction"
        assert result.get("compliance", 0) == 0, (
            f"'{record.name}' finds that an empty prediction has the asked form"
        )


def _check_to_the_letter(record: MetricRecord, references: Any, inputs: dict[str, Any]) -> None:
    unmeetable = record.unmeetable(references, **inputs)
    assert unmeetable == sorted(set(unmeetable)) and set(unmeetable) <= set(range(len(references))), (
        f"'{record.name}' names {unmeetable} as the positions of examples that cannot score"
    )
    assert len(unmeetable) < len(references), f"'{record.name}' can give points to none of the references"
    result = record.compute([texts[0] for texts in references], references, **inputs)
    assert result[record.name] > 0, f"'{record.name}' gives no points to the accepted texts themselves"


def _check_refusals(record: MetricRecord, references: Any, predictions: Any, inputs: dict[str, Any]) -> None:
    nothing: dict[str, list[Any]] = {key: [] for key in inputs}
    _check_refused(f"'{record.name}' without predictions", lambda: record.compute([], [], **nothing))
    _check_refused(
        f"'{record.name}' with fewer references",
        lambda: record.compute(predictions, references[1:], **inputs),
    )
    unknown = {"unknown_inputs": list(predictions)}
    _check_refused(
        f"'{record.name}' with an unknown input",
        lambda: record.compute(predictions, references, **inputs, **unknown),
    )
    for key in (f"{name}s" for name in record.required):
        fewer = {name: values for name, values in inputs.items() if name != key}
        _check_refused(
            f"'{record.name}' without {key}",
            lambda fewer=fewer: record.compute(predictions, references, **fewer),
        )


def _check_refused(what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except EvalError as error:
        assert len(str(error).splitlines()) == 1, f"{what} is refused in more than one sentence"
        return
    raise AssertionError(f"{what} is not refused with an EvalError")
