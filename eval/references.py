"""The accepted texts and inputs of a metric, and the check that accepted texts themselves get points."""

from __future__ import annotations

from collections.abc import Sequence

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.metrics import MetricRecord, metric_record
from llava_keeplora_eval.predictions import first_ids
from llava_keeplora_recipes import Recipe, TaskData
from llava_keeplora_recipes.texts import is_blank


def metric_of(recipe: Recipe, metric: str | None = None) -> MetricRecord:
    """Return the record of the metric that scores a task.

    Args:
        recipe: the task.
        metric: another metric than the recipe's.

    Raises:
        EvalError: there is no such metric, or it does not score tasks of this kind.
    """
    record = metric_record(metric or recipe.metric)
    record.check_kind(recipe.kind, recipe.name)
    return record


def accepted_texts(data: TaskData) -> list[list[str]]:
    """Return the accepted texts of every example, without decoding an image."""
    if data.recipe.kind == "classification":
        # A generative model learns class names with spaces, see `Recipe.vlm_prompt`.
        names = (data.recipe.classes[label] for label in data.labels)
        return [[name, name.replace("_", " ")] for name in names]
    return data.answers


def metric_inputs(data: TaskData, record: MetricRecord) -> dict[str, list[str]]:
    """Return the inputs of a metric besides texts, by the plural of their names; see ``MetricRecord.inputs``.

    Optional inputs that no example has are left out; one that has none has the value None.

    Raises:
        EvalError: an example lacks a required input.
    """
    result = {}
    for name in (*record.required, *record.optional):
        values = data.questions if name == "question" else [row.get(name) for row in data.meta]
        if name in record.optional:
            if any(value is not None for value in values):
                result[f"{name}s"] = values
            continue
        result[f"{name}s"] = values
        lacking = [key for key, value in zip(data.ids, values) if value is None]
        if lacking:
            raise EvalError(
                f"the metric '{record.name}' needs the {name} of every example, and {first_ids(lacking)} of "
                f"{data.recipe.name} ({data.split}) have none",
                "list the field under 'meta' in the recipe's source, or choose another metric",
            )
    return result


def unmeetable(metric: str, references: Sequence[Sequence[str]], **inputs: Sequence[str]) -> list[int]:
    """Find the examples for which a metric gives 0 even to their accepted texts.

    Args:
        metric: a metric's name.
        references: the accepted texts of each example.
        inputs: the metric's other inputs, as for its ``compute``.

    Returns:
        The positions of these examples, ascending.

    Raises:
        EvalError: there is no such metric.
    """
    return metric_record(metric).unmeetable(references, **inputs)


def check_references(data: TaskData, metric: str | None = None) -> str | None:
    """Return a warning of examples that cannot get points, and of classes that the metric confuses.

    Args:
        data: the task and split.
        metric: another metric than the recipe's.

    Returns:
        A sentence with their number, share and the first of them; None if there are none.

    Raises:
        EvalError: no example can get points, scoring would refuse one of them, or the data lack an input of
            the metric.
    """
    record = metric_of(data.recipe, metric)
    notes = filter(None, (_check_met(data, record), _check_classes(data, record)))
    return "; ".join(notes) or None


def _check_met(data: TaskData, record: MetricRecord) -> str | None:
    """Return a warning of the examples that get 0 whatever is answered; see ``check_references``."""
    references, inputs = accepted_texts(data), metric_inputs(data, record)
    positions = record.unmeetable(references, **inputs)
    if not positions:
        return None
    given = {key: [values[i] for i in positions] for key, values in inputs.items()}
    refused = record.refuses([references[i] for i in positions], **given)
    empty = [i for i in positions if all(map(is_blank, references[i]))]
    other = [i for i in positions if i not in set(empty)]
    causes = [
        (empty, "because their accepted text is empty", "complete or remove these records"),
        (
            other,
            "even if their accepted text is answered to the letter",
            f"{record.reason}: write the answers so, or choose another metric",
        ),
    ]
    notes = [(_zeros(data, record, rows, references, why), cure) for rows, why, cure in causes if rows]
    if len(positions) == len(data) or refused:
        raise EvalError(", and ".join(problem for problem, _ in notes), "; ".join(cure for _, cure in notes))
    return "; ".join(f"{problem}; {cure}" for problem, cure in notes)


def _zeros(
    data: TaskData, record: MetricRecord, rows: list[int], references: list[list[str]], why: str
) -> str:
    """Return a clause on how many examples get 0 for one reason, with the first of them."""
    first = ", ".join(f"{data.ids[i]}: {_shortened(references[i])}" for i in rows[:3])
    return (
        f"{len(rows)} of {len(data)} examples of {data.recipe.name} ({data.split}), "
        f"{100 * len(rows) / len(data):.1f} %, "
        f"get 0 from the metric '{record.name}' {why} ({first}{', ...' if len(rows) > 3 else ''})"
    )


def _check_classes(data: TaskData, record: MetricRecord) -> str | None:
    """Return a warning of classes that the metric, or its lenient score, takes for each other."""
    pairs = record.alike(data.recipe.classes) if data.recipe.kind == "classification" else []
    if not pairs:
        return None
    first = ", ".join(f"{name!r} = {other!r}" for name, other in pairs[:3])
    return (
        f"the metric '{record.name}' or its lenient score takes {len(pairs)} pairs of classes of "
        f"{data.recipe.name} for one and the "
        f"same ({first}{', ...' if len(pairs) > 3 else ''}); join them into one class, name them apart, or "
        "read the strict score alone"
    )


def _shortened(texts: Sequence[str]) -> str:
    quoted = [repr(text if len(text) <= 40 else text[:40] + "...") for text in dict.fromkeys(texts)]
    return " or ".join(quoted[:2]) + (" or ..." if len(quoted) > 2 else "") if quoted else "none"
