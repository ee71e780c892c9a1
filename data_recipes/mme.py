"""MME's release: a folder per subtask, with a text file of two questions for each image."""

from __future__ import annotations

from pathlib import Path

from .errors import RecipeError, collect_errors
from .json_files import read_text
from .paths import data_root_of, split_file, within
from .recipe import Recipe
from .records import Records, image_files

#: Folders of a subtask where images and questions lie apart.
IMAGES, QUESTIONS = "images", "questions_answers_YN"
ENDINGS = (".jpg", ".jpeg", ".png")


def read_mme(
    recipe: Recipe, split: str, data_root: str | Path | None, problems: list[RecipeError] | None = None
) -> Records:
    """Read MME's folders: `<subtask>/0001.jpg` next to `0001.txt`, or both in folders of their own.

    Those are `images` and `questions_answers_YN`. A line of a text file is a question, a tab, and Yes or No.
    The metric is given the subtask as `category`, and `<subtask>/<image>` as `question_id`, as the Hub's
    copies of MME have them. Source: github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch
    Evaluation.

    Raises:
        RecipeError: a folder has no questions, an image is missing, or a line is something else.
    """
    top, root = split_file(recipe, split, data_root), data_root_of(recipe, data_root)
    subtasks = sorted(path for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
    files = [
        (folder, text) for folder in subtasks for text in sorted(_below(folder, QUESTIONS).glob("*.txt"))
    ]
    if not files:
        raise RecipeError(
            f"the {split} split of '{recipe.name}', '{top}', has no folders with text files of questions",
            "name the folder whose folders are MME's subtasks under 'splits' in the recipe",
        )

    def questions(item: tuple[Path, Path]) -> list[tuple[str, Path, str, str, dict[str, str]]]:
        folder, text = item
        what = f"'{text.relative_to(top).as_posix()}' of {recipe.name}/{split}"
        within(text, what, root)
        image = _image_of(_below(folder, IMAGES), text.stem, what)
        within(image, what, root)
        name = f"{folder.name}/{image.name}"
        lines = [line.strip() for line in read_text(text).split("\n") if line.strip()]
        pairs = [[part.strip() for part in line.split("\t")] for line in lines]
        if len(pairs) != 2 or any(len(pair) != 2 or not all(pair) for pair in pairs):
            raise RecipeError(
                f"{what} holds something else than two lines with a question, a tab and an answer",
                "correct the file, or remove it with its image",
            )
        meta = {"category": folder.name, "question_id": name}
        return [(f"{name}#{i}", image, *pair, meta) for i, pair in enumerate(pairs, start=1)]

    rows = [row for listed in collect_errors(questions, files, problems) for row in listed]
    return Records(
        ids=[name for name, *_ in rows],
        images=image_files([[image] for _, image, *_ in rows]),
        labels=[None] * len(rows),
        label_names=None,
        questions=[question for _, _, question, _, _ in rows],
        answers=[[answer] for *_, answer, _ in rows],
        meta=[meta for *_, meta in rows],
    )


def _below(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _image_of(folder: Path, stem: str, what: str) -> Path:
    for ending in (*ENDINGS, *map(str.upper, ENDINGS)):
        if (path := folder / f"{stem}{ending}").is_file():
            return path
    raise RecipeError(
        f"{what} has no image '{stem}' with one of the endings {', '.join(ENDINGS)} in '{folder}'",
        "add the image, or remove the text file",
    )
