"""Answers that are in another file than the questions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from .coco import captions_by_image
from .errors import RecipeError, collect_errors, report_error
from .json_files import read_json
from .paths import data_root_of, inside, set_folder
from .recipe import Recipe
from .texts import answer_texts, identifier

log = logging.getLogger(__name__)

#: Function (position of a record in its file, its name for errors) → its answers.
References = Callable[[int, str], list[str]]


def read_references(
    recipe: Recipe,
    split: str,
    data_root: str | Path | None,
    rows: list[Any],
    problems: list[RecipeError] | None = None,
) -> References | None:
    """Read the answers in the file that `source.references` names for a split; None if it names none.

    Three layouts are supported:

    - COCO's captions, where the image ids 1, 2, ... count the records of the question file, as UCIT's
      `val_coco_type_3000.json` does (github.com/Ghy0501/HiDe-LLaVA, llava/eval/eval_caption.py);
    - TextVQA's annotations, `data` with `question_id` and `answers` (textvqa.org/dataset);
    - Video-ChatGPT's answers, a list of `question_id` and `answer`, as ActivityNet-QA and CL-VISTA have them
      (github.com/mbzuai-oryx/Video-ChatGPT, quantitative_evaluation).

    Raises:
        RecipeError: the file is missing or has another layout; the returned function raises it for a record
            without an answer.
    """
    name = recipe.source.get("references", {}).get(split)
    if name is None:
        return None
    what = f"'source.references' of recipe '{recipe.name}'"
    path = inside(set_folder(recipe, data_root), name, what, data_root_of(recipe, data_root))
    content = read_json(path, dict | list)
    if isinstance(content, list):
        answers = _by_question(content, path, rows, problems, "answer")
    elif "annotations" in content:
        answers = _by_position(content, path, rows, problems)
    elif isinstance(content.get("data"), list):
        answers = _by_question(content["data"], path, rows, problems)
    else:
        raise RecipeError(
            f"{path.name} holds neither COCO's captions nor TextVQA's or Video-ChatGPT's answers",
            "correct 'source.references' in the recipe",
        )

    def answers_of(index: int, what: str) -> list[str]:
        if answers.get(index) in (None, []):
            raise RecipeError(f"{what} has no answer in {path.name}", "use the two files of one release")
        return answer_texts(answers[index], f"{what} in {path.name}")

    return answers_of


def _by_position(
    content: dict[str, Any], path: Path, rows: list[Any], problems: list[RecipeError] | None
) -> dict[int, list[str]]:
    captions = captions_by_image(content, path, problems)
    if len(captions) > len(rows):
        report_error(
            RecipeError(
                f"{path.name} holds captions of {len(captions)} images and there are {len(rows)} questions",
                "use the two files of one release",
            ),
            problems,
        )
    _warn_of_other_images(content["images"], path, rows)
    return {index: captions.get(str(index + 1), []) for index in range(len(rows))}


def _warn_of_other_images(images: list[Any], path: Path, rows: list[Any]) -> None:
    """Warn if images and questions that are paired by id have different file names."""
    named = {str(i["id"]): i.get("file_name") for i in images if isinstance(i, dict) and "id" in i}
    images_of_questions = {
        str(n): row.get("image") for n, row in enumerate(rows, start=1) if isinstance(row, dict)
    }
    other = [
        n
        for n, image in images_of_questions.items()
        if isinstance(image, str) and isinstance(named.get(n), str) and _base(image) != _base(named[n])
    ]
    if other:
        log.warning(
            "%s names another image than the question for %d of %d records (first: number %s)",
            path.name,
            len(other),
            len(rows),
            other[0],
        )


def _base(name: str) -> str:
    return PurePosixPath(name).name


def _question(row: dict[str, Any]) -> str:
    """Return the id of a record's question; empty if it has none, which is reported with the record."""
    given = next((row[key] for key in ("question_id", "id") if row.get(key) is not None), None)
    try:
        return identifier(given, "a question")
    except RecipeError:
        return ""


def _by_question(
    notes: list[Any],
    path: Path,
    rows: list[Any],
    problems: list[RecipeError] | None,
    field: str = "answers",
) -> dict[int, Any]:
    """Return the answers in a field of the entries by the questions' positions, paired by `question_id`."""
    answers: dict[str, Any] = {}
    incomplete: list[int] = []

    def note(item: tuple[int, Any]) -> None:
        index, entry = item
        if not isinstance(entry, dict) or entry.get("question_id") is None or entry.get(field) is None:
            incomplete.append(index)  # its question is refused unless another entry answers it
            return
        name = identifier(entry["question_id"], f"entry {index} of {path.name}")
        if answers.setdefault(name, entry[field]) != entry[field]:
            raise RecipeError(
                f"{path.name} has other answers for the question {name!r} in entry {index}",
                "keep one of them",
            )

    collect_errors(note, enumerate(notes), problems)
    questions = {index: _question(row) for index, row in enumerate(rows) if isinstance(row, dict)}
    unused = answers.keys() - questions.values()
    if incomplete or unused:
        log.warning(
            "%s: of %d entries, %d have no 'question_id' or no '%s', and %d are for questions that the "
            "split does not have",
            path.name,
            len(notes),
            len(incomplete),
            field,
            len(unused),
        )
    return {index: answers.get(name, []) for index, name in questions.items()}
