"""Reader of answer files: LLaVA's, lines of JSON, a JSON list of records, or a JSON object by id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.predictions import SOURCE, check_source, first_ids, maker_path
from llava_keeplora_recipes import TaskData
from llava_keeplora_recipes.strict_json import decode_text, parse_json
from llava_keeplora_recipes.texts import is_blank

#: Values of `--from`, which is detected by default: LLaVA's answers (lines with `question_id` and `text`),
#: any lines of JSON, one JSON value.
FORMS = ("llava", "jsonl", "json")
#: Keys of an example's id. Those of the second group count only in records without one of the first.
ID_KEYS = (("id", "question_id", "questionId"), ("image_id", "index"))
#: Keys of the answer. In a record with one of the first group, `answer` is the reference; `text` may always
#: be the question.
TEXT_KEYS = (("prediction", "response"), ("text", "answer", "caption"))
#: Most characters of an answer; a longer one means a damaged file.
LONGEST = 1_000_000
#: The cures of a file that lacks answers: one that `predict` began, and one from elsewhere.
AGAIN = "run the same `predict` command again to fill them in"
WHOLE = "write one record with 'id' and 'text' for every example"


def read_answers(path: str | Path, data: TaskData, form: str | None = None) -> dict[str, str]:
    """Read the answers to every example of a split.

    Ids and answers may be text or whole numbers; UTF-8, UTF-16, a byte order mark, any line end and blank
    lines are accepted. Lines that `predict` wrote are also checked against the data.

    Args:
        path: the file.
        data: the task and split that it answers.
        form: one of ``FORMS``; detected when None.

    Returns:
        id → text, in the order of the data.

    Raises:
        EvalError: the file isn't readable, a record isn't an answer, was made for other data or leaves a
            doubt about which of its values is the answer, or ids are missing, unknown or repeated.
    """
    path = Path(path)
    if not path.is_file():
        raise EvalError(f"{path} is not a file of answers", "give the path of a JSON or JSONL file")
    try:
        text = decode_text(path.read_bytes())
    except ValueError as error:
        raise EvalError(f"{path} {error}", "save it as UTF-8") from None
    by_predict = maker_path(path).is_file()  # `predict` began the file, and can complete it
    if is_blank(text):
        raise EvalError(f"{path} is empty", AGAIN if by_predict else WHOLE)
    answers, predicted = [], by_predict
    for number, (where, value) in enumerate(_values(path, text, form), start=1):
        if isinstance(value, dict) and value.keys() >= SOURCE:
            check_source(path, number, value, data)
            predicted = True
        answers.append(_answer(where, value, form))
    _check_ids(path, [key for key, _ in answers], data, predicted)
    texts = dict(answers)
    return {key: texts[key] for key in data.ids}


def _values(path: Path, text: str, form: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place in the file, record) for each record; those of an object by id are (id, text) pairs."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if form in ("llava", "jsonl") or (form is None and _is_lines(lines)):
        for number, line in lines:
            yield f"line {number} of {path}", _parse(f"line {number} of {path}", line)
        return
    content = _parse(str(path), text)
    if isinstance(content, list):
        for number, value in enumerate(content, start=1):
            yield f"record {number} of {path}", value
    elif isinstance(content, dict) and not _names(content, ID_KEYS[0]):
        for key, value in content.items():
            yield f"the answer to '{_short(key)}' in {path}", (key, value)
    else:
        yield str(path), content


def _is_lines(lines: list[tuple[int, str]]) -> bool:
    """Return whether every line is a record, rather than a part of one list or object."""
    starts = [line.lstrip()[0] for _, line in lines[:2]]
    if starts[:1] == ["["] or len(lines) == 1:
        return False
    if starts[1:] == ["{"] or not lines:  # after a damaged first line too
        return True
    try:
        parse_json(lines[0][1])
    except ValueError:
        return False
    return True


def _parse(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        if '":' in text or text.lstrip()[:1] in ("{", "["):
            cure = (
                "correct it, or if `predict` was stopped while it wrote the file, run the same command again"
            )
        else:
            cure = (
                "write JSON or lines of JSON, one record with 'id' and 'text' for every example; "
                "tables (CSV) are not read"
            )
        raise EvalError(f"{where} {error}", cure) from None


def _answer(where: str, value: Any, form: str | None) -> tuple[str, str]:
    """Return the id and the text of a record or an (id, text) pair.

    Raises:
        EvalError: the record lacks one of them, or it has the wrong type.
    """
    if isinstance(value, tuple):
        key, text = value
    elif isinstance(value, dict):
        if form == "llava":
            names = ("question_id", "text")
        else:
            names = (_id_key(where, value), _text_key(where, value))
        for name in names:
            if name not in value:
                raise EvalError(
                    f"{where} has no '{name}', which LLaVA's answers have", "leave out '--from llava'"
                )
        key, text = (value[name] for name in names)
    else:
        raise EvalError(
            f"{where} is {_kind(value)}, and an answer is a record with its id",
            "write one object with 'id' and 'text' per example",
        )
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise EvalError(f"{where} has {_kind(key)} as its id", "write the id as text or as a whole number")
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise EvalError(
            f"{where} has {_kind(text)} as its answer", "write the answer as text, empty if there is none"
        )
    if len(str(text)) > LONGEST:
        raise EvalError(
            f"{where} has an answer of {len(str(text))} characters, and at most {LONGEST} are read",
            "shorten the answer",
        )
    return str(key), str(text)


def _id_key(where: str, record: dict) -> str:
    for group in ID_KEYS:
        names = _names(record, group)
        if len({str(record[name]) for name in names}) > 1:
            raise EvalError(
                f"{where} has different ids under {_listed(names)}",
                "leave one of them, or read 'question_id' with '--from llava'",
            )
        if names:
            return names[0]
    raise EvalError(
        f"{where} has no id, but {_listed(list(record)) or 'no key at all'}",
        f"write the example's id under one of {_listed([name for group in ID_KEYS for name in group])}",
    )


def _text_key(where: str, record: dict) -> str:
    outputs, others = (_names(record, group) for group in TEXT_KEYS)
    if outputs:
        others = [name for name in others if name != "answer"]
    names = outputs + others
    if len(names) == 1:
        return names[0]
    if names:
        raise EvalError(
            f"{where} has {_listed(names)}, and which of them is the model's answer is in doubt",
            "leave it alone under 'text', or read 'text' with '--from llava'",
        )
    raise EvalError(
        f"{where} has no answer, but {_listed(list(record))}",
        f"write the answer under one of {_listed([name for group in TEXT_KEYS for name in group])}",
    )


def _names(record: dict, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name in record]


def _listed(names: list[str], limit: int = 8) -> str:
    return ", ".join(f"'{_short(name)}'" for name in names[:limit]) + (", ..." if len(names) > limit else "")


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."


def _kind(value: Any) -> str:
    """Return what a value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"{'a text' if isinstance(value, str) else 'a number'} ({_short(str(value))})"


def _check_ids(path: Path, ids: list[str], data: TaskData, predicted: bool) -> None:
    """Refuse repeated, missing and unknown ids in one sentence, with the number and the first of each."""
    name = f"{data.recipe.name} ({data.split})"
    counts, expected = Counter(ids), set(data.ids)
    repeated = [key for key, count in counts.items() if count > 1]
    missing = [key for key in data.ids if key not in counts]
    unknown = [key for key in counts if key not in expected]
    problems = [f"has more than one prediction for {first_ids(repeated)}"] if repeated else []
    problems += [f"lacks {first_ids(missing)} of the {len(data)} of {name}"] if missing else []
    problems += [f"has predictions for {first_ids(unknown)} that {name} doesn't have"] if unknown else []
    if problems:
        *others, last = problems
        raise EvalError(
            f"{path} {''.join(f'{problem}, ' for problem in others)}{'and ' if others else ''}{last}",
            _cure(repeated, missing, unknown, predicted, not ids),
        )


def _cure(
    repeated: list[str], missing: list[str], unknown: list[str], predicted: bool, is_empty: bool
) -> str:
    """Return the cure of wrong ids; `predicted` is whether `predict` wrote them."""
    if missing and unknown:
        number = {key.lstrip("0"): key for key in missing if key.isdecimal()}
        other = next((key for key in unknown if key.isdecimal() and key.lstrip("0") in number), None)
        if other is not None:
            return (
                f"write the ids as text with their leading zeros, '{number[other.lstrip('0')]}' for {other}"
            )
        return "check the task, the split and the ids"
    if unknown:
        return "check the task, the split and the data root, or remove them"
    if repeated:
        return "remove all but one of each" + (", and add those that are missing" if missing else "")
    if predicted:
        return AGAIN
    return WHOLE if is_empty else "add them, with an empty text where there is no answer"
