"""``llava-keeplora-eval``: predict, score, and show the accuracy matrix, without training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llava_keeplora_eval.answer_files import FORMS as ANSWER_FORMS
from llava_keeplora_eval.errors import EvalError
from llava_keeplora_eval.generation import MAX_NEW_TOKENS
from llava_keeplora_eval.guard import check_words, guarded, standard_streams
from llava_keeplora_eval.matrix import Matrix
from llava_keeplora_recipes import load_split


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; those of the process when None.

    Returns:
        0, or 2 after an error that the user can repair, which is reported in one sentence on stderr
        (``--debug`` raises it instead, with its traceback).
    """
    with standard_streams():
        parser = build_parser()
        arguments = parser.parse_args(check_words(parser, argv))
        return guarded(lambda: arguments.run(arguments), arguments.debug, "run the same command again")
    return 0  # `standard_streams` suppresses the error of a closed stdout.


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `llava-keeplora-eval`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--task", required=True, help="a recipe's name, or the path of a recipe's YAML")
    data.add_argument("--split", default="test", help="the split of the task")
    data.add_argument("--data-root", help="folder that holds the data of recipes that need files")
    data.add_argument(
        "--on-bad-image",
        choices=("refuse", "drop"),
        default="refuse",
        help="what is done where an image cannot be read: nothing is, or its examples are left out",
    )

    parser = argparse.ArgumentParser(prog="llava-keeplora-eval", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_predict(commands, [common, data])
    score = commands.add_parser("score", parents=[common, data], help="score a file of predictions")
    score.add_argument(
        "--predictions", required=True, type=Path, help="by `predict`, or answers made elsewhere"
    )
    score.add_argument(
        "--from", dest="form", choices=ANSWER_FORMS, help="how the file is laid out (default: detected)"
    )
    score.add_argument("--metric", help="another metric than the task's own, caption_meteor for instance")
    score.add_argument("--json", action="store_true", help="print the score as JSON instead of a line")
    score.set_defaults(run=_score)

    matrix = commands.add_parser("matrix", parents=[common], help="show a matrix and its metrics")
    matrix.add_argument("path", type=Path, help="a matrix.json, or a run's folder")
    matrix.add_argument(
        "--format", choices=tuple(FORMATS), default="markdown", help="how the matrix is printed"
    )
    matrix.add_argument("--precision", type=int, default=1, help="decimals in Markdown")
    matrix.set_defaults(run=_matrix)

    _add_data_check(commands, common)
    listing = commands.add_parser(
        "list", parents=[common], help="list the tasks and sequences that come with the package"
    )
    listing.set_defaults(run=_list)
    return parser


def _add_predict(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    predict = commands.add_parser("predict", parents=parents, help="answer every example of a task")
    predict.add_argument(
        "--model",
        required=True,
        help="tiny-clip, tiny-llava, tiny-qwen, a folder with a checkpoint (docs/models.md) or an adapter, "
        "or a Hub id",
    )
    predict.add_argument(
        "--base",
        metavar="DIR",
        help="folder of an adapter's base model (default: the one that the adapter names)",
    )
    _add_family(predict)
    predict.add_argument("--output", required=True, type=Path, help="JSONL file; continued if it exists")
    predict.add_argument("--batch-size", type=_positive, default=64, help="examples per forward pass")
    predict.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=MAX_NEW_TOKENS,
        help="most tokens of an answer",
    )
    predict.add_argument(
        "--generation",
        metavar="JSON",
        type=_object,
        default={},
        help="""settings of a LLaVA model's generation, for instance '{"num_beams": 4}' (default: greedy)""",
    )
    predict.add_argument("--device", help="cpu, cuda, ...; a GPU when there is one")
    predict.set_defaults(run=_predict)


def _add_data_check(commands: Any, common: argparse.ArgumentParser) -> None:
    data_commands = commands.add_parser("data", help="examine the data of a task").add_subparsers(
        required=True, metavar="COMMAND"
    )
    check = data_commands.add_parser(
        "check", parents=[common], help="report everything that is wrong with a task's data"
    )
    check.add_argument(
        "recipe", metavar="RECIPE", help="a recipe's or a sequence's name, or the path of its YAML"
    )
    check.add_argument("--data-root", help="folder that holds the data of recipes that need files")
    check.add_argument("--split", help="the split to check (default: all)")
    check.add_argument(
        "--model",
        help="prepare the examples for tiny-clip, tiny-llava, tiny-qwen, a folder with a checkpoint "
        "(docs/models.md) or an adapter, or a Hub id",
    )
    check.add_argument(
        "--base",
        metavar="DIR",
        help="folder of an adapter's base model (default: the one that the adapter names)",
    )
    _add_family(check)
    check.set_defaults(run=_data_check)


def _add_family(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="what loads the model, such as my_module:MyFamily (default: by the checkpoint's type)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _object(text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"it is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("it is no JSON object")
    return value


def _load(arguments: argparse.Namespace):
    from llava_keeplora_recipes import load_recipe

    return load_split(
        load_recipe(arguments.task),
        arguments.split,
        data_root=arguments.data_root,
        on_bad_image=arguments.on_bad_image,
    )


def _predict(arguments: argparse.Namespace) -> None:
    from llava_keeplora_eval.predictions import predict_to_file

    data = _load(arguments)
    if warning := _reference_warning(data):
        print(f"warning: {warning}.", file=sys.stderr)
    # After the data, because importing torch takes seconds, and a misspelt task should be reported at once.
    from llava_keeplora_eval.families import load_family_predictor
    from llava_keeplora_eval.models import load_predictor, made_by
    from llava_keeplora_eval.predictors import default_device
    from llava_keeplora_eval.preparation import check_questions

    load = partial(load_family_predictor, arguments.family) if arguments.family else load_predictor
    predictor = load(
        arguments.model,
        data.recipe,
        arguments.device or default_device(),
        arguments.max_new_tokens,
        arguments.base,
        arguments.generation,
    )
    check_questions(predictor.preparation, data)
    maker = made_by(arguments.model, predictor, arguments.base)
    count = predict_to_file(predictor, data, arguments.output, arguments.batch_size, made_by=maker)
    print(f"{arguments.output}: {count} predicted now, {len(data)} in all{_dropped(data)}")


def _reference_warning(data) -> str | None:
    """Return what keeps answers from being scored; they can still be predicted, and scored by another metric.

    Raises:
        EvalError: there is no such metric, or it does not score tasks of this kind.
    """
    from llava_keeplora_eval.references import check_references, metric_of

    metric_of(data.recipe)
    try:
        return check_references(data)
    except EvalError as error:
        return str(error).removesuffix(".")


def _dropped(data) -> str:
    return f", {len(data.dropped)} dropped" if data.dropped else ""


def _score(arguments: argparse.Namespace) -> None:
    from llava_keeplora_eval.references import check_references
    from llava_keeplora_eval.scoring import score

    data = _load(arguments)
    if warning := check_references(data, arguments.metric):
        print(f"warning: {warning}.", file=sys.stderr)
    result = score(data, arguments.predictions, arguments.metric, arguments.form)
    print(json.dumps(result.to_dict()) if arguments.json else result)
    if result.errors_line and not arguments.json:
        print(result.errors_line)


def _matrix(arguments: argparse.Namespace) -> None:
    matrices = {name: Matrix.from_json(path) for name, path in _matrix_files(arguments.path).items()}
    print(FORMATS[arguments.format](matrices, arguments.precision), end="")


def _matrix_files(path: Path) -> dict[str, Path]:
    """Return label → matrix file: the path itself, or the files in a folder and one level below it.

    Raises:
        EvalError: the folder has none.
    """
    if not path.is_dir():
        return {path.stem: path}
    files = {path.resolve().name: path / "matrix.json"} if (path / "matrix.json").exists() else {}
    files |= {file.parent.name: file for file in sorted(path.glob("*/matrix.json"))}
    if not files:
        raise EvalError(f"{path} holds no matrix.json, nor does a folder in it", "give the folder of a run")
    return files


def _as_markdown(matrices: dict[str, Matrix], precision: int) -> str:
    parts = [
        (f"## {label}\n\n" if len(matrices) > 1 else "")
        + matrix.markdown(precision)
        + "\n"
        + matrix.metrics_markdown(precision)
        for label, matrix in matrices.items()
    ]
    return "\n".join(parts)


def _as_csv(matrices: dict[str, Matrix], _: int) -> str:
    parts = [
        (f"# {label}\n" if len(matrices) > 1 else "") + matrix.csv() for label, matrix in matrices.items()
    ]
    return "\n".join(parts)


def _as_json(matrices: dict[str, Matrix], _: int) -> str:
    records = {label: matrix.to_dict() for label, matrix in matrices.items()}
    return json.dumps(records if len(records) > 1 else next(iter(records.values())), indent=1) + "\n"


FORMATS = {"markdown": _as_markdown, "csv": _as_csv, "json": _as_json}


def _data_check(arguments: argparse.Namespace) -> None:
    from llava_keeplora_eval.data_check import check

    for line in check(
        arguments.recipe,
        arguments.data_root,
        arguments.split,
        arguments.model,
        arguments.base,
        arguments.family,
    ):
        print(" ".join(line.splitlines()), flush=True)  # a name may hold a line break


def _list(_: argparse.Namespace) -> None:
    from llava_keeplora_recipes import list_recipes, list_sequences, load_recipe, load_sequence

    recipes = [load_recipe(name) for name in list_recipes()]
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        classes = f"{len(recipe.classes)} classes" if recipe.classes else ""
        print(
            f"{recipe.name:<{width}}  v{recipe.version}  {recipe.kind}  {recipe.metric}  {classes}".rstrip()
        )
    sequences = [load_sequence(name) for name in list_sequences()]
    width = max((len(sequence.name) for sequence in sequences), default=0)
    print("\nsequences")
    for sequence in sequences:
        print(f"{sequence.name:<{width}}  {len(sequence.tasks)} tasks  {sequence.description}")
        for task, reason in sequence.not_scored.items():
            print(f"{'':<{width}}  without {task}: {reason}")


if __name__ == "__main__":
    raise SystemExit(main())
