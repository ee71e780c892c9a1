"""The command `guard`: the verdict on two checkpoints or adapters, and files that ask for it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from llava_keeplora.cli.arguments import add_command
from llava_keeplora.cli.run_sequence import without_collection


def add_guard(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add `guard` and return its parser."""
    parser = add_command(
        commands,
        "guard",
        "judge a tuned checkpoint or adapter against its base on recipes that it must not get worse at",
        run_guard,
        resumes=True,
    )
    parser.add_argument(
        "init",
        nargs="?",
        choices=["init"],
        metavar="init",
        help="instead of judging now, write a GitHub workflow and a pre-commit hook that do so",
    )
    model = "a folder with a checkpoint or an adapter, or an id on the Hub"
    parser.add_argument("--base", required=True, help=f"the model before: {model}")
    parser.add_argument("--tuned", required=True, help=f"the model after: {model}")
    parser.add_argument(
        "--watch",
        required=True,
        nargs="+",
        metavar="NAME|FILE.yaml",
        help="the recipes, whose test is answered",
    )
    parser.add_argument(
        "--max-drop", type=float, default=1.0, metavar="POINTS", help="largest accepted drop (default: 1.0)"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="of all limits together (default: 0.95)"
    )
    parser.add_argument("--into", default="guard", metavar="DIR", help="folder of answers and verdict")
    parser.add_argument(
        "--summary", metavar="FILE.md", help="write the verdict as Markdown, for a pull request"
    )
    parser.add_argument("--data-root", help="the folder with the data sets")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per forward pass (default: 64)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="most tokens of an answer (default: 128)"
    )
    return parser


def run_guard(args: argparse.Namespace) -> int:
    """Print the verdict on two models and return its exit code; or write the files that ask for it."""
    with without_collection():
        from llava_keeplora.config import EvaluationConfig
        from llava_keeplora.config.guard import DropLimit, GuardConfig
        from llava_keeplora.errors import UserError
        from llava_keeplora.guard import DONT_SHIP, verdict_lines
        from llava_keeplora.guard.checkpoints import Comparison, append_step_summary, compare_checkpoints
        from llava_keeplora.guard.text import error_markdown, verdict_markdown

    # What a run's configuration refuses is refused here, before anything is computed or written.
    GuardConfig(args.watch, watch_tasks=DropLimit(args.max_drop), confidence=args.confidence)
    EvaluationConfig(batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    if args.init:
        return _write_ci(args)
    given = Comparison(
        args.base,
        args.tuned,
        args.max_drop,
        args.confidence,
        Path(args.into),
        args.data_root,
        args.batch_size,
        args.max_new_tokens,
    )
    try:
        verdict = compare_checkpoints(given, args.watch)
    except UserError as error:
        append_step_summary(error_markdown(error))
        raise
    text = verdict_markdown(verdict)
    append_step_summary(text)
    if args.summary:
        Path(args.summary).parent.mkdir(parents=True, exist_ok=True)
        Path(args.summary).write_text(text, encoding="utf-8")
    sys.stdout.write("\n".join(verdict_lines(verdict)) + "\n")
    return 0 if verdict["ship"] else DONT_SHIP


#: Options that a written command line has where they differ from their default.
OPTIONAL = ("confidence", "data_root", "batch_size", "max_new_tokens", "summary")


def _write_ci(args: argparse.Namespace) -> int:
    """Write the workflow and the hook into this folder, and say what is left to do."""
    from llava_keeplora.guard.checkpoints import load_recipes
    from llava_keeplora.guard.ci import requirement, write_ci

    load_recipes(args.watch)  # A name that is no recipe is refused now, not in the first pull request.
    words = ["llava-keeplora", "guard", "--base", args.base, "--tuned", args.tuned, "--watch", *args.watch]
    words += ["--max-drop", f"{args.max_drop:g}", "--into", args.into]
    defaults = add_guard(argparse.ArgumentParser().add_subparsers())
    for name in OPTIONAL:
        if (value := getattr(args, name)) != defaults.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    named = [args.base, args.tuned, *args.watch]
    places = [place for place in named if os.path.exists(place)]
    inside = [os.path.relpath(place) for place in places if not os.path.relpath(place).startswith(os.pardir)]
    written = write_ci(Path(), words, args.into, inside)
    lines = [f"written: {path}" for path in written]
    lines += [
        f"note: {place} is another place on every machine; name it by a path inside of the repository"
        for place in places
        if os.path.isabs(place) or os.path.relpath(place) not in inside
    ]
    if package := requirement():
        lines.append(
            f"note: the workflow installs {package}, or what the repository variable LLAVA_KEEPLORA says"
        )
    else:
        lines.append(
            "note: nobody else can install this package from this machine's folder; set the repository "
            "variable LLAVA_KEEPLORA to what pip installs, for instance git+https://..."
        )
    lines.append(f"next: add {args.into}/ to .gitignore, commit both files, and run pre-commit install")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
